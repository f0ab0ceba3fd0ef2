"""Precision, recall, density and coverage against plain double loops, and cases worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmgen.metrics.frechet import StatisticsError
from mmgen.metrics.neighbours import neighbour_metrics, precision_recall


def squared(a, b) -> float:
    return float(((a - b) ** 2).sum())


def radius(points: np.ndarray, i: int, k: int) -> float:
    return sorted(squared(points[i], points[j]) for j in range(len(points)) if j != i)[k - 1]


def plain(real: np.ndarray, fake: np.ndarray, k_pr: int, k_dc: int) -> tuple[float, float, float, float]:
    """Loops over points: of integers, so that ties are exact ties."""

    def share(points, centres):
        balls = [(c, radius(centres, i, k_pr)) for i, c in enumerate(centres)]
        return np.mean([any(squared(p, c) <= r for c, r in balls) for p in points])

    inside = [[squared(f, r) <= radius(real, i, k_dc) for f in fake] for i, r in enumerate(real)]
    density, coverage = np.sum(inside) / k_dc / len(fake), np.mean(np.any(inside, 1))
    return share(fake, real), share(real, fake), density, coverage


def values(metrics) -> tuple[float, float, float, float]:
    return metrics.precision, metrics.recall, metrics.density, metrics.coverage


def grid(count: int, size: int, spread: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-spread, spread + 1, (count, size)).astype(np.float64)


@pytest.mark.parametrize("spread", [1, 3, 1000])  # from many ties and duplicates to none
@pytest.mark.parametrize("k_pr, k_dc", [(3, 5), (1, 2), (4, 4)])
def test_double_loops(spread, k_pr, k_dc):
    real, fake = grid(50, 3, spread, 0), grid(41, 3, spread, 1) * 1.0 + (spread > 1)
    if spread == 3:
        real[:6] = real[0]  # more copies than neighbours: a ball of radius 0
        fake[:2] = real[0]
        fake[2:8] = 3 * spread
    expected = plain(real, fake, k_pr, k_dc)
    assert 0 < min(expected)
    for scale in (1.0, 1 / 3):  # thirds are not exact: ties are, to rounding
        assert values(neighbour_metrics(real * scale, fake * scale, k_pr, k_dc)) == pytest.approx(expected, abs=1e-12)
        assert precision_recall(real * scale, fake * scale, k_pr) == pytest.approx(expected[:2], abs=1e-12)


def test_more_than_a_block():
    real, fake = grid(700, 6, 6, 0), grid(1100, 6, 6, 1)
    real[515:520] = real[3]  # copies across blocks
    within, across = (((real[:, None] - b) ** 2).sum(-1) for b in (real, fake))
    np.fill_diagonal(within, np.inf)
    inside = across <= np.sort(within, 1)[:, 4:5]
    found = neighbour_metrics(torch.from_numpy(real).float(), fake)
    assert (found.density, found.coverage) == pytest.approx((inside.sum() / 5500, inside.any(1).mean()))
    precise = (across <= np.sort(within, 1)[:, 2:3]).any(0)
    assert precision_recall(real, fake)[0] == pytest.approx(precise.mean())


def test_on_a_line():
    real = torch.tensor([[0.0], [1], [2], [10]])  # balls for k = 1: [-1, 1], [0, 2], [1, 3], [2, 18]
    fake = torch.tensor([[0.5], [2.5], [19], [-1], [18], [18.0001]])  # [-1, 2], [0.5, 4.5], [18.0001, 20], [-2.5, 0.5], ...
    assert precision_recall(real, fake, k=1) == (4 / 6, 3 / 4)
    # In the balls of the real: 0.5 in two, 2.5 in two, -1 and 18 on the edge of one each; 19 and 18.0001 in none.
    found = neighbour_metrics(real, fake, 1, 1)
    assert (found.density, found.coverage) == (6 / 6, 1.0)


def test_the_ends_of_the_range():
    real = torch.randn(80, 5, generator=torch.Generator().manual_seed(0))
    copies = neighbour_metrics(real, real.clone())
    assert (copies.precision, copies.recall, copies.coverage) == (1, 1, 1)
    assert copies.density == pytest.approx(6 / 5)  # each ball: its centre, and 5 neighbours up to the surface
    assert values(neighbour_metrics(real, real + 1000)) == (0, 0, 0, 0)
    collapsed = neighbour_metrics(real, real[:1].expand(20, -1))
    assert collapsed.precision == 1 and collapsed.recall == 1 / 80 and collapsed.density > 0 and collapsed.coverage < 0.5


def test_same_distribution():
    real, fake = torch.randn(2, 1500, 4, generator=torch.Generator().manual_seed(0))
    metrics = neighbour_metrics(real, fake)
    assert metrics.density == pytest.approx(1, abs=0.05)
    assert metrics.coverage == pytest.approx(1 - 2**-5, abs=0.02)


def test_far_from_zero_and_outliers_cost_no_digits():
    real, fake = torch.from_numpy(grid(60, 4, 3, 0)), torch.from_numpy(grid(60, 4, 3, 1))
    expected = plain(real.numpy(), fake.numpy(), 3, 5)
    assert values(neighbour_metrics(real.float() + 2**20, fake.float() + 2**20)) == pytest.approx(expected)
    for far in (real, fake):
        inlier = far[-1].clone()
        far[-1] = torch.tensor([3e6, 3e5, 3e4, 3e3])  # integers yet, so that the loops stay exact
        expected = plain(real.numpy(), fake.numpy(), 3, 5)
        assert values(neighbour_metrics(real, fake)) == pytest.approx(expected)
        far[-1] = inlier


def test_refusals():
    x = torch.randn(6, 3)
    with pytest.raises(StatisticsError, match="5 real features are too few for 5 neighbours"):
        neighbour_metrics(x[:5], x)
    with pytest.raises(StatisticsError, match="3 generated features are too few for 3 neighbours"):
        precision_recall(x, x[:3])
    with pytest.raises(StatisticsError, match="k is below 1"):
        precision_recall(x, x, k=0)
    with pytest.raises(StatisticsError, match="of 3 and of 2 numbers"):
        precision_recall(x, x[:, :2])
    with pytest.raises(StatisticsError, match="not finite"):
        neighbour_metrics(x, x / 0)
    with pytest.raises(StatisticsError, match="0 generated"):
        neighbour_metrics(x, x[:0])
