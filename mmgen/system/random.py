"""Random numbers that depend on what they are for, not on when or where they are drawn.

Every draw is a function of an integer key: (seed, image) for a sample, (seed, images seen, purpose) for training. So image
17 starts from the same noise in any batch, on any device and number of devices, and a resumed run draws what the
interrupted one would have drawn. The generator is SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014) as a counter: no state, no loop over samples, the same integers on CPU and GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_GAMMA = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer, the golden-ratio increment
_MIX1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's own is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser; int64 products wrap around, as wanted."""
    x = (x ^ _shift(x, 30)) * _MIX1
    x = (x ^ _shift(x, 27)) * _MIX2
    return x ^ _shift(x, 31)


def keys(seed: int, index: Tensor | Sequence[int], purpose: int = 0) -> Tensor:
    """One stream key per index, int64 [N]: the same index gives the same key whatever else is in the batch.

    Args:
        seed: any integer.
        index: int64 [N], for example the numbers of the images.
        purpose: keeps apart draws for different ends (noise, times, labels) at the same index.
    """
    index = torch.as_tensor(index, dtype=torch.int64)
    word = _mix_int(seed * _GAMMA + purpose)  # a Python integer: nothing is copied to the device
    return _mix(_mix(index * _GAMMA + word) + _MIX1)


def _wrap(number: int) -> int:
    """A Python integer as a signed 64-bit one."""
    return (number + 2**63) % 2**64 - 2**63


def _mix_int(x: int) -> int:
    """`_mix` of one Python integer."""
    x %= 2**64
    x = (x ^ (x >> 30)) * _MIX1 % 2**64
    x = (x ^ (x >> 27)) * _MIX2 % 2**64
    return _wrap(x ^ (x >> 31))


def bits(key: Tensor, shape: Sequence[int] = ()) -> Tensor:
    """Random int64 [N, *shape], one stream per key."""
    count = math.prod(shape)
    counter = torch.arange(1, count + 1, device=key.device, dtype=torch.int64)
    return _mix(key[:, None] + counter * _GAMMA).reshape(key.shape[0], *shape)


def uniform(key: Tensor, shape: Sequence[int] = ()) -> Tensor:
    """Uniform float64 [N, *shape] in the open interval (0, 1), 52 random bits each."""
    return (_shift(bits(key, shape), 12).to(torch.float64) + 0.5) * 2.0**-52


def normal(key: Tensor, shape: Sequence[int] = (), dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal [N, *shape] by Box and Muller's method, |value| at most sqrt(66 log 2) = 6.76.

    Both values of each pair are used: half as many words as numbers.
    """
    count = math.prod(shape)
    word = bits(key, ((count + 1) // 2,))
    radius = ((_shift(word, 32).to(torch.float64) + 0.5) * 2.0**-32).log_().mul_(-2).sqrt_()
    angle = (word & 0xFFFFFFFF).to(torch.float64).mul_(2 * math.pi * 2.0**-32)
    pair = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
    return pair[:, :count].reshape(key.shape[0], *shape).to(dtype)


def torch_seed(seed: int, *where: int) -> int:
    """An integer for `torch.manual_seed`, from a seed and the place it is used at (step, part of the batch)."""
    word = seed
    for number in where:
        word = _mix_int(word * _GAMMA + number + 1)
    return _mix_int(word) & (2**63 - 1)
