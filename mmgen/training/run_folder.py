"""The folder of a run: its settings, its log, and where everything else in it lies.

config.json              the resolved settings and the data they met
log.jsonl                one line per log interval and per measurement
checkpoints/             to resume from
model.safetensors        the (first) averaged weights at the last checkpoint, or the weights where nothing is averaged
model-ema-NAME.safetensors  the other averages
model-best.safetensors   those weights with the least figure so far, at the first of run.eval_steps
previews/, curves.png    sample grids over training; loss and figures over training
samples.png, results.json   at the end: 1, 2, 4, 8 steps above real images, and the table
.lock                    keeps a second run out while one is at work
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..data import Dataset
from ..data.latents import LatentDataset
from ..errors import TrainingError, cannot_write
from ..files import TEMPORARY, remove_leftovers, replacing, write_json
from ..lock import LOCK_FILE
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
    """Paths and logs of one run. Only the main process writes, and where `lock.only_run_in` lets it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.previews = path / "previews"
        self.log_file = path / "log.jsonl"

    def open(self, command: str, config: dict[str, Any], dataset: Dataset | LatentDataset) -> None:
        """Makes the folder, or checks that it holds this very run. Raises TrainingError naming what differs.

        command: such as "train-imm"; config: its settings as a dictionary.
        """
        identity = {"command": command, "config": config, "data": dataset.fingerprint, "images": dataset.description}
        identity = json.loads(json.dumps(identity))  # as it comes back: tuples are lists
        file = self.path / "config.json"
        if file.is_file():
            self._compare(self._read(file), identity)
        elif self.path.is_dir() and any(not p.name.startswith((TEMPORARY, LOCK_FILE)) for p in self.path.iterdir()):
            raise TrainingError(f"{self.path} is not empty and holds no run: give another --out")
        write_json(file, identity)
        for folder in (self.path, self.checkpoints, self.previews):
            remove_leftovers(folder)

    def _read(self, file: Path) -> dict[str, Any]:
        """config.json, or a TrainingError where it is damaged."""
        try:
            found = json.loads(file.read_text())
            if {"command", "config", "data"} <= found.keys():
                return found
            raise ValueError("it is not a run's")
        except (OSError, ValueError, AttributeError) as error:
            raise TrainingError(f"{file} cannot be read ({error}): put it back as it was, or give another --out") from error

    def _compare(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        if old["command"] != new["command"]:
            raise TrainingError(
                f"{self.path} holds a run of `mmgen {old['command']}`, not of `mmgen {new['command']}`: give another --out"
            )
        if old["data"] != new["data"]:
            was, is_ = old.get("images"), new["images"]
            change = "as many images, other pixels or labels" if was in (None, is_) else f"they were {was}, and are {is_}"
            raise TrainingError(
                f"the data have changed since the run in {self.path} was started ({change}): bring the old ones back to resume, "
                "or give another --out to start anew"
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
        for text in self.log_file.read_text(errors="replace").splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                break
            if not isinstance(line, dict) or not isinstance(line.get("images"), int):
                break
            lines.append(line)
        return lines

    def rewind_log(self, images: int) -> list[dict[str, Any]]:
        """Drops what was logged after the checkpoint that training resumes from; returns the rest."""
        kept = [line for line in self.read_log() if line["images"] <= images]
        with replacing(self.log_file) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        return kept

    def log(self, line: dict[str, Any]) -> None:
        """Appends a line. Raises MmgenError where it cannot be written."""
        try:
            with open(self.log_file, "a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise cannot_write(self.log_file, error) from error

    def read_results(self, images: int) -> dict[str, Any] | None:
        """results.json, if it is of so many images."""
        try:
            results = json.loads((self.path / "results.json").read_text())
            return results if results["images"] == images else None
        except (FileNotFoundError, ValueError, KeyError, TypeError):  # none, or damaged: it is made again
            return None

    def write_results(self, results: dict[str, Any]) -> None:
        write_json(self.path / "results.json", results)


def _show(value: Any) -> str:
    return "(unset)" if value is _MISSING else repr(value)
