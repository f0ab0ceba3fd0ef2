"""Which files belong to which split, by their names alone, as data sets on the Hugging Face hub are laid out."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePosixPath

from ..errors import DataError, nearest

ALIASES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_CANONICAL = {alias: split for split, aliases in ALIASES.items() for alias in aliases}
_KEYWORD = re.compile(r"(?<![a-z])(" + "|".join(sorted(_CANONICAL, key=len, reverse=True)) + r")(?![a-z])")
_SHARD = re.compile(r"^(?P<prefix>.+)-(?P<index>\d{5})-of-(?P<total>\d{5})")


def canonical(name: str) -> str:
    """The usual name of a split: `val` -> `validation`. Other words stay as they are."""
    return _CANONICAL.get(name.lower(), name)


def split_of(name: str) -> str | None:
    """The split a file belongs to by its path below the data set's folder, None if the path does not say.

    >>> [split_of(n) for n in ("data/train-00000-of-00002.parquet", "val/0000.parquet", "extra-00000-of-00001.parquet")]
    ['train', 'validation', 'extra']
    """
    path = PurePosixPath(name)
    for part in (path.name, *reversed(path.parts[:-1])):  # the file's own name says most, then the nearest folder
        found = _KEYWORD.findall(part.lower())
        if found:
            return _CANONICAL[found[-1]]
    shard = _SHARD.match(path.name)
    return shard["prefix"] if shard else None


def select_split(names: Iterable[str], split: str, path: str) -> list[str]:
    """The names that belong to a split, sorted. Where no name says a split, all of them are `train`.

    Raises DataError where there is no such split, or where its files are several data sets side by side.
    """
    groups: dict[str | None, list[str]] = {}
    for name in sorted(names):
        groups.setdefault(split_of(name), []).append(name)
    unnamed = groups.pop(None, [])
    if not groups:
        groups["train"] = unnamed
    if canonical(split) not in groups:
        raise no_split(path, split, groups)
    chosen = groups[canonical(split)]
    _check_one_configuration(chosen, path)
    return chosen


def no_split(path: str, split: str, available: Iterable[str]) -> DataError:
    return DataError(f"{path} has no split {split!r}: {nearest(split, sorted(available))}")


def parts_missing(names: Iterable[str]) -> int:
    """How many files are missing from series that number themselves: 1 for `a-00000-of-00002` alone."""
    present: dict[tuple[str, str], set[str]] = {}
    for name in names:
        shard = _SHARD.match(name)
        if shard:
            present.setdefault((shard["prefix"], shard["total"]), set()).add(shard["index"])
    return sum(int(total) - len(indices) for (_, total), indices in present.items())


def _check_one_configuration(names: list[str], path: str) -> None:
    """Refuses `a/train.parquet` beside `b/train.parquet`: variants of a data set, not to be trained on together."""
    folders = sorted({str(PurePosixPath(n).parent) for n in names})
    files = [PurePosixPath(n).name for n in names]
    if len(folders) > 1 and len(set(files)) < len(files):
        raise DataError(f"{path} holds several data sets side by side ({', '.join(folders)}): give the path of one, or --subset")
