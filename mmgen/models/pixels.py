"""Pixels in [-1, 1] and uint8, both ways."""

from __future__ import annotations

import torch
from torch import Tensor


def to_uint8(x: Tensor) -> Tensor:
    """Pixels in [-1, 1] to 0..255: x * 127.5 + 128, clipped, truncated, as behind the published FIDs. Any shape."""
    return (x * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def from_uint8(images: Tensor) -> Tensor:
    """uint8 to float32 in [-1, 1]: x / 127.5 - 1. Any shape."""
    return images.float() / 127.5 - 1
