"""Two towers that embed images and texts in one space, as CLIP does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Towers:
    """Both towers, in float32.

    Attributes:
        name: of the network, for people.
        sha256: of its weights.
        is_clip: whether agreement by it may be called a CLIP score.
        width: E, of the embeddings.
        images: uint8 [N, 3, H, W] on any device -> [N, E].
        texts: N texts -> [N, E].
    """

    name: str
    sha256: str
    is_clip: bool
    width: int
    images: Callable[[Tensor], Tensor]
    texts: Callable[[list[str]], Tensor]
