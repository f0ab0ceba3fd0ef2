"""A first look at images, before any is decoded for training: how many, how large, how many classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import DataError
from .decode import open_image
from .image_source import CorruptImage
from .resolve import resolve

_LOOKED_AT = 32  # images, evenly spaced


@dataclass(frozen=True)
class Survey:
    images: int
    side: int  # median over some images of the shorter side, in pixels
    classes: int  # 0: no labels


def survey(name: str, **reading: Any) -> Survey:
    """`reading`: fields of `Reading`. Raises DataError where there is no such data set, or none of the images looked at can be opened."""
    source = resolve(name, **reading)
    sides = []
    for i in np.unique(np.linspace(0, source.length - 1, min(_LOOKED_AT, source.length)).astype(int)):
        try:
            with open_image(source.read(int(i))) as image:
                sides.append(min(image.size))
        except CorruptImage:  # training says what is wrong, or leaves it out
            continue
    if not sides:
        raise DataError(f"none of the first images of {name} can be opened: {source.description}")
    classes = 0 if source.labels is None else len(np.unique(source.labels))
    return Survey(source.length, int(np.median(sides)), classes)
