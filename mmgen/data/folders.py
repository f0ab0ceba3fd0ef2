"""Images as files: class folders, a flat folder, and EDM's layout (images and dataset.json) as a folder or a zip."""

from __future__ import annotations

import contextlib
import lzma
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ..errors import DataError, shortened
from ..system.files import parse_json, read_json
from .image_source import MISSING, MOST_CLASSES, CorruptImage, ImageSource, checked_labels, fingerprint, summary
from .splits import ALIASES, canonical, no_split
from .walk import Found, Listing

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
EDM_LABELS = "dataset.json"
MAX_ENTRY = 1 << 28  # bytes of one unpacked zip entry: more is no image of a training set
MOST_LABELS = 1 << 27  # bytes of dataset.json: four million images


def open_image_folder(listing: Listing, images: list[Found], split: str) -> ImageSource:
    """`class_a/x.png`, `train/class_a/x.png`, or images without classes. Classes are the folders, sorted by name.

    A single folder of images is no class: it says nothing about any image. Raises DataError.
    """
    place = listing.folder
    images, prefix = _of_split(images, split, str(place))
    parts = [PurePosixPath(image.name[len(prefix) :]).parts for image in images]
    folders = sorted({p[0] for p in parts if len(p) > 1})
    loose = next((i for i, p in enumerate(parts) if len(p) == 1), None)
    if folders and loose is not None:
        raise DataError(
            f"{place / prefix} holds images both directly ({images[loose].name}) and in folders ({folders[0]}): "
            "put each in the folder of its class, or all in one folder"
        )
    labels, class_names = None, None
    if len(folders) > 1:
        number = {folder: i for i, folder in enumerate(folders)}
        labels, class_names = np.array([number[p[0]] for p in parts], dtype=np.int64), folders
    notes = [f"split {canonical(split)}"] if prefix else []
    if listing.links_left_out:
        notes.append(f"{listing.links_left_out:,} links that lead out of the folder left out")
    layout = "image folder" if labels is None else "class folders"
    return ImageSource(
        description=summary(layout, len(images), labels, class_names, *notes),
        names=lambda i: str(place / images[i].name),
        length=len(images),
        read=lambda i: _read_file(place / images[i].name),
        labels=labels,
        class_names=class_names,
        fingerprint=fingerprint("folder", listing.identity(images), split=split),
    )


def open_edm_folder(listing: Listing, images: list[Found]) -> ImageSource:
    """A folder with dataset.json = {"labels": [[name, class], ...] or null}. Raises DataError."""
    place = listing.folder
    with _damaged_labels(str(place / EDM_LABELS)):
        listed = _labels_of(read_json(place / EDM_LABELS, MOST_LABELS))
    labels_file = [f for f in listing.files if f.name == EDM_LABELS]
    return _edm_source(
        "EDM folder",
        [image.name for image in images],
        listed,
        place,
        read=lambda i: _read_file(place / images[i].name),
        identity=fingerprint("EDM folder", listing.identity(images + labels_file)),
    )


def open_edm_zip(path: Path) -> ImageSource:
    """A zip of images, with EDM's dataset.json or without any labels. Raises DataError."""
    try:
        archive = zipfile.ZipFile(path)  # stays open: threads read from it, each with its own position
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as error:
        raise DataError(f"cannot read {path} (is the download complete?): {shortened(error)}") from error
    entries: dict[str, zipfile.ZipInfo] = {}
    for entry in archive.infolist():
        if entry.filename.endswith("/"):
            continue
        _check_entry(entry, entry.filename, path)
        if entry.filename in entries:
            raise DataError(f"{path} holds two entries {shortened(entry.filename)}: nothing says which is meant, pack it anew")
        entries[entry.filename] = entry
    images = sorted(name for name in entries if name.lower().endswith(IMAGE_SUFFIXES) and "__MACOSX" not in name)
    if not images:
        latents = any(name.endswith(".npy") for name in entries)
        what = "latents (.npy), not images" if latents else "no images: unpack it and give the folder"
        raise DataError(f"{path} holds {what}")

    def read(name: str) -> bytes:
        try:
            return archive.read(entries[name])
        except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, ValueError) as error:
            raise CorruptImage(shortened(error)) from error
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror or error}") from error

    listed = None
    if EDM_LABELS in entries:
        with _damaged_labels(f"{EDM_LABELS} of {path}"):
            listed = _labels_of(parse_json(read(EDM_LABELS)))
    status = path.stat()
    identity = fingerprint("EDM zip", [(str(path), status.st_size, status.st_mtime_ns)])
    return _edm_source("EDM zip", images, listed, path, read=lambda i: read(images[i]), identity=identity)


