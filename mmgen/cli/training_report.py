"""What a person sees of a training run: a bar with speed, time left and loss on a terminal; the log's JSON lines otherwise."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from .progress import Update, make_bars, make_console, progress_bar


@contextlib.contextmanager
def announced(bar: AbstractContextManager[Update], announce: Callable[[], None]) -> Iterator[Update]:
    """The bar, before whose first step something is announced."""
    with bar as update:

        def tell(done: float, of: int | None = None) -> None:
            announce()
            update(done, of)

        yield tell


class TrainingReport:
    """The loop's `Reporter`, see `training.task`. On stderr, so that results alone go to stdout.

    visible: of one process only.
    watch: the logged number that the bar shows; of a list its mean.
    announce: called before anything is shown.
    """

    def __init__(self, visible: bool = True, watch: str = "loss", announce: Callable[[], None] = lambda: None) -> None:
        self.announce = announce if visible else lambda: None
        self.visible, self.terminal = visible, visible and sys.stderr.isatty()
        self.progress = self.task = None
        self.watch, self.value, self.share = watch, "-", ""

    def note(self, text: str) -> None:
        self.announce()
        if self.terminal:
            self._console().print(text, highlight=False, markup=False, soft_wrap=True)
        elif self.visible:
            print(json.dumps({"note": text}), file=sys.stderr, flush=True)

    def start(self, images: int, total: int) -> None:
        self.announce()
        if not self.terminal:
            return
        self.progress = make_bars(self._console())
        self.task = self.progress.add_task("training", total=total, completed=images, value=self._watched())
        self.progress.start()

    def _watched(self) -> str:
        return f"{self.watch.replace('_', ' ')} {self.value}{self.share}"

    def advance(self, images: int) -> None:
        if self.progress is not None:
            self.progress.update(self.task, completed=images, value=self._watched())

    @contextlib.contextmanager
    def work(self, what: str, total: int, unit: str = "images") -> Iterator[Update]:
        """A bar of its own below that of the training, gone when the work is done."""
        if self.progress is None:
            bar = progress_bar(what, total, unit) if self.visible else contextlib.nullcontext(lambda *told: None)
            with announced(bar, self.announce) as update:
                yield update
            return
        task = self.progress.add_task(what, total=total, value="")
        try:
            yield lambda done, of=None: self.progress.update(task, completed=done)
        finally:
            self.progress.refresh()
            self.progress.remove_task(task)

    def log(self, line: dict[str, Any]) -> None:
        found = line.get(self.watch)
        found = [number for number in (found if isinstance(found, list) else [found]) if number is not None]
        if found:
            self.value = f"{sum(found) / len(found):.3g}"
        if "mfu" in line:
            self.share = f", MFU {line['mfu']:.0%}"
        if self.visible and not self.terminal:
            print(json.dumps(line), file=sys.stderr, flush=True)

    def stop(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

    def _console(self):
        if self.progress is not None:
            return self.progress.console
        return make_console()
