"""The captions of samples, for the CLIP score: a text file, a table, or files beside the images."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path

from ..errors import DataError
from ..system.files import at_home, parse_json
from .image_sets import ImageSet

TABLES = ("metadata.jsonl", "metadata.csv")  # as `datasets` reads them in a folder of images
_TEXT = ("text", "caption", "prompt")


def read_captions(images: ImageSet, file: Path | None = None) -> list[str]:
    """One caption an image, in the order of the images.

    `file`: a .txt with a line for each image in order, or a .jsonl or .csv with `file_name` and `text` (or `caption`,
    `prompt`). Without it, those that a model was drawn from, a folder's own metadata.jsonl or metadata.csv, NAME.txt beside each
    NAME.png, or NAME.npz.txt of NAME.npz. Raises DataError.
    """
    if images.captions is not None:  # whoever draws them has seen to the file
        return images.captions()
    if file is not None:
        return _from_file(images, file)
    folder = at_home(images.name)
    together = folder.with_name(folder.name + ".txt")
    if folder.is_file() and together.is_file():
        return _from_file(images, together)
    for name in TABLES if folder.is_dir() else ():
        if (folder / name).is_file():
            return _from_file(images, folder / name)
    beside = [Path(images.names(i)).with_suffix(".txt") for i in range(images.length)]
    if not beside[0].is_file():
        raise DataError(
            f"{images.name} has no captions: give --captions FILE, a .txt with a line an image, or a .jsonl (file_name, text)"
        )
    return [_read(one).strip() for one in beside]


def _from_file(images: ImageSet, file: Path) -> list[str]:
    suffix = file.suffix.lower()
    if suffix == ".txt":
        lines = _lines(file)
        if len(lines) != images.length:
            raise DataError(f"{file} has {len(lines):,} lines, and there are {images.length:,} images: one line an image")
        return lines
    if suffix not in (".jsonl", ".csv"):
        raise DataError(f"captions in {file}: only .txt, .jsonl and .csv are read")
    rows: Iterable[dict] = csv.DictReader(io.StringIO(_read(file), newline="")) if suffix == ".csv" else _json_lines(file)
    texts = {}
    for number, row in enumerate(rows, 1):
        text = next((row[key] for key in _TEXT if isinstance(row.get(key), str)), None)
        if text is None or not isinstance(row.get("file_name"), str):
            raise DataError(f"row {number} of {file} has no file_name, or no text, caption or prompt")
        texts[row["file_name"]] = text
    return [_find(texts, images.names(i), file) for i in range(images.length)]


def _find(texts: dict[str, str], name: str, file: Path) -> str:
    """The caption of the image called `name`, which may be a whole path."""
    parts = Path(name).parts
    for start in range(len(parts)):
        if (key := "/".join(parts[start:])) in texts:
            return texts[key]
    raise DataError(f"{file} has no caption for {name}")


def _json_lines(file: Path) -> list[dict]:
    try:
        rows = [parse_json(line) for line in _lines(file) if line.strip()]
    except ValueError as error:
        raise DataError(f"{file} is not JSON lines: {error}") from error
    if not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{file} must hold an object on each line")
    return rows


def _lines(file: Path) -> list[str]:
    """By line feeds alone: `str.splitlines` would cut a caption at any of Unicode's separators too."""
    return _read(file).removesuffix("\n").split("\n")


def _read(file: Path) -> str:
    try:
        return file.read_text("utf-8-sig")  # spreadsheets begin a file with a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {file}: {error}") from error
