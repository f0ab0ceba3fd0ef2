"""The Fréchet distance against closed forms, and the streaming statistics against the plain ones."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from mmgen.errors import MmgenError
from mmgen.metrics.frechet import (
    Gaussian,
    GaussianStatistics,
    StatisticsError,
    fd_pixels,
    frechet_distance,
    halves_distance,
    pixel_features,
)


def gaussian(mean, covariance) -> Gaussian:
    return Gaussian(torch.tensor(mean, dtype=torch.float64), torch.tensor(covariance, dtype=torch.float64))


def random_covariance(size: int, rank: int, seed: int) -> torch.Tensor:
    factor = torch.randn(size, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return factor @ factor.T


def statistics(*batches) -> GaussianStatistics:
    result = GaussianStatistics()
    for batch in batches:
        result.update(batch)
    return result


def features(count: int, size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, dtype=torch.float64, generator=generator)
    return torch.randn(count, size, dtype=torch.float64, generator=generator) @ mixing + torch.arange(size)


@pytest.mark.parametrize("m1, s1, m2, s2", [(0, 1, 3, 2), (1, 0, -1, 2), (5, 3, 5, 3), (0, 0, 0, 0)])
def test_one_dimension(m1, s1, m2, s2):
    distance = frechet_distance(gaussian([m1], [[s1**2]]), gaussian([m2], [[s2**2]]))
    assert distance == pytest.approx((m1 - m2) ** 2 + (s1 - s2) ** 2, abs=1e-12)


def test_commuting_covariances():
    basis, _ = torch.linalg.qr(random_covariance(6, 6, 0))
    a, b = torch.tensor([1.0, 2, 3, 0, 5, 0.1]).double(), torch.tensor([4.0, 0, 1, 2, 5, 7]).double()
    zero = torch.zeros(6, dtype=torch.float64)
    distance = frechet_distance(Gaussian(zero, (basis * a) @ basis.T), Gaussian(zero, (basis * b) @ basis.T))
    assert distance == pytest.approx(float((a.sqrt() - b.sqrt()).square().sum()), abs=1e-6)


def test_rank_one_covariances():
    # S1 = u u^T, S2 = v v^T: the product's only eigenvalue is (u.v)^2.
    u, v = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    zero = torch.zeros(5, dtype=torch.float64)
    distance = frechet_distance(Gaussian(zero, torch.outer(u, u)), Gaussian(zero, torch.outer(v, v)))
    assert distance == pytest.approx(float(u @ u + v @ v - 2 * (u @ v).abs()), abs=1e-6)


@pytest.mark.parametrize("rank", [8, 3])
def test_identical_is_zero_and_translation_is_its_square(rank):
    covariance = random_covariance(8, rank, 2)
    zero, shift = torch.zeros(8, dtype=torch.float64), torch.arange(8, dtype=torch.float64)
    assert frechet_distance(Gaussian(zero, covariance), Gaussian(zero, covariance)) == pytest.approx(0, abs=1e-6)
    distance = frechet_distance(Gaussian(zero, covariance), Gaussian(shift, covariance))
    assert distance == pytest.approx(float(shift @ shift), abs=1e-6)


def test_symmetric_in_its_arguments():
    a = Gaussian(torch.zeros(7, dtype=torch.float64), random_covariance(7, 7, 3))
    b = Gaussian(torch.ones(7, dtype=torch.float64), random_covariance(7, 9, 4))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)


def test_agrees_with_scipy():
    linalg = pytest.importorskip("scipy.linalg")
    a, b = random_covariance(20, 30, 5), random_covariance(20, 30, 6)
    zero = torch.zeros(20, dtype=torch.float64)
    root = np.real(linalg.sqrtm(a.numpy() @ b.numpy()))
    expected = float(a.trace() + b.trace()) - 2 * np.trace(root)
    assert frechet_distance(Gaussian(zero, a), Gaussian(zero, b)) == pytest.approx(expected, rel=1e-9)


def from_features(x: torch.Tensor) -> Gaussian:
    centred = x - x.mean(0)
    return Gaussian(x.mean(0), centred.T @ centred / (len(x) - 1))


def exact_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """tr (S_a S_b)^(1/2) is the sum of the singular values of the centred X Y^T / root((N - 1)(M - 1)): no covariance."""
    a, b = ((z - z.mean(0)) / (len(z) - 1) ** 0.5 for z in (x, y))
    cross = torch.linalg.svdvals(a @ b.T).sum()
    return float((x.mean(0) - y.mean(0)).square().sum() + a.square().sum() + b.square().sum() - 2 * cross)


def spectral_features(count: int, variances: torch.Tensor, seed: int) -> torch.Tensor:
    """Gaussian features with these variances along directions that are the same for every seed."""
    size = len(variances)
    basis, _ = torch.linalg.qr(random_covariance(size, size, 99))
    x = torch.randn(count, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x * variances.sqrt() @ basis.T


@pytest.mark.parametrize("spectrum", ["power", "exponential", "flat", "graded", "constant features"])
@pytest.mark.parametrize("counts", [(64, 64), (64, 400), (400, 64), (128, 129), (400, 300), (5, 130)])
def test_singular_and_badly_scaled_covariances(spectrum, counts):
    rank = torch.arange(1, 129, dtype=torch.float64)
    variances = {"power": 20 * rank**-1.5, "exponential": 100 * 10 ** (-rank / 8)}.get(spectrum, torch.ones_like(rank))
    x, y = (spectral_features(count, variances, seed) for seed, count in enumerate(counts))
    if spectrum == "graded":
        x, y = (z * 10 ** torch.linspace(-7, 1, 128, dtype=torch.float64) for z in (x, y))
    if spectrum == "constant features":  # which leave the other set's no Cholesky factor: small variances must survive that
        x = spectral_features(counts[0], 100 * 10 ** (-rank / 8), 0)
        x[:, ::5] = 1.5
    expected = exact_distance(x, y)
    # What rounding costs is in proportion to the traces, of which the distance is what does not cancel.
    scale = float(x.var(0).sum() * y.var(0).sum()) ** 0.5
    assert expected > 0.001 * scale
    assert frechet_distance(from_features(x), from_features(y)) == pytest.approx(expected, abs=1e-8 * scale)


@pytest.mark.parametrize("rank", [40, 20])
def test_closed_form_of_a_transported_gaussian(rank):
    # If S_b = T S_a T for a symmetric positive T, then T transports one to the other, and tr (S_a S_b)^(1/2) = tr(T S_a).
    scales = 10 ** torch.linspace(1, -7, 40, dtype=torch.float64)  # variances from 1e2 to 1e-14
    covariance = random_covariance(40, rank, 1) / 40 * torch.outer(scales, scales)
    transport = torch.rand(40, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) + 0.5
    moved = covariance * torch.outer(transport, transport)
    expected = float((covariance.diagonal() * (transport - 1).square()).sum())
    zero = torch.zeros(40, dtype=torch.float64)
    assert frechet_distance(Gaussian(zero, covariance), Gaussian(zero, moved)) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(Gaussian(zero, moved), Gaussian(zero, covariance)) == pytest.approx(expected, rel=1e-9)


def test_covariances_rounded_to_float32():
    variances = 20 * torch.arange(1, 129, dtype=torch.float64) ** -1.5
    x, y = spectral_features(64, variances, 0), spectral_features(90, variances, 1)
    a, b = (Gaussian(g.mean, g.covariance.float()) for g in (from_features(x), from_features(y)))
    assert frechet_distance(a, b) == pytest.approx(exact_distance(x, y), rel=1e-4)


def test_not_a_covariance():
    with pytest.raises(StatisticsError, match="eigenvalues go from -1 to 3"):
        frechet_distance(gaussian([0.0, 0], [[1.0, 2], [2, 1]]), gaussian([0.0, 0], [[1.0, 0], [0, 1]]))


def test_statistics_match_numpy():
    x = features(5000, 6)  # more than one block
    result = statistics(x)
    assert result.count == 5000
    np.testing.assert_allclose(result.mean, x.numpy().mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(result.covariance, np.cov(x.numpy(), rowvar=False), rtol=1e-11, atol=1e-11)


def test_merge_is_the_whole_in_any_order():
    x = features(301, 5)
    whole = statistics(x)
    parts = [statistics(part) for part in x.split([1, 100, 0, 200])]
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        merged = GaussianStatistics()
        for i in order:
            merged.merge(parts[i])
        assert merged.count == 301
        torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(merged.covariance, whole.covariance, rtol=1e-12, atol=1e-12)
    assert parts[1].count == 100  # merging leaves the merged as they were


def test_weights_are_repetitions():
    x = features(5000, 6)  # more than one block
    weights = torch.poisson(torch.ones(5000), generator=torch.Generator().manual_seed(3)).long()
    weights[:4096] *= torch.arange(4096) % 3  # and zeros
    result = GaussianStatistics()
    result.update(x, weights)
    repeated = statistics(x.repeat_interleave(weights, 0))
    assert result.count == repeated.count == int(weights.sum())
    torch.testing.assert_close(result.mean, repeated.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(result.covariance, repeated.covariance, rtol=1e-11, atol=1e-11)
    result.update(x.numpy(), np.zeros(5000, np.int64))
    assert result.count == repeated.count
    for wrong in (torch.ones(5000), torch.ones(4999, dtype=torch.int64), torch.full((5000,), -1)):
        with pytest.raises(StatisticsError, match="5000 integers of at least 0"):
            result.update(x, wrong)


def test_statistics_pickle_and_go_on():
    x = features(30, 4)
    copy = pickle.loads(pickle.dumps(statistics(x[:20])))
    copy.update(x[20:])
    torch.testing.assert_close(copy.covariance, statistics(x).covariance)
    empty = pickle.loads(pickle.dumps(GaussianStatistics()))
    empty.merge(copy)
    assert empty.count == 30


def test_is_singular():
    assert statistics(features(4, 4)).is_singular
    result = statistics(features(5, 4))
    assert not result.is_singular
    assert torch.linalg.matrix_rank(result.covariance) == 4
    with pytest.raises(StatisticsError, match="no features"):
        _ = GaussianStatistics().is_singular


def test_large_offset_loses_nothing():
    x = features(2000, 4)
    far = statistics(*(x + 1e6).split(64))
    torch.testing.assert_close(far.covariance, statistics(x).covariance, rtol=1e-8, atol=1e-8)
    # float32 features keep what float32 holds of them: the accumulation adds no error of its own.
    rounded = (x + 1e6).float()
    expected = np.cov(rounded.double().numpy() - 1e6, rowvar=False)
    np.testing.assert_allclose(statistics(*rounded.split(64)).covariance, expected, rtol=1e-8)


def test_refusals():
    with pytest.raises(StatisticsError, match="at least 2 samples, not 1"):
        _ = statistics(torch.zeros(1, 3)).covariance
    with pytest.raises(StatisticsError, match="no features"):
        _ = GaussianStatistics().mean
    with pytest.raises(StatisticsError, match="1 of 4 feature vectors"):
        statistics(torch.tensor([[0.0], [1], [float("nan")], [2]]))
    with pytest.raises(StatisticsError, match="cannot join"):
        statistics(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(StatisticsError, match=r"\[N, D\]"):
        statistics(torch.zeros(3))
    with pytest.raises(MmgenError, match="cannot be compared"):
        frechet_distance(statistics(torch.randn(5, 3)), statistics(torch.randn(5, 4)))
    with pytest.raises(MmgenError, match="not finite"):
        frechet_distance(gaussian([0.0], [[float("inf")]]), gaussian([0.0], [[1.0]]))


def test_a_broken_batch_leaves_the_statistics_as_they_were():
    result = statistics(torch.randn(4, 2))
    with pytest.raises(StatisticsError):
        result.update(torch.full((2, 2), float("inf")))
    assert result.count == 4


def test_pixels():
    images = torch.tensor([0, 255, 51, 204], dtype=torch.uint8).reshape(1, 1, 2, 2)
    torch.testing.assert_close(pixel_features(images), torch.tensor([[-1.0, 1.0, -0.6, 0.6]]).double())

    generator = torch.Generator().manual_seed(0)
    dark = torch.randint(0, 100, (400, 1, 3, 3), generator=generator).to(torch.uint8)
    bright = dark + 51
    assert fd_pixels(dark, bright) == pytest.approx(9 * 0.4**2, abs=1e-6)
    frozen = dark.numpy()
    frozen.flags.writeable = False  # as a memory-mapped cache is
    assert fd_pixels(frozen, bright) == pytest.approx(fd_pixels(dark, bright))

    scale = halves_distance(dark)
    assert 0 < scale < 0.1 * fd_pixels(dark, bright)
    assert scale == halves_distance(dark) == halves_distance(frozen) != halves_distance(dark, seed=1)
    with pytest.raises(StatisticsError, match="at least 4"):
        halves_distance(dark[:3])
