"""The folder of a run: its settings, its log, and where everything else in it lies.

config.json              the resolved settings and the data they met
batch_per_device.json    the size that run.batch_per_device = "auto" has found
log.jsonl                one line per log interval and per measurement
checkpoints/             to resume from
model.safetensors        the (first) averaged weights at the last checkpoint, or the weights where nothing is averaged
model-ema-NAME.safetensors  the other averages
model-best.safetensors   the weights with the best score so far, at the first of run.eval_steps
snapshots/               model-IMAGES-NAME.safetensors: the averages of train.ema_lengths over the training, for `mmgen ema`
previews/, curves.png    sample grids over training; loss and scores over training
samples.png, results.json   at the end: 1, 2, 4, 8 steps above real images, and the table
.lock                    keeps a second run out while one is at work
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from ..data import Dataset
from ..data.latents import LatentDataset
from ..errors import TrainingError, cannot_write, shortened
from ..system.files import TEMPORARY, parse_json, read_json, remove_leftovers, replacing, write_json
from ..system.lock import LOCK_FILE
from ..system.schema import flatten

_MISSING = object()
_MOST_LOG = 1 << 28  # bytes of log.jsonl: a million lines


# Settings with which a run may go on that are others than before: all of these sections, ...
_FREE_SECTIONS = ("run", "sampling", "optimizer")
# ... how training goes on, ...
_FREE = {"train.max_images", "train.precision", "train.ema_rampup"}
# ... and where files lie and how they are read: what came out of them is compared by its hash
_FREE |= {"teacher.name", "train.init", "data.name", "data.split", "data.resolution", "data.channels", "data.num_classes"}
_FREE |= {"data.image_column", "data.label_column", "data.on_corrupt", "data.subset", "data.revision", "data.follow_links"}
_FREE |= {"data.caption_column", "data.captions", "text.encoder"}


def is_free(key: str) -> bool:
    """Whether a run may be continued with another value of the setting `key`, dotted."""
    return key in _FREE or key.split(".")[0] in _FREE_SECTIONS


class RunFolder:
    """Paths and logs of one run. Only the main process writes, and where `lock.only_run_in` lets it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.previews = path / "previews"
        self.log_file = path / "log.jsonl"
        self.unwritten: list[str] = []  # lines that the log had no room for, yet
        self.changed: dict[str, list[Any]] = {}  # settings of `optimizer` and `train` -> [before, now], of a run that goes on

    def open(self, command: str, config: dict[str, Any], dataset: Dataset | LatentDataset) -> None:
        """Makes the folder, or checks that it holds this very run. Raises TrainingError naming what differs and may not.

        command: such as "train-imm"; config: its settings as a dictionary.
        """
        identity = {"command": command, "config": config, "data": dataset.fingerprint, "images": dataset.description}
        identity["place"] = dataset.path
        identity = json.loads(json.dumps(identity))  # as it comes back: tuples are lists
        file = self.path / "config.json"
        if file.is_file():
            self._compare(self.identity(), identity)
        elif self.path.is_dir() and any(not p.name.startswith((TEMPORARY, LOCK_FILE)) for p in self.path.iterdir()):
            raise TrainingError(f"{self.path} is not empty and holds no run: give another --out")
        write_json(file, identity)
        for folder in (self.path, self.checkpoints, self.previews):
            remove_leftovers(folder)

    def identity(self) -> dict[str, Any]:
        """What config.json says of the run that is there: command, config, data. Raises TrainingError where it is damaged."""
        file = self.path / "config.json"
        try:
            found = read_json(file)
            if (
                not isinstance(found["config"], dict)
                or not isinstance(found["data"], str)
                or not isinstance(found["command"], str)
            ):
                raise ValueError("it holds no settings of a run")
            return found
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TrainingError(
                f"{file} is damaged ({shortened(error)}), so that nothing says what the run there is of: give another --out"
            ) from error

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
            if was == is_:
                continue
            if key.split(".")[0] in ("optimizer", "train") and key != "train.init" and is_ is not _MISSING and is_free(key):
                self.changed[key] = [None if was is _MISSING else was, is_]
            if not is_free(key) and was is not _MISSING:  # a setting that an older version did not have is as it was there
                raise TrainingError(
                    f"{self.path} holds a run with {key} = {_show(was)}, not {_show(is_)}: give another --out to start anew, "
                    "or the same settings to resume"
                )

    def read_log(self) -> list[dict[str, Any]]:
        """The lines of the log; a last line that a kill cut short is left out. Raises TrainingError where it is no log."""
        if not self.log_file.is_file():
            return []
        lines = []
        try:
            if self.log_file.stat().st_size > _MOST_LOG:
                raise ValueError(f"it has more than {_MOST_LOG:,} bytes")
            written = self.log_file.read_bytes().splitlines()
            for i, text in enumerate(written, 1):
                try:
                    lines.append(_log_line(text))
                except ValueError as error:
                    if i < len(written):
                        raise ValueError(f"line {i}: {shortened(error)}") from error
        except (OSError, ValueError) as error:
            raise TrainingError(f"{self.log_file} is damaged ({shortened(error)}): move it away to resume without it") from error
        return lines

    def rewind_log(self, images: int) -> list[dict[str, Any]]:
        """Drops what was logged after the checkpoint that training resumes from; returns the rest."""
        kept = [line for line in self.read_log() if line["images"] <= images]
        with replacing(self.log_file) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        return kept

    def log(self, line: dict[str, Any]) -> None:
        """Appends a line. Raises MmgenError where it cannot be written; then it is written with the next one."""
        self.unwritten.append(json.dumps(line) + "\n")
        size = 0
        try:
            size = self.log_file.stat().st_size if self.log_file.exists() else 0
            with open(self.log_file, "a") as file:
                file.write("".join(self.unwritten))
        except OSError as error:
            with contextlib.suppress(OSError):  # of what is there now, no part of a line
                os.truncate(self.log_file, size)
            raise cannot_write(self.log_file, error) from error
        self.unwritten.clear()

    def read_results(self, images: int) -> dict[str, Any] | None:
        """results.json, if it is of so many images; None where there is none, or it is damaged: it is then written anew."""
        with contextlib.suppress(OSError, ValueError):
            found = read_json(self.path / "results.json")
            return found if isinstance(found, dict) and found.get("images") == images else None
        return None

    def write_results(self, results: dict[str, Any]) -> None:
        write_json(self.path / "results.json", results)


def _log_line(text: bytes) -> dict[str, Any]:
    """Raises ValueError for what is none."""
    line = parse_json(text.decode())
    known = isinstance(line, dict) and type(line.get("images")) is int and isinstance(line.get("values", {}), dict)
    if not known:
        raise ValueError("none of a log")
    return line


def _show(value: Any) -> str:
    return "(unset)" if value is _MISSING else repr(value)
