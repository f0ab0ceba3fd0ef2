"""Captions as conditions: which texts each image has, and what they became or become when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..networks.conditions import Text

if TYPE_CHECKING:
    import pyarrow as pa


class Ragged:
    """Features float16 of M texts of which only those under the mask are kept: arrays [T_i, D] one after the other.

    Indexed as an array [M, L, D] is, with zeros where the mask has none.
    """

    def __init__(self, arrays: Sequence[np.ndarray], mask: np.ndarray) -> None:
        """arrays: no text lies in two of them. mask: bool [M, L]."""
        self.arrays, self.mask = arrays, mask
        self.starts = np.cumsum([0, *(len(array) for array in arrays)])
        self.texts = np.concatenate([[0], np.cumsum(mask.sum(1, dtype=np.int64))])
        self.shape, self.dtype, self.ndim = (*mask.shape, arrays[0].shape[1]), arrays[0].dtype, 3
        if self.starts[-1] != self.texts[-1]:
            raise ValueError(f"{self.starts[-1]} tokens are there, and the mask says {self.texts[-1]}")

    def __len__(self) -> int:
        return len(self.mask)

    def __getitem__(self, numbers: np.ndarray) -> np.ndarray:
        """Of the texts int64 [n], copied: [n, L, D]."""
        found = np.zeros((len(numbers), *self.shape[1:]), self.dtype)
        begin, end = self.texts[numbers], self.texts[numbers + 1]
        which = np.searchsorted(self.starts, begin, side="right") - 1
        for i, (number, first, last, array) in enumerate(zip(numbers, begin, end, which, strict=True)):
            if last > first:
                found[i, self.mask[number]] = self.arrays[array][first - self.starts[array] : last - self.starts[array]]
        return found


@dataclass(frozen=True)
class Choices:
    """Which texts each of N images has."""

    first: np.ndarray  # int64 [N + 1]: where in `number` the captions of an image begin
    number: np.ndarray  # int64: the text of each caption

    @classmethod
    def of(cls, captions: pa.ListArray, number: np.ndarray) -> Choices:
        """`number`: the text of each caption of all images, in their order."""
        import pyarrow.compute as pc

        counts = pc.list_value_length(captions).to_numpy(zero_copy_only=False)
        return cls(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), number)

    def draw(self, rows: np.ndarray, draw: Tensor) -> np.ndarray:
        """The text of one caption each of the images `rows` [n], by uniform float64 draws [n] in [0, 1)."""
        begin, count = self.first[rows], np.diff(self.first)[rows]
        return self.number[begin + np.minimum((draw.numpy() * count).astype(np.int64), count - 1)]


@dataclass(frozen=True)
class EncodedCaptions:
    """What the captions of images became."""

    tokens: np.ndarray | Ragged  # of the M different texts: ids [M, L] or features float16 [M, L, D]
    mask: np.ndarray  # bool [M, L]
    pooled: np.ndarray | None  # float16 [M, P]
    choices: Choices
    empty: Text | None  # the null, one row
    cut: int = 0  # texts that were longer than the encoder takes
    sizes: np.ndarray | None = None  # int32 [N, 6] of the images, see `Text`

    def condition(self, rows: np.ndarray, draw: Tensor) -> Text:
        """One caption each of the images `rows` [n], by uniform float64 draws [n] in [0, 1)."""
        found = self.texts(self.choices.draw(rows, draw))
        return replace(found, sizes=sizes_of(self.sizes, rows), empty=self.empty)

    def texts(self, numbers: np.ndarray) -> Text:
        """Of the texts int64 [n], without a null."""

        def take(array: np.ndarray | Ragged) -> Tensor:
            found = torch.from_numpy(np.ascontiguousarray(array[numbers]))
            return found.float() if found.is_floating_point() else found

        tokens, pooled = take(self.tokens), None if self.pooled is None else take(self.pooled)
        return Text(tokens.long() if tokens.ndim == 2 else tokens, take(self.mask), pooled)

    def null(self) -> Text:
        """The encoding of no text, one row."""
        return self.empty


@dataclass(frozen=True)
class CaptionsOnTheFly:
    """Captions that are encoded whenever they are drawn."""

    texts: pa.StringArray  # of all captions, in the order of the images
    choices: Choices
    empty: Text  # the null, one row, on the device
    encode: Callable[[list[str]], Text]  # texts -> their condition, on the device
    cut: int = 0
    sizes: np.ndarray | None = None

    def condition(self, rows: np.ndarray, draw: Tensor) -> Text:
        """As that of `EncodedCaptions`, on the device."""
        text = self.encode([self.texts[int(number)].as_py() for number in self.choices.draw(rows, draw)])
        sizes = sizes_of(self.sizes, rows)
        return replace(text, sizes=None if sizes is None else sizes.to(text.tokens.device), empty=self.empty)

    def null(self) -> Text:
        return self.empty


def sizes_of(sizes: np.ndarray | None, rows: np.ndarray) -> Tensor | None:
    return None if sizes is None else torch.from_numpy(sizes[rows]).float()
