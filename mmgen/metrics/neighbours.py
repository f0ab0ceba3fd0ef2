"""Scores from nearest neighbours: precision and recall, density and coverage.

Kynkäänniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models" (2019, arXiv:1904.06991), eqs. 1
and 2; Naeem et al., "Reliable Fidelity and Diversity Metrics for Generative Models" (2020, arXiv:2002.09797), section 3.

Around each feature lies a ball that reaches to its k-th nearest neighbour among the others of its own set: itself is left
out by its place, so that a duplicate is a neighbour at distance 0. A feature on the surface is inside, as in the first
paper's eq. 1; the second paper's code takes it as outside. That matters for exact ties only, such as copies.

Squared distances come from inner products in float64, about the common mean. Their rounding, some 1e-15 of the squared
norms, would break ties: so each squared radius is made longer by 1e-12 of those.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .frechet import StatisticsError, finite_features

_BLOCK = 512  # rows of distances in memory
_TIE = 1e-12


@dataclass(frozen=True)
class NeighbourMetrics:
    """How much of each set of features lies within the other.

    Attributes:
        precision: the share of generated features inside at least one ball of the real ones; 0 to 1, more is better. It
            says how many of the images look real, and nothing about whether they are all the same.
        recall: the share of real features inside at least one ball of the generated ones; 0 to 1, more is better. It says
            how much of the variety of the real images there is, and grows with outliers, whose balls are large.
        density: in how many balls of the real features a generated one lies on average, divided by k; from 0, expected to
            be 1 where the distributions are the same, and above 1 where the images crowd where the real ones are dense. At
            most N / k.
        coverage: the share of the balls of real features in which there is a generated one; 0 to 1, more is better, and
            expected to be 1 - 2^-k where the distributions and the numbers of features are the same.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def neighbour_metrics(real: Tensor | np.ndarray, fake: Tensor | np.ndarray, k_pr: int = 3, k_dc: int = 5) -> NeighbourMetrics:
    """All four of features floats [N, D] and [M, D], with k_pr neighbours for the first two and k_dc for the others.

    Takes three products of the sets where one pair after the other takes five. Works on the device of the real features,
    which must have float64. Memory: one float64 copy of the features and a few times 512 x max(N, M) numbers.

    All depend on N and M, so compare at the same numbers only: papers use 10,000 or 50,000 of each set.

    Raises StatisticsError for fewer than k + 1 features in a set, features of different sizes, or ones that are not finite.
    """
    real, fake = _centred(real, fake)
    balls_pr, balls_dc = _squared_radii(real, "real", k_pr, k_dc)
    (balls_fake,) = _squared_radii(fake, "generated", k_pr)
    precise = torch.zeros(len(fake), dtype=torch.bool, device=real.device)
    recalled, inside = [], []
    for rows, squared in _squared_distances(real, fake):
        precise |= (squared <= balls_pr[rows, None]).any(0)
        recalled.append((squared <= balls_fake).any(1))
        inside.append((squared <= balls_dc[rows, None]).sum(1))
    return NeighbourMetrics(_share(precise), _share(torch.cat(recalled)), *_density_coverage(torch.cat(inside), len(fake), k_dc))


def precision_recall(real: Tensor | np.ndarray, fake: Tensor | np.ndarray, k: int = 3) -> tuple[float, float]:
    """(precision, recall) of features floats [N, D] and [M, D]: see NeighbourMetrics, and neighbour_metrics for the rest."""
    both = neighbour_metrics(real, fake, k, k)
    return both.precision, both.recall


def _density_coverage(inside: Tensor, fakes: int, k: int) -> tuple[float, float]:
    """From the number of generated features inside each real one's ball, int64 [N]."""
    return int(inside.sum()) / (k * fakes), _share(inside > 0)


def _share(hits: Tensor) -> float:
    return int(hits.sum()) / len(hits)


def _centred(real: Tensor | np.ndarray, fake: Tensor | np.ndarray) -> tuple[Tensor, Tensor]:
    """Both sets in float64 about their common mean, without which the inner products of nearby features lose digits."""
    real, fake = finite_features(real), finite_features(fake)
    if real.shape[1] != fake.shape[1]:
        raise StatisticsError(f"features of {real.shape[1]} and of {fake.shape[1]} numbers cannot be compared")
    if not len(real) or not len(fake):
        raise StatisticsError(f"no neighbours among {len(real)} real and {len(fake)} generated features")
    real, fake = (features.to(real.device, torch.float64) for features in (real, fake))
    centre = (real.mean(0) + fake.mean(0)) / 2
    return real - centre, fake - centre


def _squared_radii(features: Tensor, name: str, *ks: int) -> list[Tensor]:
    """For each k, the squared distance of each feature to its k-th nearest neighbour in the set, float64 [N]."""
    if min(ks) < 1 or len(features) <= max(ks):
        raise StatisticsError(f"{len(features)} {name} features are too few for {max(ks)} neighbours, or k is below 1")
    nearest = []
    for rows, squared in _squared_distances(features, features):
        squared.diagonal(rows.start).fill_(torch.inf)  # itself
        nearest.append(squared.topk(max(ks), largest=False).values)
    nearest = torch.cat(nearest)
    norms = features.square().sum(1)
    return [nearest[:, k - 1] + _TIE * (norms + nearest[:, k - 1]) for k in ks]


def _squared_distances(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yields rows of a, and their squared distances to all of b, float64 [<= 512, M]."""
    norms_a, norms_b = a.square().sum(1), b.square().sum(1)
    for start in range(0, len(a), _BLOCK):
        rows = slice(start, min(start + _BLOCK, len(a)))
        yield rows, torch.addmm(norms_b[None], a[rows], b.T, alpha=-2).add_(norms_a[rows, None])