def is_edm_folder(listing: Listing) -> bool:
    """Whether dataset.json lies there and is EDM's: other programs use the name too."""
    if not any(f.name == EDM_LABELS for f in listing.files):
        return False
    try:
        content = read_json(listing.folder / EDM_LABELS, MOST_LABELS)
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and "labels" in content


def _edm_source(
    layout: str,
    images: list[str],
    listed: dict[str, int] | None,
    place: Path,
    read: Callable[[int], bytes],
    identity: str,
) -> ImageSource:
    def name(i: int) -> str:
        return f"{images[i]} of {place.name}"

    labels = None
    if listed is not None:
        labels, _ = checked_labels(np.array([listed.get(i, MISSING) for i in images], dtype=np.int64), None, name)
    return ImageSource(
        description=summary(layout, len(images), labels, None),
        names=name,
        length=len(images),
        read=read,
        labels=labels,
        class_names=None,
        fingerprint=identity,
    )


@contextlib.contextmanager
def _damaged_labels(place: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f'{place} is not {{"labels": [[name, class], ...]}}: {shortened(error)}') from error


def _labels_of(content: Any) -> dict[str, int] | None:
    """What dataset.json holds -> label of each name, None where it has none. Raises ValueError, KeyError or TypeError."""
    if content["labels"] is None:
        return None
    listed = {name: label for name, label in content["labels"]}
    for name, label in listed.items():
        if type(label) is not int or abs(label) > MOST_CLASSES:  # EDM allows vectors; bool is an int to isinstance
            raise ValueError(f"the label of {shortened(name)} is {shortened(label)}, not an integer class")
    return listed


def _check_entry(entry: zipfile.ZipInfo, name: str, path: Path) -> None:
    parts = PurePosixPath(name.replace("\\", "/"))
    if not parts.parts or parts.is_absolute() or ".." in parts.parts or ":" in parts.parts[0]:
        raise DataError(f"{path} holds an entry {shortened(name)} that leads out of it: it was made to do harm, or is damaged")
    if entry.flag_bits & 1:
        raise DataError(f"{path} is encrypted: unpack it and give the folder")
    if entry.file_size > (MAX_ENTRY if name != EDM_LABELS else MOST_LABELS):
        what = "image" if name != EDM_LABELS else "list of labels"
        raise DataError(f"{path} holds an entry {shortened(name)} of {entry.file_size:,} bytes: that is no {what}")


def _of_split(images: list[Found], split: str, place: str) -> tuple[list[Found], str]:
    """The images below the folder of a split, and that folder's name with a slash; all, and "", where there are none.

    Folders are splits if one is called train, or all are called like splits: a class may be called test.
    """
    folders = sorted({image.name.split("/")[0] for image in images if "/" in image.name})
    splits = {canonical(folder): folder for folder in folders if canonical(folder) in ALIASES}
    if not splits or ("train" not in splits and len(splits) < len(folders)):
        splits = {}
    if not splits and canonical(split) != "train":
        raise no_split(place, split, ["train"])
    if not splits:
        return images, ""
    if canonical(split) not in splits:
        raise no_split(place, split, splits)
    prefix = splits[canonical(split)] + "/"
    return [image for image in images if image.name.startswith(prefix)], prefix


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
