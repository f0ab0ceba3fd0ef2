"""Files by name, wherever they lie: below a folder, in a zip, or in tars, each read on its own from any thread."""

from __future__ import annotations

import lzma
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ..errors import DataError, shortened
from ..system.files import read_bytes
from .image_source import CorruptImage, identity
from .walk import Listing

LISTS = ("dataset.json", "metadata.jsonl", "metadata.csv", "metadata.parquet")  # what may be as large as a list of all images
MAX_ENTRY = 1 << 28  # bytes of one unpacked entry of an archive: more is no image of a training set
MOST_LABELS = 1 << 27  # bytes of a list: four million images


@dataclass(frozen=True)
class Files:
    layout: str  # "folder", "zip" or "tars"
    path: Path
    names: list[str]  # sorted, with slashes
    read: Callable[[str], bytes]  # raises CorruptImage where one is damaged, DataError where none of them can be read
    called: Callable[[str], str]  # a name in messages
    identity: Callable[[Iterable[str]], list]  # of some of the files, for `fingerprint`
    inner: Callable[[str], str] = lambda name: name  # the name within the archive, where there are several
    notes: list[str] = field(default_factory=list)


def files_in_folder(listing: Listing) -> Files:
    path = listing.folder
    within = os.path.join(path, "")  # not Paths: making one takes as long as reading a small image

    def read(name: str) -> bytes:
        try:
            if name.endswith(LISTS) and (path / name).stat().st_size > MOST_LABELS:
                raise DataError(f"{path / name} is larger than {MOST_LABELS:,} bytes")
            return read_bytes(within + name)
        except OSError as error:
            raise DataError(f"cannot read {path / name}: {error.strerror or error}") from error

    return Files(
        layout="folder",
        path=path,
        names=listing.names,
        read=read,
        called=lambda name: str(path / name),
        identity=lambda names: identity([within + name for name in names]),
        notes=listing.notes,
    )


def files_in_zip(path: Path) -> Files:
    """The entries of a zip. Raises DataError where it is damaged, encrypted, or was made to do harm."""
    try:
        archive = zipfile.ZipFile(path)  # stays open: threads read from it, each with its own position
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as error:
        raise DataError(f"cannot read {path} (is the download complete?): {shortened(error)}") from error
    entries: dict[str, zipfile.ZipInfo] = {}
    for entry in archive.infolist():
        if entry.filename.endswith("/") or "__MACOSX" in entry.filename:
            continue
        _check_entry(entry, path)
        if entry.filename in entries:
            raise DataError(f"{path} holds two entries {shortened(entry.filename)}: nothing says which is meant, pack it anew")
        entries[entry.filename] = entry

    def read(name: str) -> bytes:
        try:
            return archive.read(entries[name])
        except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, ValueError) as error:
            raise CorruptImage(shortened(error)) from error
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror or error}") from error

    return Files(
        layout="zip",
        path=path,
        names=sorted(entries),
        read=read,
        called=lambda name: f"{name} of {path.name}",
        identity=lambda names: identity([path]),
    )


def _check_entry(entry: zipfile.ZipInfo, path: Path) -> None:
    name = entry.filename
    parts = PurePosixPath(name.replace("\\", "/"))
    harmless = parts.parts and not parts.is_absolute() and ".." not in parts.parts and ":" not in parts.parts[0]
    if not harmless or name.startswith("\\"):
        raise DataError(f"{path} holds an entry {shortened(name)} that leads out of it: it was made to do harm, or is damaged")
    if entry.flag_bits & 1:
        raise DataError(f"{path} is encrypted: unpack it and give the folder")
    if entry.file_size > (MOST_LABELS if parts.name in LISTS else MAX_ENTRY):
        raise DataError(f"{path} holds an entry {shortened(name)} of {entry.file_size:,} bytes: that is no image")


def files_in_tars(folder: Path, tars: list[str]) -> Files:
    """The members of tars, by their own index of (tar, offset, size). Only headers are read here. Raises DataError."""
    where: dict[str, tuple[int, int, int]] = {}
    prefix: dict[str, int] = {}  # length of the tar's own name in front of a member's
    paths = [folder / tar for tar in tars]
    for number, (tar, path) in enumerate(zip(tars, paths)):
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    archive.members = []  # tarfile would keep all of them
                    name = f"{tar}/{member.name.removeprefix('./').lstrip('/')}"
                    if not member.isreg() or "/." in name or "__MACOSX" in name:
                        continue
                    if name in where:
                        raise DataError(f"{path} holds two files {shortened(member.name)}: nothing says which is meant")
                    where[name], prefix[name] = (number, member.offset_data, member.size), len(tar) + 1
        except (OSError, tarfile.TarError, ValueError, EOFError, OverflowError) as error:
            raise DataError(
                f"{path} is not a whole tar archive ({shortened(error)}): download it again, or unpack it into folders of images"
            ) from error

    def read(name: str) -> bytes:
        number, offset, size = where[name]
        if size > MAX_ENTRY:
            raise CorruptImage(f"it has {size:,} bytes: that is no image")
        try:
            with open(paths[number], "rb") as file:
                file.seek(offset)
                content = file.read(size)
        except OSError as error:
            raise DataError(f"cannot read {paths[number]}: {error.strerror or error}") from error
        if len(content) < size:
            raise CorruptImage("the tar is cut short")
        return content

    return Files(
        layout="tars",
        path=paths[0] if len(paths) == 1 else folder,
        names=list(where),  # in the order in which they were packed
        read=read,
        called=lambda name: f"{name[prefix[name] :]} of {paths[where[name][0]].name}",
        identity=lambda names: identity(paths),
        inner=lambda name: name[prefix[name] :],
    )
