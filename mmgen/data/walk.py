"""What files lie in a folder: found once, then shown to every layout that might recognise them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from ..errors import DataError


class Found(NamedTuple):
    name: str  # path below the folder, with slashes
    size: int
    mtime_ns: int


class Listing(NamedTuple):
    folder: Path  # resolved
    files: list[Found]  # sorted by name
    links_left_out: int  # symbolic links that are broken or lead out of the folder

    @classmethod
    def of_file(cls, path: Path, size: int, mtime_ns: int) -> Listing:
        """One file, as if it were alone in its folder."""
        return cls(path.parent, [Found(path.name, size, mtime_ns)], 0)

    def ending(self, *suffixes: str) -> list[Found]:
        """The files that end in one of the suffixes (lower case)."""
        return [f for f in self.files if f.name.lower().endswith(suffixes)]

    def identity(self, files: list[Found]) -> list[tuple[str, int, int]]:
        """What `fingerprint` takes."""
        return [(f"{self.folder}/{f.name}", f.size, f.mtime_ns) for f in files]


def walk(folder: Path) -> Listing:
    """Lists all files below a folder, except hidden ones. Raises DataError where a folder cannot be read.

    Symbolic links are followed as long as they stay in the folder: data that was unpacked from somewhere must not pull
    in other files of this machine. A snapshot in the hub's cache is made of links into the cache, so there they may.
    """
    folder = folder.resolve()
    listing = _Walk(root=_may_lead_to(folder))
    try:
        listing.visit(str(folder), "", ())
    except OSError as error:
        raise DataError(f"cannot read {error.filename or folder}: {error.strerror or error}") from error
    return Listing(folder, sorted(listing.files), listing.links_left_out)


def _may_lead_to(folder: Path) -> str:
    """The folder that links must stay in: .../datasets--user--name for .../datasets--user--name/snapshots/SHA."""
    for parent in folder.parents:
        if parent.name == "snapshots" and parent.parent.name.startswith("datasets--"):
            return str(parent.parent)
    return str(folder)


class _Walk:
    def __init__(self, root: str):
        self.root = root
        self.files: list[Found] = []
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
                    status = entry.stat()
                    self.files.append(Found(below + entry.name, status.st_size, status.st_mtime_ns))

    def _stays(self, path: str) -> bool:
        target = os.path.realpath(path)
        return os.path.exists(target) and target.startswith(self.root.rstrip(os.sep) + os.sep)
