"""Samples as one file, the field's npz or a grid picture, put together from parts that survive an interruption."""

from __future__ import annotations

import io
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, MmgenError, disk_errors
from ..system.files import remove_leftovers, replacing, write_json
from ..report.images import grid
from ..models.build import AnyModel
from ..models.config import drawn_shape
from .missing import Progress, contiguous, draw_missing
from .folder import Written, all_labels, all_texts, check_num, check_pictures, finish
from .record import Origin, make_record, may_continue, read_record
from .classes import with_images
from .drawing import Plan, SampleSettings, plan
from ..system.processes import ProcessGroup, find_process_group
from ..system.tensor_files import save_array

_PART = re.compile(r"(\d+)-(\d+)\.npy")
_BLOCK = 1 << 24  # bytes copied at a time


def write_npz(
    model: AnyModel, file: str | os.PathLike, num: int, settings: SampleSettings, origin: Origin, **options: Any
) -> Written:
    """Writes images 0 to num - 1 as `arr_0`, uint8 [num, H, W, C], and if there are classes `arr_1`, int64 [num].

    Batches are kept in FILE.parts/ until all are there, so an interrupted run continues; so does a finished one of
    fewer images. FILE.json says how they were made; it is written first, with "complete": false. Images are never all
    in memory. options: progress and process_group as of `write_png`; `overwrite` replaces samples of other settings, and a
    file without a record.

    Raises ConfigError where the file holds samples of other settings or has no record, MmgenError where it cannot be
    written.
    """

    def assemble(target: Path, chosen: Plan, rows: Iterator[bytes], shape: tuple[int, ...]) -> None:
        labels = all_labels(model.config, chosen, num)
        with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as stream:
                header = {"descr": "|u1", "fortran_order": False, "shape": (num, *shape)}
                np.lib.format.write_array_header_1_0(stream, header)
                for block in rows:
                    stream.write(block)
            if labels is not None:
                with archive.open("arr_1.npy", "w", force_zip64=True) as stream:
                    np.lib.format.write_array(stream, np.array(labels, dtype=np.int64))

    return _write(model, Path(file), num, settings, origin, assemble, **options)


def write_grid(
    model: AnyModel, file: str | os.PathLike, num: int, settings: SampleSettings, origin: Origin, **options: Any
) -> Written:
    """Writes images 0 to num - 1 as one PNG picture. Resumes, keeps a record, refuses and raises as `write_npz` does.

    It is about square, with one class per column where classes come in turn.
    """
    check_pictures(model.config)

    def assemble(target: Path, chosen: Plan, rows: Iterator[bytes], shape: tuple[int, ...]) -> None:
        pixels = np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(num, *shape)
        picture = grid(pixels.transpose(0, 3, 1, 2), _columns(num, chosen, len(with_images(model.config))))
        picture.save(target, format="PNG")

    return _write(model, Path(file), num, settings, origin, assemble, **options)


def _write(
    model: AnyModel,
    file: Path,
    num: int,
    settings: SampleSettings,
    origin: Origin,
    assemble: Callable[[Path, Plan, Iterator[bytes], tuple[int, ...]], None],
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    process_group: ProcessGroup | None = None,
) -> Written:
    """Draws the missing images into parts, then makes the file of them with assemble(path, plan, bytes of all images, [H, W, C])."""
    check_num(num)
    chosen, process_group = plan(model.config, settings), process_group or find_process_group(model.device.type == "cpu")
    record, parts = make_record(model, origin, chosen, num), parts_folder(file)
    channels, *size = drawn_shape(model.config)
    shape = (*size, channels)
    if process_group.is_main:
        with disk_errors(file):
            _prepare(file, record, overwrite)
    process_group.wait()  # nobody may look before the main process has cleared up ...
    missing = _missing(file, num)
    process_group.wait()  # ... nor write before all have looked
    for indices, images in draw_missing(model, chosen, missing, num, process_group, progress):
        pixels = images.permute(0, 2, 3, 1).numpy()
        for start, stop in contiguous(indices):
            with replacing(parts / f"{indices[start]:09d}-{indices[stop - 1] + 1:09d}.npy") as temporary:
                save_array(temporary, pixels[start:stop])
    process_group.wait()
    if process_group.is_main:
        old = read_record(record_file(file)) or {}
        if missing or not old.get("complete"):
            # Inside the folder of parts, which a later run clears of what a killed one left
            with replacing(parts / f"whole{file.suffix}") as temporary:
                assemble(temporary, chosen, _rows(file, num, shape), shape)
            with disk_errors(file):
                os.replace(parts / f"whole{file.suffix}", file)
        texts = all_texts(model.config, chosen, num)
        if texts is not None:
            with replacing(texts_file(file)) as temporary:
                temporary.write_text("".join(text + "\n" for text in texts), "utf-8")
        finish(record_file(file), record, bool(missing))
        with disk_errors(file):
            _remove_parts(file)
    process_group.wait()
    return Written(file, num, len(missing), record)


