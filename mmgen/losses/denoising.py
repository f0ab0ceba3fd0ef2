"""The loss of a denoiser: which noise levels it is trained at, and how much an error of x_hat counts at each of them.

The loss of one image is w(sigma) ||x - x_hat(x + sigma e; sigma)||^2, averaged over its pixels, with sigma drawn anew each time.
sigma is noise to signal: a model trained on z = a x + s e has sigma = s / a, the signal-to-noise ratio SNR is 1 / sigma^2, and
lambda = log SNR. Errors of all predictions are multiples of the error of x_hat, so that losses on any of them are weights:

    of eps, (z - a x) / s                    w = SNR
    of v = a e - s x, with a^2 + s^2 = 1     w = SNR + 1
    of the network's raw output              w = 1 / c_out^2 (EDM's lambda; flow matching's velocity: 1 / s^2)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..diffusion.preconditioning import DenoiserSettings, preconditioning
from ..diffusion.schedules import Schedule, make_schedule

LEVELS = 8  # parts of the noise levels that the loss is logged for


@dataclass(frozen=True)
class DenoisingSettings:
    """The loss of a denoiser.

    edm: (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 (Karras et al., arXiv:2206.00364, table 1).
    min_snr: min(SNR, gamma) (Hang et al., arXiv:2303.09556).
    v, eps, output, uniform: the plain mean square of v, eps, the network's output, x.
    sigmoid: 1/2 integral of sigmoid(b - lambda) ||eps - eps_hat||^2 d lambda, whatever the draw of the times (Kingma & Gao,
    arXiv:2303.00848; Hoogeboom et al., arXiv:2410.19324). It is an integral over lambda, not over
    times: where t is uniform the weight of an error of eps has the factor -d lambda/dt.
    """

    weighting: Weighting = "v"
    sigma_data: float = 0.5  # edm only: standard deviation of the data
    sigmoid_bias: float = 0.0  # sigmoid only: b, the log-SNR at which the weight is half its largest
    min_snr_gamma: float = 5.0  # min_snr only
    times: Literal["uniform", "lognormal", "logit_normal"] = "uniform"  # of t in the schedule; lognormal: log sigma is normal
    time_mean: float = -1.2  # lognormal and logit_normal, of log sigma or logit t; EDM's for CIFAR-10 and ImageNet-64
    time_std: float = 1.2


def time_schedule(denoiser: DenoiserSettings) -> Schedule:
    """The schedule in which `times` are drawn: that of the process; for EDM the one whose uniform times are EDM's grid."""
    return make_schedule(preconditioning(denoiser).process)


def draw_sigma(settings: DenoisingSettings, denoiser: DenoiserSettings, uniform: Tensor) -> Tensor:
    """sigma, float64 of any shape, from uniform numbers in (0, 1), float64: the larger the number, the larger sigma.

    The distribution is `settings.times`, cut to the trained range exactly: a uniform draw between the cumulative
    probabilities of the ends.
    """
    low, high = preconditioning(denoiser).range
    ends = torch.tensor([low, high], dtype=torch.float64)  # on the CPU: what is computed from them are numbers
    mean, std = settings.time_mean, settings.time_std
    if settings.times == "lognormal":
        sigma = torch.exp(mean + std * _normal_between((ends.log() - mean) / std, uniform))
        return sigma.clamp(low, high)
    schedule = time_schedule(denoiser)
    t_ends = schedule.eta_inverse(ends)
    if settings.times == "uniform":
        first, last = t_ends.tolist()
        t = first + (last - first) * uniform
    else:  # Esser et al., arXiv:2403.03206
        t = torch.sigmoid(mean + std * _normal_between((torch.logit(t_ends) - mean) / std, uniform))
    return schedule.eta(t).clamp(low, high)


def _normal_between(ends: Tensor, uniform: Tensor) -> Tensor:
    """A standard normal number between two ends, from a uniform one."""
    low, high = torch.special.ndtr(ends).tolist()
    return torch.special.ndtri(low + (high - low) * uniform)


def level_edges(settings: DenoisingSettings, denoiser: DenoiserSettings, count: int = LEVELS) -> list[float]:
    """The count + 1 values of sigma, ascending, that part the draws into equal shares."""
    inner = draw_sigma(settings, denoiser, torch.arange(1, count, dtype=torch.float64) / count).tolist()
    low, high = preconditioning(denoiser).range
    return [low, *inner, high]


def weight(settings: DenoisingSettings, denoiser: DenoiserSettings, sigma: Tensor) -> Tensor:
    """w(sigma) on ||x - x_hat||^2, float64 of sigma's shape; sigma float64 of any shape, positive and finite.

    In `sigmoid` eps's weight 1/2 sigmoid(b - lambda) is turned into x's by the factor SNR, and the integral over lambda into a
    mean over the draws by dividing by their density in lambda. Where t is uniform 1 / density is -d lambda/dt, so that

        w = 1/2 (-d lambda/dt) SNR sigmoid(b - lambda) = 1/2 (-d lambda/dt) exp(b) sigmoid(lambda - b).

    The density is that before the cut to the trained range.
    """
    return WEIGHTS[settings.weighting](settings, denoiser, sigma)


def _sigmoid(settings: DenoisingSettings, denoiser: DenoiserSettings, sigma: Tensor) -> Tensor:
    bias = settings.sigmoid_bias
    of_x = 0.5 * math.exp(bias) * torch.sigmoid(-2 * sigma.log() - bias)
    return of_x / log_snr_density(settings, denoiser, sigma)


# w(sigma) by `weighting`. A further one is a line here, and what it has to be told a field of DenoisingSettings
WEIGHTS: dict[str, Callable[[DenoisingSettings, DenoiserSettings, Tensor], Tensor]] = {
    "edm": lambda settings, denoiser, sigma: sigma**-2 + settings.sigma_data**-2,
    "sigmoid": _sigmoid,
    "min_snr": lambda settings, denoiser, sigma: (sigma**-2).clamp(max=settings.min_snr_gamma),
    "v": lambda settings, denoiser, sigma: sigma**-2 + 1,
    "eps": lambda settings, denoiser, sigma: sigma**-2,
    "uniform": lambda settings, denoiser, sigma: torch.ones_like(sigma),
    "output": lambda settings, denoiser, sigma: preconditioning(denoiser)(sigma)[1] ** -2,
}
Weighting = Literal[tuple(WEIGHTS)]


def log_snr_density(settings: DenoisingSettings, denoiser: DenoiserSettings, sigma: Tensor) -> Tensor:
    """The probability density of lambda = -2 log sigma that `settings.times` has at sigma, before the cut; float64 of any shape."""
    mean, std = settings.time_mean, settings.time_std
    if settings.times == "lognormal":  # lambda is normal with twice the standard deviation
        return _normal_density(sigma.log(), mean, std) / 2
    schedule = time_schedule(denoiser)
    t = schedule.eta_inverse(sigma)
    of_time = torch.ones_like(t)
    if settings.times == "logit_normal":
        of_time = _normal_density(torch.logit(t), mean, std) / (t * (1 - t))
    return -of_time / schedule.d_log_snr(t)


def _normal_density(value: Tensor, mean: float, std: float) -> Tensor:
    return torch.exp(-0.5 * ((value - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi))
