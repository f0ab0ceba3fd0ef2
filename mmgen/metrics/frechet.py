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

    def update(self, features: Tensor | np.ndarray, weights: Tensor | np.ndarray | None = None) -> None:
        """Adds features, floats [N, D].

        With weights, integers [N] of at least 0, feature i counts weights[i] times, as if it were repeated: for a bootstrap.

        Raises StatisticsError where a feature is not finite, D differs from before, or the weights are none.
        """
        features = finite_features(features)
        if weights is not None:
            weights = _checked_weights(weights, features)
        for start in range(0, len(features), _BLOCK):
            block = features[start : start + _BLOCK].to(torch.float64)
            if weights is None:
                count, mean = len(block), block.mean(0)
                centred = block - mean
            else:
                times = weights[start : start + _BLOCK].to(torch.float64)
                count = int(times.sum())
                if count == 0:
                    continue
                mean = times @ block / count
                centred = (block - mean) * times.sqrt()[:, None]
            self._join(count, mean, centred.T @ centred)

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

    @property
    def is_singular(self) -> bool:
        """Whether N <= D: fewer features than D + 1, so that the covariance has a determinant of zero.

        Raises StatisticsError before the first feature.
        """
        return self.count <= len(self.mean)

    def __getstate__(self) -> dict:
        """Pickles with the tensors on the CPU: another process may not have this one's device."""
        return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in vars(self).items()}

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

    With S_a = A A^T and S_b = B B^T, the trace of (S_a S_b)^(1/2) is the sum of the singular values of A^T B: real by
    construction, whether the covariances are singular or not. Measured against features whose singular values give the
    sum directly, in units of (tr S_a tr S_b)^(1/2): right to 1e-9, mostly to 1e-12, at D = 2048, with 64 to 6144 features
    and spectra over up to 16 orders of magnitude. The worst case, eigenvalues that are real but below D eps in a
    covariance without a Cholesky factor, is (D eps)^(1/2), 7e-7. A covariance rounded to float32, as some files hold, is
    worth 1e-6 itself. Rounding can make the distance of equals negative: it is clipped at zero.

    Returns a number from 0 (the Gaussians are the same), without an upper end; its unit is that of the features, squared.
    Raises StatisticsError where the sizes differ, a covariance needs more samples or has negative eigenvalues, or a number
    is not finite.
    """
    mean_a, mean_b, cov_a, cov_b = (
        torch.as_tensor(x, dtype=torch.float64, device="cpu") for x in (a.mean, b.mean, a.covariance, b.covariance)
    )
    if mean_a.shape != mean_b.shape or cov_a.shape != cov_b.shape:
        raise StatisticsError(f"features of {len(mean_a)} and of {len(mean_b)} numbers cannot be compared")
    for part in (mean_a, mean_b, cov_a, cov_b):
        if not torch.isfinite(part).all():
            raise StatisticsError("a mean or covariance holds a number that is not finite")
    cross = _singular_value_sum(_root_product(cov_a, cov_b).numpy())
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(0.0, float(distance))


def _root_product(a: Tensor, b: Tensor) -> Tensor:
    """A^T B for some A A^T = a and B B^T = b, both float64 [D, D]; or a smaller matrix with the same singular values.

    Cholesky's factors serve where there are both: they keep small eigenvalues that are real, so their pivots need no
    threshold. Else, with a = V diag(w) V^T for the R eigenvalues w that are not zero, A = V w^(1/2) and A^T b A =
    w^(1/2) (V^T b V) w^(1/2): a factor of the inner matrix, [R, R], does for V^T B.
    """
    varying = (a.diagonal() > 0) & (b.diagonal() > 0)  # other features add nothing, and would stop Cholesky
    if not varying.all():
        a, b = a[varying][:, varying], b[varying][:, varying]
    (root_a, failed_a), (root_b, failed_b) = torch.linalg.cholesky_ex(a), torch.linalg.cholesky_ex(b)
    if not failed_a and not failed_b:
        return root_a.T @ root_b
    if not failed_a or 0 < failed_b < failed_a:  # a is to be singular, and of the lower rank (about where Cholesky failed)
        a, b = b, a
    values, vectors = _nonzero_eigenvalues(a)
    inner = vectors.T @ b @ vectors
    root, failed = torch.linalg.cholesky_ex(inner)
    if failed:
        inner_values, inner_vectors = _nonzero_eigenvalues(inner)
        root = inner_vectors * inner_values.sqrt()
    return values.sqrt()[:, None] * root


def _nonzero_eigenvalues(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """The R eigenvalues that are not zero, float64 [R], and their eigenvectors [D, R].

    Eigenvalues below D eps times the largest cannot be told from the rounding of zeros, of which a thousand would show.
    """
    values, vectors = np.linalg.eigh(covariance.numpy())  # NumPy's LAPACK is faster than torch's, on one thread and on two
    if len(values) and values[0] < -1e-3 * abs(values[-1]):
        raise StatisticsError(f"not a covariance: its eigenvalues go from {values[0]:.3g} to {values[-1]:.3g}")
    kept = values > len(values) * np.finfo(np.float64).eps * values.max(initial=0)
    return torch.from_numpy(values[kept]), torch.from_numpy(vectors[:, kept])


def _singular_value_sum(matrix: np.ndarray) -> float:
    """By the eigenvalues of the Gram matrix, in half the time, unless their rounding would show in the sum.

    An error of eps |G| in an eigenvalue is one of eps |G| / (2 s) in the singular value s, its root.
    """
    matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    squares = np.linalg.eigvalsh(matrix @ matrix.T) if matrix.size else np.zeros(0)
    if (squares > 0).all():
        values = np.sqrt(squares)
        if np.finfo(np.float64).eps * squares.max(initial=0) * (0.5 / values).sum() <= 1e-8 * values.sum():
            return float(values.sum())
    return float(np.linalg.svd(matrix, compute_uv=False).sum())


def finite_features(features: Tensor | np.ndarray) -> Tensor:
    """The features as a tensor, if they are [N, D] and finite. Raises StatisticsError if not."""
    features = torch.as_tensor(features).detach()
    if features.ndim != 2:
        raise StatisticsError(f"features must be [N, D], not of shape {list(features.shape)}")
    if not torch.isfinite(features).all():
        broken = int((~torch.isfinite(features)).any(1).sum())
        raise StatisticsError(f"{broken} of {len(features)} feature vectors hold a number that is not finite")
    return features


def _checked_weights(weights: Tensor | np.ndarray, features: Tensor) -> Tensor:
    weights = torch.as_tensor(weights, device=features.device)
    if weights.shape != features.shape[:1] or weights.is_floating_point() or bool((weights < 0).any()):
        raise StatisticsError(f"weights must be {len(features)} integers of at least 0, one for each feature vector")
    return weights


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

    The scale against which a model's score is read: what real images of half the number are apart from real images.
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
