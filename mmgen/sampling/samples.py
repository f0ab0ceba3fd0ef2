"""What `model.sample` gives: images, and what is known of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ..errors import ConfigError, nearest

OUTPUTS = ("tensor", "pil", "numpy")


@dataclass(frozen=True)
class Samples:
    """Images in the order of their numbers, so that `samples.images[3]` has the label `samples.labels[3]`."""

    images: Tensor | list[Image.Image] | np.ndarray  # uint8 [N, C, H, W]; pictures; uint8 [N, H, W, C]
    labels: Tensor | None  # int64 [N]; None: the model knows no classes
    names: list[str] | None  # of the class of each image; None: classes have no names
    notes: tuple[str, ...]  # what to know of how they were drawn, a sentence each

    def __len__(self) -> int:
        return len(self.images)


def as_output(images: Tensor, output: str) -> Any:
    """uint8 [N, C, H, W] as a tensor, a list of PIL images, or a NumPy array [N, H, W, C]. Raises ConfigError."""
    check_output(output)
    if output == "tensor":
        return images
    pixels = images.permute(0, 2, 3, 1).numpy()
    if output == "numpy":
        return pixels
    if pixels.shape[-1] not in (1, 3):
        raise ConfigError(f"images of {pixels.shape[-1]} channels are no pictures: take output='tensor' or 'numpy'")
    return [Image.fromarray(one[..., 0] if one.shape[-1] == 1 else one) for one in pixels]


def check_output(output: str) -> None:
    """Raises ConfigError for an unknown word, before anything is drawn."""
    if output not in OUTPUTS:
        raise ConfigError(f"unknown output {output!r}: {nearest(str(output), OUTPUTS)}")
