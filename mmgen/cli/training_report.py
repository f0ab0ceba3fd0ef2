"""What a person sees of a training run: a bar with speed, time left and loss on a terminal; the log's JSON lines otherwise."""

from __future__ import annotations

import json
import sys
from typing import Any


class TrainingReport:
    """The loop's `Reporter`. On stderr, so that results alone go to stdout. Only one process should have a visible one."""

    def __init__(self, visible: bool = True) -> None:
        self.visible, self.terminal = visible, visible and sys.stderr.isatty()
        self.progress = self.task = None
        self.loss = float("nan")

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
        loss = TextColumn("loss {task.fields[loss]:.3g}")
        self.progress = Progress(*columns, loss, console=self._console(), speed_estimate_period=60)
        self.task = self.progress.add_task("training", total=total, completed=images, loss=self.loss)
        self.progress.start()

    def advance(self, images: int) -> None:
        if self.progress is not None:
            self.progress.update(self.task, completed=images, loss=self.loss)

    def log(self, line: dict[str, Any]) -> None:
        self.loss = line.get("loss", self.loss)
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
