"""Noise schedules: z_t = alpha_t x + sigma_t eps, t = 0 data, t = 1 noise.

Times are float64 tensors: close to t = 1 the gap between two neighbouring training times is 1e-7 and less, which float32
cannot hold. Sources: Zhou et al., "Inductive Moment Matching", arXiv:2503.07565 (IMM below), section 5 and appendix C.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Schedule:
    """alpha and sigma as functions of t in [0, 1], their derivatives, and the inverse of eta = sigma / alpha.

    All methods take and return float64 tensors of any shape.
    """

    name: str
    alpha: Callable[[Tensor], Tensor]
    sigma: Callable[[Tensor], Tensor]
    d_alpha: Callable[[Tensor], Tensor]
    d_sigma: Callable[[Tensor], Tensor]
    eta_inverse: Callable[[Tensor], Tensor]
    t_max: float  # the largest time that IMM trains and samples at (IMM, appendix C.7)

    def eta(self, t: Tensor) -> Tensor:
        """Noise to signal, sigma / alpha; infinite where alpha is 0."""
        return self.sigma(t) / self.alpha(t)

    def log_snr(self, t: Tensor) -> Tensor:
        """lambda_t = log(alpha^2 / sigma^2)."""
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    def log_snr_inverse(self, log_snr: Tensor) -> Tensor:
        """The time at which the log-SNR has this value."""
        return self.eta_inverse(torch.exp(-0.5 * log_snr))

    def d_log_snr(self, t: Tensor) -> Tensor:
        """d lambda / dt, negative."""
        return 2 * (self.d_alpha(t) / self.alpha(t) - self.d_sigma(t) / self.sigma(t))


# OT-FM, the linear path of flow matching.
FLOW = Schedule(
    name="fm",
    alpha=lambda t: 1 - t,
    sigma=lambda t: t,
    d_alpha=lambda t: -torch.ones_like(t),
    d_sigma=lambda t: torch.ones_like(t),
    eta_inverse=lambda eta: torch.where(torch.isinf(eta), torch.ones_like(eta), eta / (1 + eta)),
    t_max=0.994,
)

# The variance-preserving cosine schedule.
COSINE = Schedule(
    name="vp_cosine",
    alpha=lambda t: torch.cos(0.5 * math.pi * t),
    sigma=lambda t: torch.sin(0.5 * math.pi * t),
    d_alpha=lambda t: -0.5 * math.pi * torch.sin(0.5 * math.pi * t),
    d_sigma=lambda t: 0.5 * math.pi * torch.cos(0.5 * math.pi * t),
    eta_inverse=lambda eta: (2 / math.pi) * torch.atan(eta),
    t_max=0.996,
)

SCHEDULES = {schedule.name: schedule for schedule in (FLOW, COSINE)}
