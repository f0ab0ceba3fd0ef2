"""How well images agree with their captions, by the embeddings of two towers: CLIP's score, the cosine, and retrieval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .towers import Towers

TOP = (1, 5, 10)  # k of R@k
_BATCH = 64  # texts at a time
_BLOCK = 1024  # images that are ranked at a time


@dataclass(frozen=True)
class Agreement:
    """Embeddings of length 1: images float32 [N, E], the M different captions [M, E], and the caption of each image, int64 [N]."""

    images: Tensor
    captions: Tensor
    own: Tensor

    @classmethod
    def of(cls, embedded: Sequence[tuple[np.ndarray, Tensor]], texts: Sequence[Tensor], captions: Sequence[str]) -> Agreement:
        """From (image numbers, embeddings) in any order, and the shares of the different captions, caption i in share i mod P."""
        order = np.argsort(np.concatenate([numbers for numbers, _ in embedded]))
        rows = torch.empty(sum(map(len, texts)), texts[0].shape[1])
        for share, part in enumerate(texts):
            rows[share :: len(texts)] = part
        number = {text: row for row, text in enumerate(different(captions))}
        return cls(torch.cat([part for _, part in embedded])[order], rows, torch.tensor([number[text] for text in captions]))

    def cosines(self) -> Tensor:
        """Of each image and its caption, float64 [N]."""
        return (self.images.double() * self.captions[self.own].double()).sum(1)

    def ranks(self) -> Tensor:
        """How many other captions agree with an image at least as well as its own, int64 [N]."""
        found = []
        for start in range(0, len(self.images), _BLOCK):
            rows, own = self.images[start : start + _BLOCK], self.own[start : start + _BLOCK, None]
            similar = rows @ self.captions.T
            found.append((similar >= similar.gather(1, own)).sum(1) - 1)
        return torch.cat(found)

    def clip_score(self) -> float:
        """The mean of 100 max(cos, 0), as torchmetrics and most tables have it.

        Hessel et al., "CLIPScore" (arXiv:2104.08718), multiply max(cos, 0) by 2.5: 0.025 of this.
        """
        return float(100 * self.cosines().clamp(min=0).mean())

    def retrieval(self) -> dict[str, float]:
        """R@k, the share of images whose own caption is among the k that agree best, and the mean cosine."""
        ranks = self.ranks()
        return {**{f"R@{k}": float((ranks < k).double().mean()) for k in TOP}, "cosine": float(self.cosines().mean())}


def different(captions: Sequence[str]) -> list[str]:
    """Each caption once, in the order in which they come."""
    return list(dict.fromkeys(captions))


def embedded_images(towers: Towers, images: Sequence[np.ndarray]) -> Tensor:
    """uint8 [3, H, W] each -> float32 [N, E] of length 1, on the CPU; in one batch where they are of one size."""
    batches = [np.stack(images)] if len({image.shape for image in images}) == 1 else [image[None] for image in images]
    return torch.cat([_normalised(towers.images(torch.from_numpy(np.ascontiguousarray(batch)))) for batch in batches])


def embedded_texts(towers: Towers, texts: Sequence[str]) -> Tensor:
    """float32 [M, E] of length 1, on the CPU."""
    batches = [list(texts[start : start + _BATCH]) for start in range(0, len(texts), _BATCH)]
    return torch.cat([_normalised(towers.texts(batch)) for batch in batches]) if batches else torch.empty(0, towers.width)


def _normalised(features: Tensor) -> Tensor:
    return F.normalize(features.float(), dim=1).cpu()
