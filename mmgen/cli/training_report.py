"""What a person sees of a training run: a bar with speed, time left and loss on a terminal; the log's JSON lines otherwise."""

from __future__ import annotations

import json
import sys
from typing import Any


class TrainingReport:
    """The loop's `Reporter`. On stderr, so that results alone go to stdout. Only one process should have a visible one.

    watch: the logged number that the bar shows; of a list its mean.
    """

    def __init__(self, visible: bool = True, watch: str = "loss") -> None:
        self.visible, self.terminal = visible, visible and sys.stderr.isatty()
        self.progress = self.task = None
        self.watch, self.value = watch, float("nan")

    def note(self, text: str) -> None:
        if self.terminal:
            self._console().print(text, highlight=False, markup=False, soft_wrap=True)
        elif self.visible:
            print(json.dumps({"note": text}), file=sys.stderr, flush=True)

    def start(self, images: int, total: int) -> None:
        if not self.terminal:
            return
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            ProgressColumn,
            TextColumn,
            TimeRemainingColumn,
        )
        from rich.text import Text

        class Speed(ProgressColumn):
            def render(self, task) -> Text:
                return Text("" if not task.speed else f"{task.speed:,.0f} images/s", style="progress.data.speed")

        columns = TextColumn("training"), BarColumn(), MofNCompleteColumn(), Speed(), TimeRemainingColumn()
        value = TextColumn(self.watch.replace("_", " ") + " {task.fields[value]:.3g}")
        self.progress = Progress(*columns, value, console=self._console(), speed_estimate_period=60)
        self.task = self.progress.add_task("training", total=total, completed=images, value=self.value)
        self.progress.start()

    def advance(self, images: int) -> None:
        if self.progress is not None:
            self.progress.update(self.task, completed=images, value=self.value)

    def log(self, line: dict[str, Any]) -> None:
        found = line.get(self.watch)
        found = [number for number in (found if isinstance(found, list) else [found]) if number is not None]
        if found:
            self.value = sum(found) / len(found)
        if self.visible and not self.terminal:
            print(json.dumps(line), file=sys.stderr, flush=True)

    def stop(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

    def _console(self):
        if self.progress is not None:
            return self.progress.console
        from rich.console import Console

        return Console(stderr=True)
