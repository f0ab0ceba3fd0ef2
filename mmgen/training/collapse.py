"""Whether training has collapsed: samples that are all alike have little of the variance of the data.

The variance is that over the images at one pixel, averaged over the pixels: images that are all the same have none of it. It is
taken of samples that are drawn for previews and scores anyway.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..metrics.image_sets import ImageSet
from ..system.processes import ProcessGroup

LEAST = 0.1  # of the data's variance
_OF_DATA = 2000  # images that tell it


class Spread:
    """The variance over images at a pixel, averaged over the pixels; of images that come in batches, on several processes."""

    def __init__(self) -> None:
        self.count, self.sums, self.squares = 0, 0.0, 0.0

    def add(self, images: np.ndarray) -> None:
        """uint8 [N, C, H, W]."""
        values = np.asarray(images, dtype=np.float64)
        self.count += len(values)
        self.sums = self.sums + values.sum(0)
        self.squares = self.squares + (values**2).sum(0)

    def result(self, process_group: ProcessGroup = ProcessGroup()) -> float:
        """In grey levels squared, of the images of all processes, which all call this. 0 for no images."""
        parts = process_group.gather((self.count, self.sums, self.squares))
        count, sums, squares = (sum(values) for values in zip(*parts, strict=True))
        return float(np.mean(squares / count - (sums / count) ** 2)) if count else 0.0


def spread_of(images: Any) -> float:
    """The spread of images uint8 [N, C, H, W]."""
    spread = Spread()
    spread.add(np.asarray(images))
    return spread.result()


def spread_of_data(images: np.ndarray) -> float:
    """The spread of up to 2,000 images of a data set, evenly spaced in it."""
    return spread_of(images[np.linspace(0, len(images) - 1, min(_OF_DATA, len(images))).astype(int)])


def watched(images: ImageSet, spread: Spread) -> ImageSet:
    """The same images; `spread` sees those that are read, but for a first one that is read alone, to know its shape."""

    def read(start: int, stop: int, colour: bool) -> Any:
        found = images.read(start, stop, colour)
        if stop - start > 1:
            spread.add(found)
        return found

    return replace(images, read=read)


def report(log: Sequence[Mapping[str, Any]], images: int, ratios: Mapping[str, float], advice: str) -> dict[str, Any]:
    """For the log: "variance", the ratios; and a "warning" where the samples have too little of it, whatever the number of steps.

    At a run's first look there is none: then nothing may have been learnt yet.

    Args:
        log: its lines so far; those of earlier looks have "images" and "variance".
        images: seen now.
        ratios: number of steps -> the samples' variance, divided by the data's.
        advice: what helps the method, besides the settings that all have.
    """
    found: dict[str, Any] = {"variance": {count: round(ratio, 4) for count, ratio in ratios.items()}}
    best = max(ratios.values(), default=1.0)
    if best < LEAST and any("variance" in line and line["images"] < images for line in log):
        found["warning"] = (
            f"training has collapsed, or has not begun to learn: at {images:,} images the samples have {100 * best:.2g} % of the "
            "data's variance. Try a lower optimizer.lr, more optimizer.warmup_images, optimizer.grad_clip=1, "
            f"{advice}or train.precision=tf32, in another --out"
        )
    return found
