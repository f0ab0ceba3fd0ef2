"""The Kernel Inception Distance: the squared maximum mean discrepancy between two sets of features.

Bińkowski, Sutherland, Arbel and Gretton, "Demystifying MMD GANs" (ICLR 2018, arXiv:1801.01401), with its
polynomial kernel k(x, y) = (x.y / D + 1)^3 and the unbiased estimator.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from .frechet import StatisticsError, finite_features

_BLOCK = 4096  # features that become float64 at a time


@dataclass(frozen=True)
class KernelDistance:
    """The mean over subsets and how well it is known.

    Attributes:
        mean: an unbiased estimate, so it scatters about zero, also below it, where the distributions are the same. No
            upper end. Papers print it times 1000 as often as not.
        standard_error: the standard deviation over subsets, divided by the root of their number: what drawing more subsets
            would still change. What papers and other code print behind "±" is the deviation itself, root(subsets) times as
            large. Neither says what other images would change, because subsets of the same images overlap. None where
            there is one subset only.
        subsets: how many were averaged. 1 where the subset size is the number of both sets of features: every further
            subset would be the same one in another order.
        subset_size: the features of each set in a subset.
    """

    mean: float
    standard_error: float | None
    subsets: int
    subset_size: int


def kid(
    x: Tensor | np.ndarray, y: Tensor | np.ndarray, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> KernelDistance:
    """The Kernel Inception Distance between features x, floats [N, D], and y, floats [M, D]; computed on the CPU.

    Each subset is min(subset_size, N, M) features of each set, drawn without replacement; the draws depend on the seed
    and the sizes only. Inner products are taken of features about their common mean, in float32; all else is float64. The
    error was below 1e-10 of the mean of k, for features like Inception's (positive, mean 0.5) in subsets of 1000; the plain
    float32 computation is wrong by 1e-7. Memory: one float32 copy of the features.

    Raises StatisticsError for fewer than 2 features in a set, features of different sizes or ones that are not finite, and
    ConfigError for fewer than 1 subset or a subset size below 2.
    """
    if subsets < 1 or subset_size < 2:
        raise ConfigError(f"KID needs at least 1 subset of at least 2 features, not {subsets} of {subset_size}")
    x, y = finite_features(x).cpu(), finite_features(y).cpu()
    if x.shape[1] != y.shape[1]:
        raise StatisticsError(f"features of {x.shape[1]} and of {y.shape[1]} numbers cannot be compared")
    size = min(subset_size, len(x), len(y))
    if size < 2:
        raise StatisticsError(f"KID needs at least 2 samples in each set, not {len(x)} and {len(y)}")
    if size == len(x) == len(y):
        subsets = 1
    centre = (x.mean(0, dtype=torch.float64) + y.mean(0, dtype=torch.float64)) / 2
    x, y = _centred(x, centre), _centred(y, centre)
    discrepancy = _Discrepancy(size)
    generator = torch.Generator().manual_seed(seed)
    values = np.empty(subsets)
    for i in range(subsets):
        chosen_x, chosen_y = (torch.randperm(len(set_.rows), generator=generator)[:size].numpy() for set_ in (x, y))
        values[i] = discrepancy(x.chosen(chosen_x), y.chosen(chosen_y))
    error = float(values.std(ddof=1) / subsets**0.5) if subsets > 1 else None
    return KernelDistance(float(values.mean()), error, subsets, size)


@dataclass(frozen=True)
class _Centred:
    """Features as differences from a centre c: with x = c + u, x.y = u.v + (c.u + c.c / 2) + (c.v + c.c / 2).

    The first term is small and its rounding random; the others, which are neither, cost little in float64. Both are divided
    by D, and half of the kernel's 1 is added to each of the others.

    Attributes:
        rows: u / root(D), float32 [N, D].
        offsets: the other term, float64 [N].
    """

    rows: np.ndarray
    offsets: np.ndarray

    def chosen(self, indices: np.ndarray) -> _Centred:
        return _Centred(self.rows[indices], self.offsets[indices])


def _centred(features: Tensor, centre: Tensor) -> _Centred:
    count, dimension = features.shape
    result = _Centred(np.empty((count, dimension), np.float32), np.empty(count))
    for start in range(0, count, _BLOCK):
        difference = features[start : start + _BLOCK].to(torch.float64) - centre
        offsets = (difference @ centre + centre.square().sum() / 2) / dimension + 0.5
        result.rows[start : start + _BLOCK] = (difference / dimension**0.5).numpy()
        result.offsets[start : start + _BLOCK] = offsets.numpy()
    return result


class _Discrepancy:
    """The unbiased estimate of MMD^2 for sets of one size: the mean of k over pairs within each, less twice that across.

    Its buffers are kept from one subset to the next: getting their memory anew took as long as the sums.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.products = np.empty((size, size), np.float32)
        self.base, self.square = np.empty((size, size)), np.empty((size, size))

    def __call__(self, x: _Centred, y: _Centred) -> float:
        within = self._kernel_sum(x, x) + self._kernel_sum(y, y)
        return within / (self.size * (self.size - 1)) - 2 * self._kernel_sum(x, y) / self.size**2

    def _kernel_sum(self, x: _Centred, y: _Centred) -> float:
        """The sum of k over all pairs, without those of a feature with itself where y is x."""
        # NumPy's product does half the work where y is x, and torch's may have been set to round to bfloat16.
        np.matmul(x.rows, y.rows.T, out=self.products)
        np.add(self.products, y.offsets, out=self.base)
        self.base += x.offsets[:, None]
        if y is x:
            np.fill_diagonal(self.base, 0)
        np.multiply(self.base, self.base, out=self.square)
        return float(np.vdot(self.square, self.base))
