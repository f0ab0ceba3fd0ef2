"""Labels as people write them -> class numbers: values of any kind, lists of names, folders."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..errors import ConfigError, DataError, shortened
from ..system.files import parse_json
from .image_source import MISSING, MOST_CLASSES

_PART = re.compile(r"^\d{5,}/(img)?\d{5,}\.\w+$")  # EDM's and img2dataset's folders: so many images each, no classes
_FEW = 16  # texts that may all be different, and names of classes
_DEEPEST = 4  # folders that two ways of writing the same name may differ by
Labels = tuple[np.ndarray, "list[str] | None"]  # int64 [N] with MISSING, and the names of the classes


class NotClasses(ValueError):
    """Values that are no classes; the message says what they are."""


def classes_of(values: Sequence[Any], sure: bool = False) -> Labels:
    """Integers, texts, truth values, or lists that hold one class each, as numbers or as 0 0 1 0; None: missing.

    Texts are names of classes, numbered in their sorted order; unless it is `sure` that they are, most must occur more than
    once. Raises NotClasses.
    """
    known = [value for value in values if value is not None and value != ""]
    if not known:
        return np.full(len(values), MISSING), None
    first = shortened(known[0])
    if all(isinstance(value, str) for value in known):
        numbers = all(text.isdecimal() and len(text) < 19 for text in known)
        names = sorted(set(known), key=lambda name: (int(name) if numbers else 0, name))
        if len(names) > MOST_CLASSES or not sure and len(names) > max(_FEW, len(known) // 2):
            raise NotClasses(f"{len(names):,} different texts, the first {first}")
        number = {name: i for i, name in enumerate(names)}
        return np.array([MISSING if value in (None, "") else number[value] for value in values], dtype=np.int64), names
    if all(isinstance(value, (int, float)) and (value != value or abs(value) < 2**63 and value == int(value)) for value in known):
        missing = [value is None or value == "" or value != value for value in values]  # NaN is unlike itself
        return np.array([MISSING if no else int(value) for no, value in zip(missing, values)], dtype=np.int64), None
    if all(isinstance(value, list) for value in known):
        if all(len(value) == 1 for value in known):
            return classes_of([value[0] if value else None for value in values], sure)
        if len({len(value) for value in known}) == 1 and all(_one_hot(value) for value in known):
            return np.array([value.index(1) if value else MISSING for value in values], dtype=np.int64), None
        raise NotClasses(f"lists of several labels, the first {first}")
    raise NotClasses(f"values such as {first}")


def _one_hot(value: list) -> bool:
    return all(part in (0, 1) for part in value) and sum(value) == 1


def check_there(labels: np.ndarray | None, description: str) -> None:
    """Raises ConfigError where data that are asked for with their labels have none."""
    if labels is None:
        raise ConfigError(f"data.conditional needs class labels, and the data have none ({description}): leave labels out with --unconditional")


def edm_labels(content: bytes, path: str) -> list[tuple[str, int]] | None:
    """dataset.json = {"labels": [[name, class], ...]} or null. Raises DataError; KeyError where it is something else."""
    try:
        found = parse_json(content)
        if not isinstance(found, dict) or "labels" not in found:
            raise KeyError("labels")
        pairs = None if found["labels"] is None else [(name, label) for name, label in found["labels"]]
        for name, label in pairs or ():
            if not isinstance(name, str):
                raise TypeError(f"{shortened(name)} is no name")
            if type(label) is not int or abs(label) > MOST_CLASSES:  # EDM allows vectors; bool is an int to isinstance
                raise ValueError(f"the label of {shortened(name)} is {shortened(label)}, not an integer class")
        return pairs
    except (ValueError, TypeError) as error:
        raise DataError(f'{path} is not {{"labels": [[name, class], ...]}}: {shortened(error)}') from error


def rows_of(images: Sequence[str], listed: Sequence[str], path: str) -> tuple[list[list[int]], list[str]]:
    """Which rows of a list of names belong to each image, and notes on what does not match.

    Backslashes count as slashes. Where no name is an image's, the same names without their first folders are tried; they must
    then cover all images, each once.
    """
    listed, images = [_plain(name) for name in listed], [_plain(name) for name in images]
    notes = []
    found = _joined(images, listed)
    if not any(found):
        for total in range(1, 2 * _DEEPEST):
            for fewer in range(max(0, total - _DEEPEST), min(total, _DEEPEST) + 1):
                shorter = [_without(name, fewer) for name in images]
                other = _joined(shorter, [_without(name, total - fewer) for name in listed])
                if all(other) and len(set(shorter)) == len(shorter):
                    names = [listed[other[0][0]], images[0]]
                    return other, [f"{path} calls the first image {names[0]}, here it is {names[1]}"]
    matching = sum(map(bool, found))
    if matching < len(images) or sum(map(len, found)) < len(listed):
        known = set(images)
        stranger = next((name for name in listed if name not in known), None)
        left = next((name for name, rows in zip(images, found) if not rows), None)
        notes.append(f"{path} lists {len(listed):,} names, and {matching:,} of {len(images):,} images are among them")
        if stranger is not None:
            notes.append(f"the first name without an image is {shortened(stranger)}")
        if left is not None:
            notes.append(f"the first image without a name is {shortened(left)}")
    return found, notes


def one_label(rows: list[list[int]], labels: Sequence[Any], names: Callable[[int], str], path: str) -> list[Any]:
    """The label of each image, None where it has no row. Raises DataError where two rows contradict each other."""
    for i, own in enumerate(rows):
        if any(labels[row] != labels[own[0]] for row in own):
            both = " and ".join(shortened(labels[row]) for row in own[:2])
            raise DataError(f"{path} gives {names(i)} two labels, {both}: take out the wrong one")
    return [labels[own[0]] if own else None for own in rows]


def _plain(name: str) -> str:
    return name.replace("\\", "/").removeprefix("./")


def _without(name: str, folders: int) -> str | None:
    parts = name.split("/")
    return "/".join(parts[folders:]) if folders < len(parts) else None


def _joined(images: list[str | None], listed: list[str | None]) -> list[list[int]]:
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(listed):
        if name is not None:
            rows.setdefault(name, []).append(row)
    return [rows.get(name, []) if name is not None else [] for name in images]


def folder_classes(names: list[str], path: str) -> tuple[np.ndarray | None, list[str] | None, list[str]]:
    """(labels, class names, notes) of images in the folders of their classes; folders that hold everything are passed over.

    A single folder of images is no class: it says nothing about any image. Nor are numbered parts. Raises DataError.
    """
    parts = [[part for part in name.split("/") if part not in ("", ".")] for name in names]
    depth = 0
    while all(len(p) > depth + 1 for p in parts) and len({p[depth] for p in parts}) == 1:
        depth += 1
    folders = sorted({p[depth] for p in parts if len(p) > depth + 1})
    loose = next((name for name, p in zip(names, parts) if len(p) == depth + 1), None)
    if folders and loose is not None:
        raise DataError(
            f"{path} holds images both directly ({loose}) and in folders ({folders[0]}): "
            "put each in the folder of its class, or all in one folder"
        )
    if not folders:
        return None, None, []
    if all(_PART.match("/".join(p[-2:])) for p in parts):
        return None, None, [f"folders {folders[0]} to {folders[-1]} are parts, not classes"]
    number = {folder: i for i, folder in enumerate(folders)}
    return np.array([number[p[depth]] for p in parts], dtype=np.int64), folders, []
