"""The Kernel Inception Distance against clean-fid's, a plain double loop, and what an unbiased estimate must do."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmgen.errors import ConfigError
from mmgen.metrics.frechet import StatisticsError
from mmgen.metrics.kid import kid


def features(count: int, size: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    """Positive and skewed, as Inception's are: float32 [count, size], of mean about 0.5."""
    noise = torch.randn(count, size, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.softplus(noise - 0.7 + shift)


def plain(x: torch.Tensor, y: torch.Tensor) -> float:
    """Pair by pair, in Python's own floats."""

    def k(a, b):
        return (sum(p * q for p, q in zip(a, b)) / len(a) + 1) ** 3

    x, y = x.tolist(), y.tolist()
    within = sum(
        sum(k(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j) / len(s) / (len(s) - 1) for s in (x, y)
    )
    return within - 2 * sum(k(a, b) for a in x for b in y) / len(x) / len(y)


def whole(x: torch.Tensor, y: torch.Tensor) -> float:
    x, y = x.double(), y.double()
    k_x, k_y, k_xy = ((a @ b.T / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    n, m = len(x), len(y)
    return float((k_x.sum() - k_x.trace()) / n / (n - 1) + (k_y.sum() - k_y.trace()) / m / (m - 1) - 2 * k_xy.mean())


@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_pair_by_pair(shift):
    x, y = features(9, 6, 0), features(9, 6, 1, shift)
    result = kid(x, y)
    assert result.mean == pytest.approx(plain(x, y), abs=1e-6 * (1 + shift) ** 3)  # inner products in float32
    assert (result.standard_error, result.subsets, result.subset_size) == (None, 1, 9)


@pytest.mark.parametrize("count, size, shift", [(1000, 64, 0.0), (300, 2048, 0.02), (50, 10, 1.0)])
def test_agrees_with_clean_fid(count, size, shift):
    reference = pytest.importorskip("cleanfid.fid")
    x, y = features(count, size, 0), features(count, size, 1, shift)
    expected = reference.kernel_distance(x.double().numpy(), y.double().numpy(), num_subsets=1)
    assert kid(x, y).mean == pytest.approx(expected, rel=1e-5)
    assert kid(x.double().numpy(), y.numpy()).mean == pytest.approx(expected, rel=1e-5)


def test_a_mean_far_from_zero_costs_no_digits():
    x, y = features(200, 32, 0) + 30, features(200, 32, 1, 0.5) + 30
    assert kid(x, y).mean == pytest.approx(whole(x, y), rel=1e-6)  # of kernels near 7e8
    assert kid(x.half(), y.half()).mean == pytest.approx(whole(x.half(), y.half()), rel=1e-6)


def test_subsets_estimate_the_whole():
    x, y = features(400, 16, 0), features(900, 16, 1, 0.3)
    result = kid(x, y, subsets=60, subset_size=50)
    assert (result.subsets, result.subset_size) == (60, 50)
    assert abs(result.mean - whole(x, y)) < 4 * result.standard_error < 0.5 * result.mean
    # The standard error is the scatter of one subset over root(60).
    single = np.array([kid(x, y, subsets=1, subset_size=50, seed=seed).mean for seed in range(60)])
    assert result.standard_error == pytest.approx(single.std() / 60**0.5, rel=0.4)
    assert kid(x, y, subsets=1, subset_size=50).standard_error is None
    # The smaller set is the subset, the other is drawn from.
    assert kid(x, y, subsets=3).subset_size == 400 and kid(x, y, subsets=3).standard_error > 0


def test_unbiased_about_zero_for_the_same_distribution():
    values = np.array([kid(features(40, 8, 2 * s), features(40, 8, 2 * s + 1)).mean for s in range(200)])
    assert abs(values.mean()) < 3 * values.std() / 200**0.5
    assert (values < 0).mean() > 0.3


def test_the_seed_alone_draws():
    x, y = features(100, 8, 0), features(120, 8, 1)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = kid(x, y, subsets=5, subset_size=30)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    np.random.seed(3)
    assert kid(x, y, subsets=5, subset_size=30) == first
    assert kid(x, y, subsets=5, subset_size=30, seed=1).mean != first.mean


def test_refusals():
    x = features(5, 3, 0)
    with pytest.raises(StatisticsError, match="at least 2 samples in each set, not 5 and 1"):
        kid(x, x[:1])
    with pytest.raises(StatisticsError, match="of 3 and of 2 numbers"):
        kid(x, x[:, :2])
    with pytest.raises(StatisticsError, match="not finite"):
        kid(x, x / 0)
    for settings in ({"subsets": 0}, {"subset_size": 1}):
        with pytest.raises(ConfigError, match="at least 1 subset of at least 2"):
            kid(x, x, **settings)
