"""The folder of a run: its settings, its log, and where everything else in it lies.

config.json              the resolved settings and the data they met
batch_per_device.json    the size that run.batch_per_device = "auto" has found
log.jsonl                one line per log interval and per measurement
checkpoints/             to resume from
model.safetensors        the (first) averaged weights at the last checkpoint, or the weights where nothing is averaged
model-ema-NAME.safetensors  the other averages
model-best.safetensors   those weights with the least figure so far, at the first of run.eval_steps
previews/, curves.png    sample grids over training; loss and figures over training
samples.png, results.json   at the end: 1, 2, 4, 8 steps above real images, and the table
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..data import Dataset
from ..data.latents import LatentDataset
from ..errors import TrainingError
from ..files import remove_leftovers, replacing, write_json
from ..settings import flatten

_MISSING = object()


def is_free(key: str, config: dict[str, Any]) -> bool:
    """Whether a run may be continued with another value of the setting `key`. config: all settings by dotted key.

    The number of images is one, unless the learning rate falls towards it; and where a teacher lies, which its sha256 identifies.
    """
    if key == "teacher.name":
        return True
    if key == "train.max_images":
        return config.get("optimizer.decay", "none") == "none"
    return key.startswith(("run.", "sampling."))


class RunFolder:
    """Paths and logs of one run. Only the main process writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.previews = path / "previews"
        self.log_file = path / "log.jsonl"

    def open(self, command: str, config: dict[str, Any], dataset: Dataset | LatentDataset) -> None:
        """Makes the folder, or checks that it holds this very run. Raises TrainingError naming what differs.

        command: such as "train-imm"; config: its settings as a dictionary.
        """
        identity = {"command": command, "config": config, "data": dataset.fingerprint}
        identity = json.loads(json.dumps(identity))  # as it comes back: tuples are lists
        file = self.path / "config.json"
        if file.is_file():
            self._compare(json.loads(file.read_text()), identity)
        elif self.path.is_dir() and any(self.path.iterdir()):
            raise TrainingError(f"{self.path} is not empty and holds no run: give another --out")
        write_json(file, identity)
        for folder in (self.path, self.checkpoints, self.previews):
            remove_leftovers(folder)

    def _compare(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        if old["command"] != new["command"]:
            raise TrainingError(
                f"{self.path} holds a run of `mmgen {old['command']}`, not of `mmgen {new['command']}`: give another --out"
            )
        if old["data"] != new["data"]:
            raise TrainingError(
                f"the data are not those that the run in {self.path} was started with: give another --out to start anew"
            )
        before, after = dict(flatten(old["config"])), dict(flatten(new["config"]))
        for key in after | before:
            was, is_ = before.get(key, _MISSING), after.get(key, _MISSING)
            if was != is_ and not is_free(key, after):
                raise TrainingError(
                    f"{self.path} holds a run with {key} = {_show(was)}, not {_show(is_)}: give another --out to start anew, "
                    "or the same settings to resume"
                )

    def read_log(self) -> list[dict[str, Any]]:
        """The lines of the log; a last line that a kill cut short is left out."""
        if not self.log_file.is_file():
            return []
        lines = []
        for line in self.log_file.read_text().splitlines():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return lines

    def rewind_log(self, images: int) -> list[dict[str, Any]]:
        """Drops what was logged after the checkpoint that training resumes from; returns the rest."""
        kept = [line for line in self.read_log() if line["images"] <= images]
        with replacing(self.log_file) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        return kept

    def log(self, line: dict[str, Any]) -> None:
        with open(self.log_file, "a") as file:
            file.write(json.dumps(line) + "\n")

    def read_results(self) -> dict[str, Any] | None:
        file = self.path / "results.json"
        return json.loads(file.read_text()) if file.is_file() else None

    def write_results(self, results: dict[str, Any]) -> None:
        write_json(self.path / "results.json", results)


def _show(value: Any) -> str:
    return "(unset)" if value is _MISSING else repr(value)
