"""Embeddings of times: numbers to vectors of sines and cosines. Angles are float64, what leaves is float32."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def sinusoid(t: Tensor, frequencies: Tensor, sine_first: bool) -> Tensor:
    """[sin, cos] or [cos, sin] of t times the frequencies: t [N], frequencies float64 [K] -> float32 [N, 2 K]."""
    angle = t.double()[:, None] * frequencies
    waves = (angle.sin(), angle.cos()) if sine_first else (angle.cos(), angle.sin())
    return torch.cat(waves, dim=1).float()


def positional_frequencies(dim: int, endpoint: bool) -> Tensor:
    """dim / 2 frequencies from 1 down to 1/10000, geometric; `endpoint`: the last is 1/10000 itself. float64, on the CPU."""
    half = dim // 2
    return torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float64, device="cpu") / (half - endpoint))


class TimeMLP(nn.Module):
    """Linear, SiLU, Linear: from a time embedding [N, in] to [N, out]."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.linear0 = nn.Linear(in_dim, out_dim)
        self.linear1 = nn.Linear(out_dim, out_dim)

    def forward(self, embedding: Tensor) -> Tensor:
        return self.linear1(F.silu(self.linear0(embedding)))
