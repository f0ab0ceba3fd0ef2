"""What all layouts have in common: images that can be read one by one, still encoded, and their labels."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DataError
from ..system.files import read_parts

if TYPE_CHECKING:
    import pyarrow as pa
    from PIL import Image

MISSING = -1  # the label of an image that has none, as hub data sets write it
MOST_CLASSES = 1_000_000  # beyond it, the column holds identifiers, not classes


class CorruptImage(DataError):
    """One image cannot be read; the message says why, and whoever knows its name adds that."""


@dataclass(frozen=True)
class Reading:
    """How a data set is to be read: the options of the command line."""

    split: str = "train"
    subset: str | None = None  # one of several data sets side by side, as a repository's README or its folders name them
    revision: str | None = None  # branch, tag or commit, of the hub
    image_column: str | None = None  # None: the first that holds images
    label_column: str | None = None  # None: the first that holds classes
    caption_column: str | None = None  # None: the first of the usual names that holds texts
    captions: str | None = None  # a file of captions: COCO's JSON, or .jsonl, .csv, .parquet with file_name
    follow_links: bool = False  # also links that lead out of the folder


@dataclass(frozen=True)
class ImageSource:
    description: str  # one line: layout, number of images, columns, classes
    names: Callable[[int], str]  # how image i is called in messages: its path, or "row 17 of train-00000.parquet"
    length: int
    read: Callable[[int], bytes | Image.Image]  # image i, encoded where possible; safe to call from threads
    labels: np.ndarray | None  # int64 [N]
    class_names: list[str] | None
    fingerprint: str  # of what was found: paths, sizes, times, the content of small files, columns, split
    captions: Callable[[], pa.ListArray] | None = None  # reads the texts of each image: list<string> [N]; None: there are none


_SMALL = 1 << 16  # bytes: files up to here are read to tell an edit that changed neither size nor time
_MOST_SMALL = 1 << 30  # bytes of all such files
_SECOND = 10**9
_BLOCK = 1 << 16
_THREADS = 8
_AT_ONCE = 64  # files that a thread is given at a time


def fingerprint(layout: str, files: Iterable[Any], **choices: Any) -> str:
    """SHA-256 of a layout, the `identity` of its files, and what was chosen within them."""
    digest = hashlib.sha256(json.dumps([layout, choices], sort_keys=True).encode())
    files = list(files)
    for start in range(0, len(files), _AT_ONCE):
        digest.update(json.dumps(files[start : start + _AT_ONCE]).encode())
    return digest.hexdigest()


def identity(paths: Iterable[str | os.PathLike]) -> list[tuple[str, int, int, str]]:
    """(absolute path, size, modification time in ns, digest) of each file.

    The digest is of the content of small files, as long as all small ones together are not large; and of the start, middle
    and end of files whose time is a whole second, as some file systems and archives have it.
    """
    found = [(os.fspath(path), status.st_size, status.st_mtime_ns) for path in paths for status in [os.stat(path)]]
    few = sum(size for _, size, _ in found if size <= _SMALL) <= _MOST_SMALL

    def digest(file: tuple[str, int, int]) -> str:
        path, size, time = file
        if size <= _SMALL and few:
            starts = [0]
        elif time % _SECOND == 0:
            starts = [0, (size - _BLOCK) // 2, size - _BLOCK]
        else:
            return ""
        return hashlib.sha256(read_parts(path, starts, min(size, _BLOCK))).hexdigest()

    pieces = [found[start : start + _AT_ONCE] for start in range(0, len(found), _AT_ONCE)]
    with readable_files(), ThreadPoolExecutor(_THREADS) as threads:
        return [file for some in threads.map(lambda some: [(*file, digest(file)) for file in some], pieces) for file in some]


@contextlib.contextmanager
def readable_files() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror or error}") from error


def checked_labels(
    labels: np.ndarray, class_names: list[str] | None, names: Callable[[int], str]
) -> tuple[np.ndarray | None, list[str] | None]:
    """Labels int64 [N] in which -1 means missing -> (labels, class names); (None, None) if all of them are missing.

    Raises DataError, naming an image, where only some are missing, or a label is negative or beyond the class names.
    """
    missing = labels == MISSING
    if missing.all():  # the hub's way to write a test split
        return None, None
    if missing.any():
        first = int(missing.argmax())
        raise DataError(
            f"{int(missing.sum()):,} of {len(labels):,} images have no label (the first is {names(first)}): "
            "label them all or none, or take them out"
        )
    if labels.min() < 0:
        first = int((labels < 0).argmax())
        raise DataError(f"the label of {names(first)} is {labels[first]}: labels count from 0")
    bound = len(class_names) if class_names else MOST_CLASSES
    if labels.max() >= bound:
        first = int(labels.argmax())
        raise DataError(f"the label of {names(first)} is {labels[first]}, but there are at most {bound:,} classes")
    return labels, class_names


def _gaps(labels: np.ndarray, number: int) -> str:
    """Which class numbers have no images, for people."""
    empty = np.flatnonzero(np.bincount(labels, minlength=number) == 0)
    if not len(empty):
        return ""
    more = ", ..." if len(empty) > 5 else ""
    return f" ({len(empty):,} of them without images: {', '.join(map(str, empty[:5]))}{more})"


def summary(layout: str, length: int, labels: np.ndarray | None, class_names: list[str] | None, *notes: str) -> str:
    """One line about a source.

    >>> summary("class folders", 3, np.array([0, 1, 1]), ["cat", "dog"])
    'class folders: 3 images, 2 classes'
    """
    if labels is None:
        classes = "no labels"
    else:
        number = max(int(labels.max()) + 1, len(class_names or []))
        classes = f"{number:,} class" + ("" if number == 1 else "es") + _gaps(labels, number)
    return ", ".join([f"{layout}: {length:,} image" + ("" if length == 1 else "s"), classes, *notes])