def record_file(file: Path) -> Path:
    """NAME.npz.json for NAME.npz: the suffix stays, so that NAME.npz and NAME.png do not share a record."""
    return file.with_name(file.name + ".json")


def texts_file(file: Path) -> Path:
    """NAME.npz.txt: of a model of text, a line an image."""
    return file.with_name(file.name + ".txt")


def parts_folder(file: Path) -> Path:
    return file.with_name(file.name + ".parts")


def _is_npz(file: Path) -> bool:
    return file.suffix.lower() == ".npz"


def _prepare(file: Path, record: dict[str, Any], overwrite: bool) -> None:
    """Makes the place ready for the images of `record`, or raises ConfigError."""
    if file.is_dir():
        raise ConfigError(f"{file} is a folder, and the samples are to be one file: choose another --out")
    old = read_record(record_file(file))
    if old is None:
        if file.exists() and not overwrite:
            raise ConfigError(f"{file} exists, without a record of samples: choose another --out, or replace it with --overwrite")
        file.unlink(missing_ok=True)
        _remove_parts(file)  # nothing says what they are of
    elif not may_continue(file, old, record, overwrite):
        write_json(record_file(file), {**old, "complete": False})  # whatever interrupts the deletion, nobody is misled
        file.unlink(missing_ok=True)
        _remove_parts(file)
        old = None
    elif old["num"] < record["num"] and not _is_npz(file):
        file.unlink(missing_ok=True)  # a picture of fewer images cannot be continued, only what is in parts
    remove_leftovers(file.parent, record_file(file).name)
    remove_leftovers(parts_folder(file))
    if old is None or not old.get("complete") or _missing(file, record["num"]):
        write_json(record_file(file), record)


def _sources(file: Path) -> list[tuple[int, int, Path]]:
    """(start, stop, path) of the images that are there, by start: in a finished npz of fewer, and in parts."""
    found = []
    if _is_npz(file) and file.is_file():
        try:
            with zipfile.ZipFile(file) as archive, archive.open("arr_0.npy") as stream:
                np.lib.format.read_magic(stream)
                found.append((0, np.lib.format.read_array_header_1_0(stream)[0][0], file))
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise MmgenError(f"{file} is damaged ({error}): delete it, the same command draws its images again") from error
    if parts_folder(file).is_dir():
        for path in parts_folder(file).iterdir():
            if match := _PART.fullmatch(path.name):
                found.append((int(match[1]), int(match[2]), path))
    return sorted(found, key=lambda source: source[:2])


def _missing(file: Path, num: int) -> list[int]:
    record = read_record(record_file(file))
    if not _is_npz(file) and file.is_file() and record and record.get("complete") and record["num"] == num:
        return []
    there = bytearray(num)
    for start, stop, _ in _sources(file):
        there[start : min(stop, num)] = b"\1" * (min(stop, num) - start)
    return [i for i in range(num) if not there[i]]


def _rows(file: Path, num: int, shape: tuple[int, ...]) -> Iterator[bytes]:
    """The bytes of images 0 to num - 1, [H, W, C] each, from wherever they are."""
    size, position = int(np.prod(shape)), 0
    for start, stop, path in _sources(file):
        stop = min(stop, num)
        if stop <= position:
            continue  # two processes drew the same
        if path == file:
            with zipfile.ZipFile(file) as archive, archive.open("arr_0.npy") as stream:
                yield from _content(stream, (position - start) * size, (stop - position) * size)
        else:
            with open(path, "rb") as stream:
                yield from _content(stream, (position - start) * size, (stop - position) * size)
        position = stop
    if position != num:
        raise MmgenError(f"images are missing from {parts_folder(file)}: the same command draws them again")


def _content(stream: io.BufferedIOBase, skip: int, count: int) -> Iterator[bytes]:
    """`count` bytes of an npy file's content, after `skip` bytes."""
    np.lib.format.read_magic(stream)
    np.lib.format.read_array_header_1_0(stream)
    stream.seek(skip, io.SEEK_CUR)
    while count > 0:
        block = stream.read(min(_BLOCK, count))
        if not block:
            raise MmgenError("a file of samples is shorter than it says: delete it, the same command draws it again")
        count -= len(block)
        yield block


def _remove_parts(file: Path) -> None:
    """Deletes the folder of parts, if nothing but parts is in it."""
    parts = parts_folder(file)
    if not parts.is_dir():
        return
    remove_leftovers(parts)
    for path in parts.iterdir():
        if _PART.fullmatch(path.name) or path.stem == "whole":
            path.unlink()
    if not any(parts.iterdir()):
        shutil.rmtree(parts)


def _columns(num: int, chosen: Plan, classes: int) -> int:
    cycle = max(len(chosen.prompts), 1)
    if classes and chosen.classes != "random":
        cycle = classes if chosen.classes == "balanced" else len(chosen.classes)
    side = num**0.5
    columns = max(1, round(side / cycle)) * cycle if cycle <= 2 * side else round(side)
    return max(1, min(num, columns))
