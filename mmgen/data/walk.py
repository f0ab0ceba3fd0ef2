"""What files lie in a folder: found once, then shown to every layout that might recognise them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ..errors import DataError


def by_suffix(names: Iterable[str], most: int = 5) -> str:
    """How many files end in what: 3 .heic, 1 README."""
    paths = map(PurePosixPath, names)
    counted = Counter(path.suffix.lower() or path.name for path in paths).most_common()
    return ", ".join(f"{count:,} {ending}" for ending, count in counted[:most]) + ", ..." * (len(counted) > most)


class Listing(NamedTuple):
    folder: Path  # resolved
    names: list[str]  # paths below the folder, with slashes, sorted
    links_left_out: int = 0  # symbolic links that are broken, go round, or lead out of the folder

    def ending(self, *suffixes: str) -> list[str]:
        """The files that end in one of the suffixes (lower case)."""
        return [name for name in self.names if name.lower().endswith(suffixes)]

    @property
    def notes(self) -> list[str]:
        if not self.links_left_out:
            return []
        count, one = self.links_left_out, self.links_left_out == 1
        return [f"{count:,} link{'' if one else 's'} that lead{'s' * one} out of the folder, or nowhere, not followed (see --follow-links)"]


def walk(folder: Path, follow_links: bool = False) -> Listing:
    """Lists all files below a folder, except hidden ones. Raises DataError where a folder cannot be read.

    Symbolic links are followed as long as they stay in the folder, unless all are to be: data that was unpacked from
    somewhere must not pull in other files of this machine. A snapshot in the hub's cache is made of links into the cache,
    so there they may.
    """
    folder = folder.resolve()
    listing = _Walk(root=None if follow_links else _may_lead_to(folder))
    try:
        listing.visit(str(folder), "", ())
    except OSError as error:
        raise DataError(f"cannot read {error.filename or folder}: {error.strerror or error}") from error
    return Listing(folder, sorted(listing.names), listing.links_left_out)


def _may_lead_to(folder: Path) -> str:
    """The folder that links must stay in: .../datasets--user--name for .../datasets--user--name/snapshots/SHA."""
    for parent in folder.parents:
        if parent.name == "snapshots" and parent.parent.name.startswith("datasets--"):
            return str(parent.parent)
    return str(folder)


class _Walk:
    def __init__(self, root: str | None):
        self.root = root  # None: anywhere
        self.names: list[str] = []
        self.links_left_out = 0

    def visit(self, folder: str, below: str, ancestors: tuple[str, ...]) -> None:
        real = os.path.realpath(folder)
        if real in ancestors:  # a link to a folder that contains it
            self.links_left_out += 1
            return
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name == "__MACOSX":
                    continue
                if entry.is_symlink() and not self._stays(entry.path):
                    self.links_left_out += 1
                elif entry.is_dir():
                    self.visit(entry.path, f"{below}{entry.name}/", (*ancestors, real))
                elif entry.is_file():
                    self.names.append(below + entry.name)

    def _stays(self, path: str) -> bool:
        target = os.path.realpath(path)
        return os.path.exists(target) and (self.root is None or target.startswith(self.root.rstrip(os.sep) + os.sep))
