"""Progress that a person or a program can follow: a bar on a terminal, lines of JSON otherwise. Both on stderr."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator

SECONDS_BETWEEN_LINES = 5.0  # where there is no terminal
SECONDS_BEFORE_FIRST = 1.0

Update = Callable[..., None]


@contextlib.contextmanager
def progress_bar(description: str, total: int, unit: str = "images") -> Iterator[Update]:
    """Yields update(done, total=None). The first call says what was there at the start: it does not count as speed.

    On a terminal: a bar with `unit` per second and the time left. Otherwise a line every few seconds and at the end:
    {"images": 128, "of": 1000, "images_per_second": 51.2, "what": description}, with the unit's name in the keys.
    """
    with _bar(description, total, unit) if sys.stderr.isatty() else _lines(description, total, unit) as update:
        yield update


@contextlib.contextmanager
def _bar(description: str, total: int, unit: str) -> Iterator[Update]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Speed(ProgressColumn):
        def render(self, task) -> Text:
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else f"{speed:,.{0 if speed >= 100 else 1}f} {unit}/s", style="progress.data.speed")

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Speed(), TimeRemainingColumn()
    with contextlib.ExitStack() as shown:
        progress, task = Progress(*columns, console=Console(stderr=True)), None

        def update(done: int, new_total: int | None = None) -> None:
            nonlocal task
            if task is None:  # of several processes the one that works shows its bar
                shown.enter_context(progress)
                task = progress.add_task(description, total=new_total or total, completed=done)
            else:
                progress.update(task, completed=done, total=new_total or total)

        yield update


@contextlib.contextmanager
def _lines(description: str, total: int, unit: str) -> Iterator[Update]:
    start = first = shown = None
    last = shown_done = None

    def show(done: int, of: int) -> None:
        nonlocal shown, shown_done
        shown, shown_done = time.monotonic(), done
        rate = (done - first) / max(shown - start, 1e-9)
        line = {unit: done, "of": of, f"{unit}_per_second": round(rate, 2), "what": description}
        print(json.dumps(line), file=sys.stderr, flush=True)

    def update(done: int, new_total: int | None = None) -> None:
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
