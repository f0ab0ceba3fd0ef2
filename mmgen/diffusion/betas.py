"""DDPM's betas: the noise levels of discrete timesteps, and the schedule in continuous time that passes through them."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Betas = Literal["linear", "scaled_linear", "cosine"]
PURE_NOISE = 1e8  # sigma / alpha where there is no signal: z is noise to the last digit of float32


@lru_cache(maxsize=32)
def sigma_table(kind: Betas, start: float, end: float, steps: int, device: torch.device, zero_snr: bool = False) -> Tensor:
    """sigma / alpha of timesteps 0 to steps - 1, ascending, float64 [steps]: sqrt((1 - alpha-bar) / alpha-bar).

    linear: Ho et al., arXiv:2006.11239, section 4. scaled_linear: evenly spaced square roots of beta (latent diffusion,
    arXiv:2112.10752). cosine: Nichol & Dhariwal, arXiv:2102.09672, eq. 17, which has no use for `start` and `end`.
    zero_snr: sqrt(alpha-bar) is shifted and scaled so that the last is 0 and the first as it was (Lin et al., arXiv:2305.08891,
    algorithm 1); the last sigma / alpha, which would be infinite, is 1e8.
    """
    if kind == "linear":
        betas = np.linspace(start, end, steps)
    elif kind == "scaled_linear":
        betas = np.linspace(start**0.5, end**0.5, steps) ** 2
    else:
        bar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - bar[1:] / bar[:-1], 0.999)
    bar = np.cumprod(1 - betas)
    if zero_snr:
        root = np.sqrt(bar)
        bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        bar[-1] = 1 / (1 + PURE_NOISE**2)
    return torch.tensor(np.sqrt((1 - bar) / bar), dtype=torch.float64, device=device)


@lru_cache(maxsize=8)
def iddpm_table(steps: int, device: torch.device) -> Tensor:
    """EDM's u_j backwards, ascending, float64 [M], with M = steps.

    u_M = 0 and u_{j-1} = sqrt((u_j^2 + 1) / max(alpha-bar_{j-1} / alpha-bar_j, 0.001) - 1), with alpha-bar_j =
    sin^2(pi/2 j / (M 1.008)) (Karras et al., arXiv:2206.00364, table 1); the network's time of u_j is M - 1 - j.
    """
    bar = np.sin(0.5 * math.pi * np.arange(steps + 1) / steps / 1.008) ** 2
    u = [0.0]
    for j in range(steps, 0, -1):
        u.append(math.sqrt((u[-1] ** 2 + 1) / max(bar[j - 1] / bar[j], 0.001) - 1))
    return torch.tensor(u[1:], dtype=torch.float64, device=device)


def position(knots: Tensor, value: Tensor) -> Tensor:
    """The position of `value` among ascending `knots` [K], linear between two of them, float64 from 0 to K - 1."""
    right = torch.searchsorted(knots, value.contiguous()).clamp(1, len(knots) - 1)
    left = right - 1
    return left + ((value - knots[left]) / (knots[right] - knots[left])).clamp(0, 1)


def table_eta(table: Tensor, t: Tensor) -> Tensor:
    """eta = sigma / alpha at time t in [0, 1]: that of timestep T t - 1, linear in log eta between timesteps.

    Before the first timestep (t < 1/T) eta is proportional to t, so that t = 0 is data.
    """
    index = (len(table) * t - 1).clamp(max=len(table) - 1)
    left = index.clamp(min=0).floor().long().clamp(max=len(table) - 2)
    log = table.log()
    inside = torch.lerp(log[left], log[left + 1], index - left).exp()
    return torch.where(index < 0, table[0] * len(table) * t, inside)


def table_eta_slope(table: Tensor, t: Tensor) -> Tensor:
    """d eta / dt of `table_eta`, from the left where it jumps at a timestep."""
    index = (len(table) * t - 1).clamp(max=len(table) - 1)
    left = (index.clamp(min=0).ceil().long() - 1).clamp(min=0, max=len(table) - 2)
    log = table.log()
    slope = table_eta(table, t) * (log[left + 1] - log[left]) * len(table)
    return torch.where(index <= 0, table[0] * len(table), slope)


def table_eta_inverse(table: Tensor, eta: Tensor) -> Tensor:
    """The time t in [0, 1] of an eta; 1 for all beyond the last timestep's."""
    inside = (position(table.log(), eta.clamp(min=table[0]).log()) + 1) / len(table)
    return torch.where(eta < table[0], eta / (table[0] * len(table)), inside)
