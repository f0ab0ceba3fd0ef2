"""What all layouts have in common: images that can be read one by one, still encoded, and their labels."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DataError

if TYPE_CHECKING:
    from PIL import Image

MISSING = -1  # the label of an image that has none, as hub data sets write it
MOST_CLASSES = 1_000_000  # beyond it, the column holds identifiers, not classes


class CorruptImage(DataError):
    """One image cannot be read; the message says why, and whoever knows its name adds that."""


@dataclass(frozen=True)
class ImageSource:
    description: str  # one line: layout, number of images, columns, classes
    names: Callable[[int], str]  # how image i is called in messages: its path, or "row 17 of train-00000.parquet"
    length: int
    read: Callable[[int], bytes | Image.Image]  # image i, encoded where possible; safe to call from threads
    labels: np.ndarray | None  # int64 [N]
    class_names: list[str] | None
    fingerprint: str  # of what was found: paths, sizes, times, columns, split; not of the content


def fingerprint(layout: str, files: Iterable[tuple[str, int, int]], **choices: Any) -> str:
    """SHA-256 of a layout, its files (absolute path, size, modification time in ns) and what was chosen within them."""
    digest = hashlib.sha256(json.dumps([layout, choices], sort_keys=True).encode())
    for file in files:
        digest.update(json.dumps(file).encode())
    return digest.hexdigest()


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
