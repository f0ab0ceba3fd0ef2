"""Progress that a person or a program can follow: a bar on a terminal, lines of JSON otherwise. Both on stderr."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

SECONDS_BETWEEN_LINES = 5.0  # where there is no terminal
SECONDS_BEFORE_FIRST = 1.0
WIDEST = 100  # columns of a bar

Update = Callable[..., None]


@contextlib.contextmanager
def progress_bar(description: str, total: int, unit: str = "images") -> Iterator[Update]:
    """Yields update(done, total=None). The first call says what was there at the start: it does not count as speed.

    On a terminal: a bar with the speed and the time left. Otherwise a line every few seconds and at the end:
    {"images": 128, "of": 1000, "images_per_second": 51.2, "what": description}, with the unit's name in the keys.
    """
    with _bar(description, total) if sys.stderr.isatty() else _lines(description, total, unit) as update:
        yield update


def make_bars(console: Any) -> Any:
    """rich's Progress in one line of at most 80 columns a task: what, bar, count, speed, time left, a value of the task."""
    from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.table import Column
    from rich.text import Text

    class Count(ProgressColumn):
        def render(self, task) -> Text:
            return Text("" if task.total is None else f"{_short(task.completed)}/{_short(task.total)}")

    class Speed(ProgressColumn):
        def render(self, task) -> Text:
            return Text(_speed(task.finished_speed or task.speed))

    what = TextColumn("{task.description}", markup=False, table_column=Column(max_width=28, no_wrap=True, overflow="ellipsis"))
    bar = BarColumn(None, table_column=Column(ratio=1, min_width=4))
    value = TextColumn("{task.fields[value]}", markup=False)
    columns = what, bar, Count(), Speed(), TimeRemainingColumn(compact=True), value
    return Progress(*columns, console=console, expand=True, speed_estimate_period=60)


def make_console() -> Any:
    from rich.console import Console

    console = Console(stderr=True)
    console.width = min(console.width, WIDEST)
    return console


def _short(count: float) -> str:
    """
    >>> _short(51_200), _short(1_638_400_000), _short(10_000_000)
    ('51,200', '1.64G', '10M')
    """
    if count < 1e6:
        return f"{int(count):,}"
    number, unit = (count / 1e9, "G") if count >= 1e9 else (count / 1e6, "M")
    return f"{number:.3g}{unit}" if number < 1000 else f"{number:.0f}{unit}"


def _speed(speed: float | None) -> str:
    """
    >>> _speed(None), _speed(1234.5), _speed(12.34), _speed(0.25)
    ('-', '1,234/s', '12.3/s', '4.0 s each')
    """
    if not speed:
        return "-"
    return f"{1 / speed:,.1f} s each" if speed < 1 else f"{speed:,.{0 if speed >= 100 else 1}f}/s"


@contextlib.contextmanager
def _bar(description: str, total: int) -> Iterator[Update]:
    with contextlib.ExitStack() as shown:
        progress, task = make_bars(make_console()), None

        def update(done: float, new_total: int | None = None) -> None:
            nonlocal task
            if task is None:  # of several processes the one that works shows its bar
                shown.enter_context(progress)
                task = progress.add_task(description, total=new_total or total or None, completed=done, value="")
            else:
                progress.update(task, completed=done, total=new_total or total or None)

        yield update


@contextlib.contextmanager
def _lines(description: str, total: int, unit: str) -> Iterator[Update]:
    start = first = shown = None
    last = shown_done = None

    def show(done: float, of: int) -> None:
        nonlocal shown, shown_done
        shown, shown_done = time.monotonic(), done
        rate = (done - first) / max(shown - start, 1e-9)
        line = {unit: int(done), "of": of, f"{unit}_per_second": round(rate, 2), "what": description}
        print(json.dumps(line), file=sys.stderr, flush=True)

    def update(done: float, new_total: int | None = None) -> None:
        nonlocal start, first, last
        of, now = new_total or total, time.monotonic()
        last = done, of
        if start is None:
            start, first = now, done
        elif now - (shown or start) >= (SECONDS_BETWEEN_LINES if shown else SECONDS_BEFORE_FIRST):
            show(done, of)

    yield update
    if last is not None and last[0] not in (first, shown_done):
        show(*last)
