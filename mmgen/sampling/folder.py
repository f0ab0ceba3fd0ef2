"""Samples as a folder of PNG files, with the record of how they were made, EDM's dataset.json of classes, metadata.jsonl of texts."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import ConfigError, MmgenError, disk_errors
from ..system.files import flush_to_disk, remove_leftovers, replacing, staging, write_json
from ..report.images import is_whole_png, png_bytes
from ..models.build import AnyModel
from ..models.config import ModelConfig, drawn_shape
from ..system.process import cores
from .missing import Progress, draw_missing
from .record import Origin, make_record, may_continue, read_record
from .drawing import Plan, SampleSettings, draw_condition, plan
from .prompts import texts_of
from ..system.processes import ProcessGroup, find_process_group

RECORD = "samples.json"
LABELS = "dataset.json"
TEXTS = "metadata.jsonl"
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_MOST_WRITERS = 16  # threads
_AT_ONCE = 16  # files that one of them is given at a time
_OURS = re.compile(r"\d{6,}\.png")


@dataclass(frozen=True)
class Written:
    """What a call of `write_png`, `write_npz` or `write_grid` left behind."""

    path: Path
    num: int  # images there now
    drawn: int  # of which drawn by this call, in all processes; the others were there
    record: dict[str, Any]


def write_png(
    model: AnyModel,
    folder: str | os.PathLike,
    num: int,
    settings: SampleSettings,
    origin: Origin,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    process_group: ProcessGroup | None = None,
) -> Written:
    """Writes images 0 to num - 1 as `000000.png` ... (more digits if num needs them), those that are not there yet.

    `samples.json` says how they were made, and is written first, with "complete": false until the last image is there.
    A class-conditional model's labels are in `dataset.json`, the texts of a model of text in `metadata.jsonl`: `--data` reads both. Files appear whole or not at all; should a
    power cut damage some, they are drawn anew.

    The folder may hold an interrupted or a smaller run of the same settings, which is continued, and anything but
    pictures. `overwrite` replaces a run of other settings (one of the same would come out the same: it is continued).

    Raises ConfigError for a folder with samples of other settings, or with pictures that no record explains, which
    `overwrite` does not touch either; MmgenError where a file cannot be written.
    """
    folder, process_group = Path(folder), process_group or find_process_group(model.device.type == "cpu")
    check_pictures(model.config)
    check_num(num)
    chosen = plan(model.config, settings)
    digits = max(6, len(str(num - 1)))
    record = make_record(model, origin, chosen, num, digits=digits)
    if process_group.is_main:
        with disk_errors(folder):
            _prepare(folder, record, overwrite)
    process_group.wait()  # nobody may look before the main process has cleared up ...
    missing = _missing(folder, num, digits)
    process_group.wait()  # ... nor write before all have looked
    if missing:
        with staging(folder) as temporary, _in_background(temporary) as write:
            for indices, images in draw_missing(model, chosen, missing, num, process_group, progress):
                write((folder / _name(i, digits), image) for i, image in zip(indices, images.numpy(force=True), strict=True))
        process_group.wait()
        with disk_errors(folder):
            _flush(folder, [_name(i, digits) for i in range(num)[process_group.index :: process_group.size]])
    process_group.wait()
    if process_group.is_main:
        labels = all_labels(model.config, chosen, num)
        if labels is not None:
            listed = [[_name(i, digits), label] for i, label in enumerate(labels)]
            with replacing(folder / LABELS) as temporary:
                temporary.write_text(json.dumps({"labels": listed}))
        texts = all_texts(model.config, chosen, num)
        if texts is not None:
            with replacing(folder / TEXTS) as temporary:
                rows = [{"file_name": _name(i, digits), "text": text} for i, text in enumerate(texts)]
                temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
        finish(folder / RECORD, record, bool(missing))
    process_group.wait()  # whoever goes on may read them
    return Written(folder, num, len(missing), record)


def _flush(folder: Path, names: list[str]) -> None:
    """Files, also those of a run that was interrupted, to the disk: "complete" means that they are there. Raises OSError."""
    within = os.path.join(folder, "")  # not Paths: making one takes as long as flushing a small file in memory
    pieces = [names[start : start + _AT_ONCE] for start in range(0, len(names), _AT_ONCE)]
    with ThreadPoolExecutor(_MOST_WRITERS) as pool:
        for _ in pool.map(lambda some: [flush_to_disk(within + name) for name in some], pieces):
            pass
    flush_to_disk(folder)


@contextlib.contextmanager
def _in_background(temporary: Path) -> Iterator[Callable[[Iterable[tuple[Path, np.ndarray]]], None]]:
    """write(files): starts to write a batch of PNG files, once the batch before is written; at the end all are.

    So that the next batch is drawn meanwhile. Raises what `_write` raises, and then leaves out what was not begun; whatever
    else ends the block, what was drawn is written.
    """
    pool, begun = ThreadPoolExecutor(min(cores(), _MOST_WRITERS), "png"), []

    def finish() -> None:
        try:
            while begun:
                begun.pop(0).result()
        except MmgenError:
            pool.shutdown(cancel_futures=True)
            raise

    def write(files: Iterable[tuple[Path, np.ndarray]]) -> None:
        finish()
        some = list(files)
        begun.extend(pool.submit(_write, some[start : start + _AT_ONCE], temporary) for start in range(0, len(some), _AT_ONCE))

    try:
        yield write
        finish()
    finally:
        pool.shutdown()


def _write(files: list[tuple[Path, np.ndarray]], temporary: Path) -> None:
    """Writes PNG files by way of a folder for unfinished ones. Raises MmgenError where that fails."""
    for path, image in files:
        with disk_errors(path):
            unfinished = os.path.join(temporary, path.name)
            with open(unfinished, "wb") as file:
                file.write(png_bytes(image))
            os.replace(unfinished, path)


def check_num(num: int) -> None:
    """Raises ConfigError where `num` is no number of images."""
    if num < 1:
        raise ConfigError(f"the number of images must be at least 1, not {num}")


def check_pictures(config: ModelConfig) -> None:
    """Raises ConfigError where a model's images cannot be PNG files."""
    channels = drawn_shape(config)[0]
    if channels not in (1, 3):
        raise ConfigError(f"this model's images have {channels} channels, and PNG files 1 or 3: use the format npz")


