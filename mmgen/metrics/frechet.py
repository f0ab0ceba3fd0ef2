"""Streaming Gaussian statistics of features, and the Fréchet distance between two Gaussians.

The Fréchet distance: Dowson and Landau, "The Fréchet distance between multivariate normal distributions" (1982), eq. 6;
its use on the features of images: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule..." (2017), eq. 6. On
Inception features it is the FID; on pixels, as at the end of this file, it is called FD-pixels and never FID.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import MmgenError

_BLOCK = 4096  # features that become float64 at a time


class StatisticsError(MmgenError):
    """Features that no mean or covariance can be taken of: too few, not finite, of the wrong size."""


@dataclass(frozen=True)
class Gaussian:
    """A mean float64 [D] and a covariance float64 [D, D], such as a reference file holds."""

    mean: Tensor
    covariance: Tensor


class GaussianStatistics:
    """The mean and covariance of features that come in batches, in float64 on the device of the features.

    Batches and processes are joined by the pairwise update of Chan, Golub and LeVeque (1979), which keeps the squares
    about the mean and so loses nothing where the mean is large against the spread. The order of the batches changes the
    result by rounding only.

    Attributes:
        count: how many features have been seen.
        scatter: float64 [D, D], the sum of (x - mean)(x - mean)^T; None before the first feature.
    """

    def __init__(self) -> None:
        self.count = 0
        self.scatter: Tensor | None = None
        self._mean: Tensor | None = None

    def update(self, features: Tensor | np.ndarray) -> None:
        """Adds features, floats [N, D]. Raises StatisticsError where one is not finite, or D differs from before."""
        features = torch.as_tensor(features).detach()
        if features.ndim != 2:
            raise StatisticsError(f"features must be [N, D], not of shape {list(features.shape)}")
        if not torch.isfinite(features).all():
            broken = int((~torch.isfinite(features)).any(1).sum())
            raise StatisticsError(f"{broken} of {len(features)} feature vectors hold a number that is not finite")
        for block in features.split(_BLOCK):
            block = block.to(torch.float64)
            if len(block):
                mean = block.mean(0)
                centred = block - mean
                self._join(len(block), mean, centred.T @ centred)

    def merge(self, other: GaussianStatistics) -> None:
        """Adds what other statistics have seen, for example those of another process."""
        if other.count:
            self._join(other.count, other._mean, other.scatter)

    @property
    def mean(self) -> Tensor:
        """Float64 [D]. Raises StatisticsError before the first feature."""
        if not self.count:
            raise StatisticsError("no features to take a mean of")
        return self._mean

    @property
    def covariance(self) -> Tensor:
        """The unbiased estimate (divided by N - 1, as in every FID code), float64 [D, D].

        Raises StatisticsError for fewer than 2 features.
        """
        if self.count < 2:
            raise StatisticsError(f"a covariance needs at least 2 samples, not {self.count}")
        return self.scatter / (self.count - 1)

    def _join(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if not self.count:
            self.count, self._mean, self.scatter = count, mean.clone(), scatter.clone()
            return
        if mean.shape != self._mean.shape:
            raise StatisticsError(f"features of {len(mean)} numbers cannot join features of {len(self._mean)}")
        total = self.count + count
        delta = mean.to(self._mean.device) - self._mean
        self._mean = self._mean + delta * (count / total)
        between = torch.outer(delta, delta) * (self.count * count / total)
        self.scatter = self.scatter + scatter.to(delta.device) + between
        self.count = total


def frechet_distance(a: Gaussian | GaussianStatistics, b: Gaussian | GaussianStatistics) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), in float64 on the CPU.

    S_a S_b has the eigenvalues of the symmetric S_a^(1/2) S_b S_a^(1/2), so two symmetric eigendecompositions do;
    singular covariances need no care. Rounding alone can make an eigenvalue or the distance negative: both are clipped
    at zero.

    Raises StatisticsError where the sizes differ, a covariance needs more samples, or a number is not finite.
    """
    mean_a, mean_b, cov_a, cov_b = (
        torch.as_tensor(x, dtype=torch.float64, device="cpu") for x in (a.mean, b.mean, a.covariance, b.covariance)
    )
    if mean_a.shape != mean_b.shape or cov_a.shape != cov_b.shape:
        raise StatisticsError(f"features of {len(mean_a)} and of {len(mean_b)} numbers cannot be compared")
    for part in (mean_a, mean_b, cov_a, cov_b):
        if not torch.isfinite(part).all():
            raise StatisticsError("a mean or covariance holds a number that is not finite")
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root @ cov_b @ root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(0.0, float(distance))


def pixel_features(images: Tensor | np.ndarray) -> Tensor:
    """The pixels as features: uint8 [N, C, H, W] to float64 [N, C*H*W] in [-1, 1]."""
    return _tensor(images).to(torch.float64).flatten(1) / 127.5 - 1


def pixel_statistics(images: Tensor | np.ndarray) -> GaussianStatistics:
    """The statistics of the pixels of images uint8 [N, C, H, W], which may be a memory-mapped array: read in blocks."""
    statistics = GaussianStatistics()
    for start in range(0, len(images), _BLOCK):
        statistics.update(pixel_features(images[start : start + _BLOCK]))
    return statistics


def fd_pixels(images_a: Tensor | np.ndarray, images_b: Tensor | np.ndarray) -> float:
    """The Fréchet distance between the pixels of two sets of images, uint8 [N, C, H, W] and [M, C, H, W].

    Cheap and without a network, for small images: the cost grows with the cube of C*H*W. It sees means and covariances
    of pixels only, so a low value is necessary for good images, not sufficient. Never to be called FID.
    """
    return frechet_distance(pixel_statistics(images_a), pixel_statistics(images_b))


def halves_distance(images: Tensor | np.ndarray, seed: int = 0) -> float:
    """FD-pixels between two disjoint random halves of images uint8 [N, C, H, W].

    The scale against which a model's figure is read: what real images of half the number are apart from real images.
    Raises StatisticsError for fewer than 4 images.
    """
    half = len(images) // 2
    if half < 2:
        raise StatisticsError(f"two halves need at least 4 images, not {len(images)}")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).numpy()
    first, second = np.sort(order[:half]), np.sort(order[half : 2 * half])  # sorted: a file on disk is read forwards
    return frechet_distance(*(_chosen_statistics(images, chosen) for chosen in (first, second)))


def _chosen_statistics(images: Tensor | np.ndarray, chosen: np.ndarray) -> GaussianStatistics:
    statistics = GaussianStatistics()
    for start in range(0, len(chosen), _BLOCK):
        block = chosen[start : start + _BLOCK]
        statistics.update(pixel_features(images[torch.from_numpy(block) if isinstance(images, Tensor) else block]))
    return statistics


def _tensor(images: Tensor | np.ndarray) -> Tensor:
    if isinstance(images, Tensor):
        return images
    return torch.from_numpy(np.array(images))  # a copy: torch warns about memory that it may not write to
