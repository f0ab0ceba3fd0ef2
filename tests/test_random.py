"""Random numbers: SplitMix64 by an independent implementation, statistics, and independence of the batch."""

from __future__ import annotations

import math

import pytest
import torch

from mmgen.system.random import bits, keys, normal, torch_seed, uniform

GAMMA, MASK = 0x9E3779B97F4A7C15, 2**64 - 1


def mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def unsigned(x: torch.Tensor) -> list[int]:
    return [value & MASK for value in x.flatten().tolist()]


def test_words_are_those_of_splitmix64():
    """First outputs for seed 1234567, as published with the reference implementation."""
    words = unsigned(bits(torch.tensor([1234567]), (5,)))
    assert words[:3] == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert words == [mix((1234567 + i * GAMMA) & MASK) for i in range(1, 6)]


@pytest.mark.parametrize("seed, index, purpose", [(0, 0, 0), (42, 17, 2), (-1, 2**40, 104), (2**63, 5, 1)])
def test_keys_are_a_fixed_function(seed, index, purpose):
    """Written out in Python's integers: a change of the function would change everybody's samples."""
    word = mix((seed * GAMMA + purpose) & MASK)
    expected = mix((mix((word + index * GAMMA) & MASK) + 0xBF58476D1CE4E5B9) & MASK)
    assert unsigned(keys(seed, [index], purpose)) == [expected]


def test_values_follow_from_the_words():
    key = keys(7, range(50), 3)
    word = torch.tensor([[w >> 12 for w in unsigned(row)] for row in bits(key, (4,))], dtype=torch.float64)
    torch.testing.assert_close(uniform(key, (4,)), (word + 0.5) / 2**52, rtol=0, atol=0)
    pairs = [(w >> 32, w & 0xFFFFFFFF) for w in unsigned(bits(key, (2,)))]
    radius = [math.sqrt(-2 * math.log((high + 0.5) / 2**32)) for high, _ in pairs]
    angle = [2 * math.pi * low / 2**32 for _, low in pairs]
    cosine = torch.tensor([r * math.cos(a) for r, a in zip(radius, angle, strict=True)], dtype=torch.float64).reshape(50, 2)
    sine = torch.tensor([r * math.sin(a) for r, a in zip(radius, angle, strict=True)], dtype=torch.float64).reshape(50, 2)
    expected = torch.cat([cosine, sine], 1)
    torch.testing.assert_close(normal(key, (4,), torch.float64), expected, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(normal(key, (3,), torch.float64), expected[:, :3], rtol=1e-13, atol=1e-14)


def test_independent_of_the_batch():
    """Image 17 has the same numbers, bit for bit, alone and among others, in any order."""
    every, shape = normal(keys(5, range(40)), (3, 4, 4)), (3, 4, 4)
    assert torch.equal(normal(keys(5, [17]), shape), every[17:18])
    assert torch.equal(normal(keys(5, torch.tensor([30, 17, 2])), shape), every[[30, 17, 2]])
    split = torch.cat([uniform(keys(5, range(start, start + 10)), (7,)) for start in range(0, 40, 10)])
    assert torch.equal(split, uniform(keys(5, range(40)), (7,)))


def test_uniform_moments():
    """n = 400,000: a mean is known to 1 / sqrt(12 n) = 4.6e-4, the variance to sqrt(1/180/n) = 1.2e-4. Bounds: 4 sigma."""
    u = uniform(keys(1, range(4000)), (100,))
    assert u.dtype == torch.float64 and 0 < u.min() and u.max() < 1
    assert abs(u.mean() - 0.5) < 1.9e-3 and abs(u.var() - 1 / 12) < 4.8e-4
    counts = torch.histc(u, 20, 0, 1)
    assert ((counts - 20000) ** 2 / 20000).sum() < 44  # chi squared, 19 degrees: p = 1e-3


def test_interval_is_open():
    """The extreme words give numbers inside (0, 1), whose normal quantile is finite."""
    ends = (torch.tensor([0, 2**52 - 1]).double() + 0.5) * 2.0**-52
    assert 0 < ends[0] and ends[1] < 1 and torch.special.ndtri(ends).isfinite().all()


def test_normal_moments():
    """n = 400,000: mean to 1.6e-3, variance to 2.2e-3, third moment to sqrt(15/n) = 6.1e-3, fourth to sqrt(96/n) = 1.6e-2."""
    z = normal(keys(2, range(4000)), (100,), torch.float64)
    moments = [z.mean(), z.pow(2).mean(), z.pow(3).mean(), z.pow(4).mean()]
    for found, expected, sigma in zip(moments, (0, 1, 0, 3), (1.6e-3, 2.2e-3, 6.1e-3, 1.6e-2), strict=True):
        assert abs(found - expected) < 4 * sigma
    for size in (0.5, 1.0, 2.0, 3.0):
        share = math.erfc(size / math.sqrt(2))
        assert abs((z.abs() > size).double().mean() - share) < 4 * math.sqrt(share / 4e5)
    assert z.abs().max() < 6.77


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].abs().item()


def test_no_correlation_between_neighbours():
    """n = 200,000 pairs: the correlation of independent numbers is 0 +- 2.2e-3. Bound: 4.5 sigma."""
    shape, index = (100,), range(2000)
    base = normal(keys(3, index, 1), shape)
    others = {
        "next index": normal(keys(3, range(1, 2001), 1), shape),
        "next seed": normal(keys(4, index, 1), shape),
        "next purpose": normal(keys(3, index, 2), shape),
        "seed and purpose exchanged": normal(keys(1, index, 3), shape),
        "next element": base.roll(1, 1),
        "partner in the pair": base.roll(50, 1),
    }
    for name, other in others.items():
        assert correlation(base, other) < 0.01, name
        assert correlation(base**2, other**2) < 0.01, name


def test_keys_are_distinct():
    found = torch.cat([keys(seed, range(1000), purpose) for seed in range(-3, 4) for purpose in range(5)])
    assert len(found.unique()) == len(found)


def test_torch_seed():
    """A valid seed, a different one for every place, and one that order matters to."""
    seeds = {torch_seed(seed, step, part) for seed in (0, 1, 2) for step in range(30) for part in range(10)}
    assert len(seeds) == 900 and all(0 <= seed < 2**63 for seed in seeds)
    assert torch_seed(1, 2, 3) != torch_seed(1, 3, 2) and torch_seed(1, 2) != torch_seed(1, 2, 0)
    assert torch_seed(1, 2, 3) == torch_seed(1, 2, 3)
    torch.manual_seed(max(seeds))
