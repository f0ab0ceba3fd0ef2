"""Captions that are encoded already: which texts each image has, and what they became."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..networks.conditions import Text


@dataclass(frozen=True)
class EncodedCaptions:
    """What the captions of N images become. The last of the different texts is "", the null."""

    tokens: np.ndarray  # of the M different texts: ids [M, L] or features float16 [M, L, D]
    mask: np.ndarray  # bool [M, L]
    pooled: np.ndarray | None  # float16 [M, P]
    first: np.ndarray  # int64 [N + 1]: where in `number` the captions of an image begin
    number: np.ndarray  # int64: the text of each caption
    cut: int = 0  # texts that were longer than the encoder takes

    def condition(self, rows: np.ndarray, draw: Tensor) -> Text:
        """One caption each of the images `rows` [n], by uniform float64 draws [n] in [0, 1)."""
        begin, count = self.first[rows], np.diff(self.first)[rows]
        chosen = begin + np.minimum((draw.numpy() * count).astype(np.int64), count - 1)
        return self._texts(self.number[chosen], empty=self.null())

    def null(self) -> Text:
        """The encoding of "", one row."""
        return self._texts(np.array([len(self.tokens) - 1]), None)

    def _texts(self, numbers: np.ndarray, empty: Text | None) -> Text:
        def take(array: np.ndarray) -> Tensor:
            found = torch.from_numpy(np.ascontiguousarray(array[numbers]))
            return found.float() if found.is_floating_point() else found

        pooled = None if self.pooled is None else take(self.pooled)
        return Text(take(self.tokens).long() if self.tokens.ndim == 2 else take(self.tokens), take(self.mask), pooled, empty=empty)
