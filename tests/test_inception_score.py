"""The Inception Score against the plain computation over slices, in any order and from several processes."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from mmgen.metrics.frechet import StatisticsError
from mmgen.metrics.inception_score import InceptionScore


def probabilities(count: int, classes: int = 7, seed: int = 0) -> torch.Tensor:
    return (2 * torch.randn(count, classes, generator=torch.Generator().manual_seed(seed))).softmax(1)


def plain(p: np.ndarray, splits: int) -> tuple[float, float]:
    scores = []
    for k in range(splits):
        part = p[k * len(p) // splits : (k + 1) * len(p) // splits].astype(np.float64)
        divergences = [sum(a * np.log(a / q) for a, q in zip(row, part.mean(0)) if a > 0) for row in part]
        scores.append(np.exp(np.mean(divergences)))
    return float(np.mean(scores)), float(np.std(scores))


def score(p, splits=10, batch=32) -> InceptionScore:
    result = InceptionScore(len(p), splits)
    for indices in torch.randperm(len(p), generator=torch.Generator().manual_seed(1)).split(batch):
        result.update(indices, p[indices])
    return result


@pytest.mark.parametrize("count, splits", [(100, 10), (103, 10), (10, 3), (11, 11), (40, 1)])
def test_the_splits_are_slices_whatever_the_order(count, splits):
    p = probabilities(count)
    assert score(p, splits).result() == pytest.approx(plain(p.numpy(), splits), rel=1e-6)


def test_zero_probabilities_count_nothing():
    p = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0, 1, 0], [0.25, 0.75, 0]])
    assert score(p, 2).result() == pytest.approx(plain(p.numpy(), 2), rel=1e-12)


def test_the_ends_of_the_range():
    assert score(probabilities(1).expand(50, -1), 5).result() == pytest.approx((1, 0), abs=1e-12)
    assert score(torch.eye(8).repeat(10, 1), 5).result() == pytest.approx((8, 0), abs=1e-12)


def test_processes_and_pickles():
    p = probabilities(64)
    parts = []
    for rank in range(2):
        part = InceptionScore(64, 4)
        part.update(np.arange(rank, 64, 2), p[rank::2].numpy())
        parts.append(pickle.loads(pickle.dumps(part)))
    merged = pickle.loads(pickle.dumps(InceptionScore(64, 4)))
    merged.merge(InceptionScore(64, 4))
    for part in parts:
        merged.merge(part)
    assert merged.result() == pytest.approx(plain(p.numpy(), 4), rel=1e-6)
    assert int(parts[0].counts.sum()) == 32  # merging leaves the merged as they were
    with pytest.raises(StatisticsError, match="cannot be joined"):
        merged.merge(InceptionScore(64, 5))


def test_memory_does_not_grow():
    small, large = score(probabilities(100)), score(probabilities(3000))
    assert abs(len(pickle.dumps(large)) - len(pickle.dumps(small))) < 50


def test_refusals():
    with pytest.raises(StatisticsError, match="9 images are too few .* 10 splits"):
        score(probabilities(9)).result()
    with pytest.raises(StatisticsError, match="promised 20 images and given 0"):
        InceptionScore(20).result()
    result = InceptionScore(20)
    p = probabilities(20)
    result.update(torch.arange(10), p[:10])
    with pytest.raises(StatisticsError, match="promised 20 images and given 10"):
        result.result()
    result.update(torch.arange(5, 15), p[5:15])  # 20 in all, but some twice and some never
    with pytest.raises(StatisticsError, match="promised 20 images"):
        result.result()
    for indices, rows, message in [
        (torch.tensor([20]), p[:1], "from 0 to 19"),
        (torch.tensor([-1]), p[:1], "from 0 to 19"),
        (torch.tensor([0.5]), p[:1], "integers"),
        (torch.arange(2), p[:1], "one row an index"),
        (torch.arange(1), p[:1].log(), "softmax"),
        (torch.arange(1), p[:1] * 2, "softmax"),
        (torch.arange(1), p[:1] * float("nan"), "softmax"),
        (torch.arange(1), p[:1, :6] / p[:1, :6].sum(), "6 classes cannot join those of 7"),
    ]:
        with pytest.raises(StatisticsError, match=message):
            result.update(indices, rows)
    with pytest.raises(StatisticsError, match="at least 1 image and 1 split"):
        InceptionScore(0)
