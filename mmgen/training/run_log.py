"""The log of a run while it trains: lines in memory and in log.jsonl, shown, and sent to the trackers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import MmgenError
from ..report.images import save_png
from .run_folder import RunFolder
from .task import Reporter


class RunLog:
    """Every process has one and adds the same lines; the main one writes them, and alone has those of before the run resumed."""

    def __init__(self, folder: RunFolder, reporter: Reporter, accelerator: Any) -> None:
        self.folder, self.reporter, self.accelerator = folder, reporter, accelerator
        self.lines: list[dict[str, Any]] = []
        self.lost: set[str] = set()  # what cannot be written at present, which was said once

    def rewind(self, images: int) -> None:
        """Back to what was logged when so many images were seen: training resumes there."""
        if self.accelerator.is_main_process:
            self.lines = self.folder.rewind_log(images)

    def add(self, line: dict[str, Any]) -> None:
        """line: "images", "step" and "seconds" and what there is to tell."""
        self.lines.append(line)
        if self.accelerator.is_main_process:
            with self.going_on("log.jsonl"):
                self.folder.log(line)
            self.reporter.log(line)
        with self.going_on("the trackers"):
            self.accelerator.log(scalars_of(line), step=line["images"])

    @contextlib.contextmanager
    def going_on(self, what: str) -> Iterator[None]:
        """What cannot be written ends no training, unless a run is resumed from it: it is said once, until it can be written again."""
        try:
            yield
            self.lost.discard(what)
        except (MmgenError, OSError) as error:
            if what not in self.lost:
                reason = getattr(error.__cause__ or error, "strerror", None) or error
                self.reporter.note(f"{what} cannot be written ({reason}): training goes on without")
            self.lost.add(what)

    def keep(self, file: Path, image: Image.Image) -> None:
        """Writes a picture, if it can be written."""
        with self.going_on(file.parent.name if file.stem.isdigit() else file.name):
            save_png(file, image)

    def scores_at(self, images: int) -> dict[str, Any]:
        """The line that holds scores of this number of images, empty where there is none."""
        lines = (line for line in reversed(self.lines) if "values" in line)
        return next((line for line in lines if line["images"] == images), {})

    def values_of(self, metric: str, count: str) -> list[float]:
        """All values so far of a metric at one number of steps, but for those whose model could not be written."""
        lines = [line for line in self.lines if line.get("figure") == metric and "unwritten" not in line]
        return [line["values"][count] for line in lines if count in line["values"]]


def scalars_of(line: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line under flat names, as trackers want them."""
    scalars = {k: v for k, v in line.items() if isinstance(v, int | float) and k not in ("images", "step", "seconds")}
    lists = {k: v for k, v in line.items() if isinstance(v, list)}
    scalars |= {f"{k}/{i}": v for k, values in lists.items() for i, v in enumerate(values, 1) if v is not None}
    scalars |= {f"variance/{count}": value for count, value in line.get("variance", {}).items()}
    return scalars | {f"{line['figure']}/{count}": value for count, value in line.get("values", {}).items()}
