"""What `--data` means: the embedded digits, a path, a name in $MMGEN_DATA_DIR, or a data set of the hub."""

from __future__ import annotations

import os
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError, nearest, shortened
from ..models.missing_run import missing_run
from ..system.files import at_home, exists
from . import hub
from .image_source import ImageSource, Reading, fingerprint
from .latents import is_latents, source_of
from .captions import captions_of
from .digits import captions, read_digits
from .sources import open_source
from .splits import canonical, no_split

DIGITS = "digits"
SHORT_NAMES = {"cifar10": "uoft-cs/cifar10"}  # words that stand for a data set of the hub
_NAME = re.compile(r"^\w[\w.-]*$")
_HUB_ID = re.compile(r"^\w[\w.-]*/\w[\w.-]*$")


def resolve(name: str, **options: Any) -> ImageSource:
    """Finds the data set that `name` means, without decoding it; `options` are the fields of `Reading`. The first that is there:

    1. `digits`: comes with mmgen (a folder of that name is `./digits`);
    2. `cifar10`: continues as `uoft-cs/cifar10`;
    3. an existing file or folder;
    4. `user/name` or `name` below $MMGEN_DATA_DIR (of `user/name` also `name` alone);
    5. `user/name` in the hub's cache, else on the hub.

    Raises DataError, in one sentence that says where it looked.
    """
    reading = Reading(**options)
    if name == DIGITS:
        return open_digits(reading)
    looked = []
    full_name = SHORT_NAMES.get(name, name)
    for path in _paths(name, full_name):
        if exists(path):
            if is_latents(path):
                raise DataError(f"{path} holds latents, not images: give the images that they came from, {source_of(path)}")
            if reading.revision is None:
                return open_source(path, **options)
            if not _HUB_ID.match(full_name):
                what = f"{path} is on this machine, only the hub has revisions"
                raise DataError(f"--revision {reading.revision}: {what}: leave it out")
        looked.append(str(path))
    if (missing := missing_run(name)) is not None:
        raise DataError(missing)
    if _HUB_ID.match(full_name):
        folder, notes = hub.fetch(full_name, reading, looked)
        source = open_source(folder, **options)
        return replace(source, description=", ".join([source.description, *notes]))
    if _NAME.match(name):
        known = [DIGITS, *SHORT_NAMES, *_names_in(_data_dir())]
        raise DataError(f"no data set {shortened(name)}: {nearest(name, known)}; or give a path, or user/name of the hub")
    raise DataError(f"there is no file or folder {name if name.isprintable() and len(name) < 1000 else shortened(name)}")


def locate(name: str) -> str:
    """Where the data set of a name lies, whatever folder one stands in: an absolute path, or the name itself where it is one
    that means the same everywhere (`digits`, a data set of the hub)."""
    if name == DIGITS:
        return name
    full_name = SHORT_NAMES.get(name, name)
    return next((str(path.absolute()) for path in _paths(name, full_name) if exists(path)), full_name)


def find_latents(name: str) -> Path | None:
    """The folder of latents that `name` means, a path or a name in $MMGEN_DATA_DIR; None where it means something else."""
    if name == DIGITS:
        return None
    path = next((path for path in _paths(name, SHORT_NAMES.get(name, name)) if exists(path)), None)
    return path if path is not None and is_latents(path) else None


def open_digits(reading: Reading = Reading()) -> ImageSource:
    """The digits in digits.npz as 8x8 grey images. Raises DataError for any way of reading them but one."""
    from PIL import Image

    if canonical(reading.split) != "train":
        raise no_split(DIGITS, reading.split, ["train"])
    for field in fields(reading):
        if field.name not in ("split", "follow_links") and getattr(reading, field.name) is not None:
            option = field.name.replace("_", "-")
            raise DataError(f"digits has no columns, subsets or revisions: leave --{option} out")
    values, labels = read_digits()
    images = np.round(values * (255 / 16)).astype(np.uint8)  # 0..16 -> 0..255
    return ImageSource(
        description=f"UCI handwritten digits: {len(images):,} images, 10 classes",
        names=lambda i: f"digit {i}",
        length=len(images),
        read=lambda i: Image.fromarray(images[i]),
        labels=labels,
        class_names=[str(digit) for digit in range(10)],
        fingerprint=fingerprint(DIGITS, []),
        captions=lambda: captions_of(captions(values, labels)),
    )


def _paths(name: str, full_name: str) -> list[Path]:
    """Where a name may lie on this machine, most specific first."""
    paths = [] if name in SHORT_NAMES else [at_home(name)]
    folder = _data_dir()
    if folder is not None and (_HUB_ID.match(full_name) or _NAME.match(full_name)):
        paths += [folder / full_name, folder / full_name.split("/")[-1]]
    return list(dict.fromkeys(paths))


def _data_dir() -> Path | None:
    folder = os.environ.get("MMGEN_DATA_DIR")
    return at_home(folder) if folder else None


def _names_in(folder: Path | None) -> list[str]:
    if folder is None or not folder.is_dir():
        return []
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and _NAME.match(p.name))
