"""Noise schedules: z_t = alpha_t x + sigma_t eps, t = 0 data, t = 1 noise.

Times are float64 tensors: close to t = 1 the gap between two neighbouring training times is 1e-7 and less, which float32
cannot hold. Sources: Zhou et al., "Inductive Moment Matching", arXiv:2503.07565 (IMM below), section 5 and appendix C; of
`ddpm_linear` Song et al., arXiv:2011.13456, appendix C; of `edm` Karras et al., arXiv:2206.00364, eq. 5; of the shift
Hoogeboom et al., "simple diffusion", arXiv:2301.11093, section 3.1, and Esser et al., arXiv:2403.03206, eq. 23.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from ..errors import ConfigError
from .betas import Betas, sigma_table, table_eta, table_eta_inverse, table_eta_slope


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
    keeps: Literal["variance", "sum", "alpha"] = "variance"  # which is 1: alpha^2 + sigma^2, alpha + sigma, or alpha
    t_max: float = 1.0  # the largest time that IMM trains and samples at (IMM, appendix C.7)

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
    keeps="sum",
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

# The flow map's; `make_schedule` knows more.
SCHEDULES = {schedule.name: schedule for schedule in (FLOW, COSINE)}

RHO = 7  # of `edm`
BETA_MIN, BETA_MAX = 0.1, 20.0  # of `ddpm_linear`


@dataclass(frozen=True)
class ScheduleSettings:
    """A schedule by name. vp_cosine, ddpm_linear and discrete have alpha^2 + sigma^2 = 1, fm has alpha + sigma = 1, edm alpha = 1."""

    name: ScheduleName = "vp_cosine"
    shift: float = 1.0  # eta = sigma / alpha is this times as large: the log-SNR is lower by 2 log shift. resolution / 64, say
    sigma_min: float = 0.002  # edm only: sigma at t = 0
    sigma_max: float = 80.0  # edm only: sigma at t = 1
    betas: Betas = "linear"  # discrete only, this and what follows: the timesteps that it passes through
    beta_start: float = 1e-4
    beta_end: float = 0.02
    num_timesteps: int = 1000
    zero_snr: bool = False  # rescaled so that the last timestep is pure noise


@lru_cache(maxsize=64)
def make_schedule(settings: ScheduleSettings) -> Schedule:
    """The schedule of some settings. A shifted one keeps what its name promises of alpha and sigma.

    ddpm_linear is the continuous form of DDPM's betas: log alpha = -(19.9 t^2 / 4 + 0.1 t / 2); alpha at t = 1 is 0.0066.
    edm: sigma = (sigma_min^(1/7) + t (sigma_max^(1/7) - sigma_min^(1/7)))^7.
    discrete: timestep i of the betas is t = (i + 1) / T, and log sigma / alpha is linear between two of them. So t = j/k are
    diffusers' "trailing" timesteps, and sigma at t = 1 is the last one that the network was trained at.
    Times of an eta outside the schedule are its ends. Raises ConfigError for settings that make none.
    """
    if not 0 < settings.shift < math.inf:
        raise ConfigError(f"schedule.shift must be more than 0, not {settings.shift}")
    low, high = settings.sigma_min, settings.sigma_max
    if not 0 < low < high < math.inf:
        raise ConfigError(f"0 < schedule.sigma_min < schedule.sigma_max must hold, not {low}, {high}")
    schedule = MAKERS[settings.name](settings)
    return schedule if settings.shift == 1 else _shifted(schedule, settings.shift)


def _ddpm_linear(settings: ScheduleSettings) -> Schedule:
    def exponent(t: Tensor) -> Tensor:
        """-2 log alpha, the integral of beta from 0 to t."""
        return 0.5 * (BETA_MAX - BETA_MIN) * t**2 + BETA_MIN * t

    def beta(t: Tensor) -> Tensor:
        return BETA_MIN + (BETA_MAX - BETA_MIN) * t

    def alpha(t: Tensor) -> Tensor:
        return torch.exp(-0.5 * exponent(t))

    def sigma(t: Tensor) -> Tensor:
        return (-torch.expm1(-exponent(t))).sqrt()

    def eta_inverse(eta: Tensor) -> Tensor:
        wanted = torch.log1p(eta**2).clamp(max=0.5 * (BETA_MAX + BETA_MIN))
        return 2 * wanted / (BETA_MIN + (BETA_MIN**2 + 2 * (BETA_MAX - BETA_MIN) * wanted).sqrt())

    return Schedule(
        name="ddpm_linear",
        alpha=alpha,
        sigma=sigma,
        d_alpha=lambda t: -0.5 * beta(t) * alpha(t),
        d_sigma=lambda t: 0.5 * beta(t) * alpha(t) ** 2 / sigma(t),
        eta_inverse=eta_inverse,
    )


def _discrete(settings: ScheduleSettings) -> Schedule:
    """With eta from the table of betas: alpha = 1 / sqrt(1 + eta^2), sigma = eta alpha."""
    if not (0 < settings.beta_start <= settings.beta_end < 1 and settings.num_timesteps > 1):
        raise ConfigError(
            "0 < schedule.beta_start <= schedule.beta_end < 1 must hold, and schedule.num_timesteps be more than 1, not "
            f"{settings.beta_start}, {settings.beta_end}, {settings.num_timesteps}"
        )

    def table(t: Tensor) -> Tensor:
        given = settings
        return sigma_table(given.betas, given.beta_start, given.beta_end, given.num_timesteps, t.device, given.zero_snr)

    def eta(t: Tensor) -> Tensor:
        return table_eta(table(t), t)

    def alpha(t: Tensor) -> Tensor:
        return (1 + eta(t) ** 2).rsqrt()

    return Schedule(
        name="discrete",
        alpha=alpha,
        sigma=lambda t: eta(t) * alpha(t),
        d_alpha=lambda t: -eta(t) * table_eta_slope(table(t), t) * alpha(t) ** 3,
        d_sigma=lambda t: table_eta_slope(table(t), t) * alpha(t) ** 3,
        eta_inverse=lambda eta: table_eta_inverse(table(eta), eta),
    )


def _edm(settings: ScheduleSettings) -> Schedule:
    low, high = settings.sigma_min ** (1 / RHO), settings.sigma_max ** (1 / RHO)
    return Schedule(
        name="edm",
        alpha=torch.ones_like,
        sigma=lambda t: ((1 - t) * low + t * high) ** RHO,
        d_alpha=torch.zeros_like,
        d_sigma=lambda t: RHO * (high - low) * ((1 - t) * low + t * high) ** (RHO - 1),
        eta_inverse=lambda eta: ((eta ** (1 / RHO) - low) / (high - low)).clamp(0, 1),
        keeps="alpha",
    )


# A further schedule is a function and a line here.
MAKERS: dict[str, Callable[[ScheduleSettings], Schedule]] = {
    "fm": lambda settings: FLOW, "vp_cosine": lambda settings: COSINE, "ddpm_linear": _ddpm_linear, "edm": _edm,
    "discrete": _discrete,
}  # fmt: skip
ScheduleName = Literal[tuple(MAKERS)]


def _shifted(base: Schedule, shift: float) -> Schedule:
    """The schedule with `shift` times the eta, and of the same kind: alpha and sigma are divided by what makes it so.

    With W = alpha sigma' - alpha' sigma, the quotient rule leaves the derivatives below.
    """

    def scale(t: Tensor) -> Tensor:
        if base.keeps == "alpha":
            return torch.ones_like(t)
        if base.keeps == "sum":
            return base.alpha(t) + shift * base.sigma(t)
        return (base.alpha(t) ** 2 + (shift * base.sigma(t)) ** 2).sqrt()

    def wronskian(t: Tensor) -> Tensor:
        return base.alpha(t) * base.d_sigma(t) - base.d_alpha(t) * base.sigma(t)

    def d_alpha(t: Tensor) -> Tensor:
        if base.keeps == "alpha":
            return torch.zeros_like(t)
        if base.keeps == "sum":
            return -shift * wronskian(t) / scale(t) ** 2
        return -(shift**2) * base.sigma(t) * wronskian(t) / scale(t) ** 3

    def d_sigma(t: Tensor) -> Tensor:
        if base.keeps == "alpha":
            return shift * base.d_sigma(t)
        if base.keeps == "sum":
            return shift * wronskian(t) / scale(t) ** 2
        return shift * base.alpha(t) * wronskian(t) / scale(t) ** 3

    return replace(
        base,
        alpha=lambda t: base.alpha(t) / scale(t),
        sigma=lambda t: shift * base.sigma(t) / scale(t),
        d_alpha=d_alpha,
        d_sigma=d_sigma,
        eta_inverse=lambda eta: base.eta_inverse(eta / shift),
    )