def all_labels(config: ModelConfig, chosen: Plan, num: int) -> list[int] | None:
    """The labels of images 0 to num - 1, None for an unconditional model."""
    return draw_condition(config, chosen, torch.arange(num)).classes.tolist() if config.num_classes else None


def all_texts(config: ModelConfig, chosen: Plan, num: int) -> list[str] | None:
    """The texts of images 0 to num - 1, a line each; None of a model that takes none."""
    if config.text is None:
        return None
    return [" ".join(text.split()) for text in texts_of(config, chosen.prompts, chosen.seed, torch.arange(num))]


def finish(path: Path, record: dict[str, Any], changed: bool) -> None:
    """Marks a run as complete; the record of one that was complete before is left as it is."""
    record["complete"] = True
    old = read_record(path)
    if changed or old is None or not old.get("complete") or old["num"] != record["num"]:
        write_json(path, record)


def _prepare(folder: Path, record: dict[str, Any], overwrite: bool) -> None:
    """Makes the folder ready for the images of `record`, or raises ConfigError."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file, and PNG samples need a folder: choose another --out")
    old = read_record(folder / RECORD)
    if old is None:
        check_foreign(folder)
    elif not may_continue(folder, old, record, overwrite):
        write_json(folder / RECORD, {**old, "complete": False})  # whatever interrupts the deletion, nobody is misled
        for path in folder.iterdir():
            if _OURS.fullmatch(path.name) or path.name in (LABELS, TEXTS):
                path.unlink()
        old = None
    if folder.is_dir():
        remove_leftovers(folder)
        if old is not None and not old.get("complete"):
            _remove_damaged(folder)
    if old is None or not old.get("complete") or _missing(folder, record["num"], record["digits"]):
        write_json(folder / RECORD, record)


def _remove_damaged(folder: Path) -> None:
    """Images are not flushed to the disk one by one: after a power cut, some may be empty or cut short."""
    paths = [path for path in folder.iterdir() if _OURS.fullmatch(path.name)]
    with ThreadPoolExecutor() as pool:
        for path, whole in zip(paths, pool.map(is_whole_png, paths), strict=True):
            if not whole:
                path.unlink()


def check_foreign(folder: Path) -> None:
    """Raises ConfigError where a folder without a record holds pictures, or runs of samples in folders of its own.

    Whoever scores the folder would take them for samples.
    """
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in PICTURES or path.name == LABELS:
            raise ConfigError(f"{folder} holds {path.name}, which is not of samples: choose another --out")
        if (path / RECORD).is_file():
            raise ConfigError(f"{folder} holds samples in folders, such as {path.name}: choose another --out")


def _missing(folder: Path, num: int, digits: int) -> list[int]:
    there = {entry.name for entry in os.scandir(folder)} if folder.is_dir() else set()
    return [i for i in range(num) if _name(i, digits) not in there]


def _name(i: int, digits: int) -> str:
    return f"{i:0{digits}d}.png"
