"""The loss of Inductive Moment Matching (Zhou et al., arXiv:2503.07565): a kernel MMD between a model's outputs from two times.

Groups of M particles share (s, r, t). From t and from r < t the model jumps to s; the maximum mean discrepancy between the
two sets of M outputs is the loss, and its gradient flows through the jumps from t only (eqs. 8, 12, 67).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..diffusion.process import per_image
from ..diffusion.flow_map import FlowMapSettings, coefficients
from ..diffusion.schedules import Schedule
from ..system.random import uniform
from .mmd import Kernel, group_mmd


@dataclass(frozen=True)
class ImmSettings:
    """The loss of IMM. Defaults are the paper's for CIFAR-10 (table 5)."""

    objective: Literal["imm", "mean_flow"] = "imm"  # mean_flow: MeanFlow's, whose settings are the section mean_flow, not these
    group_size: int = 4  # M, particles that share (s, r, t); 1 is a consistency model
    kernel: Kernel = "laplace"
    distance_floor: float = 1e-8  # smallest distance in the Laplace kernel; the public training code has 1e-4
    a: float = 1.0  # power of alpha_t in the weight; 2 for fp16 (table 8)
    b: float = 5.0  # shift of the log-SNR in the weight; the public training code has 4 for CIFAR-10
    weighting: Weighting = "full"  # terms of the weight, for the ablation of table 4
    mapping: MappingName = "eta"  # in what r(s, t) is a constant step back from t
    k: float = 15.0  # the step is the range of that quantity divided by 2^k
    eta_range: Literal["paper", "exact"] = "paper"  # mapping eta: [0, 160], or eta at t_min and t_max (public code)
    min_gap: float = 0.0  # least t - r where s allows it; 1e-4 for fp16 (appendix I.6)
    time_distribution: Literal["uniform", "lognormal"] = "uniform"  # of t and s; lognormal: log eta is normal
    lognormal_mean: float = -1.1  # mean of log eta
    lognormal_std: float = 2.0  # standard deviation of log eta
    # Where jumps end: at an s drawn in (t_min, t), or all at t_min, as those of a consistency model do
    jump: Literal["drawn", "end"] = "drawn"
    target_labels: Literal["dropped", "undropped"] = "dropped"  # what the target sees where a label was dropped


ETA_RANGE = (0.0, 160.0)  # eta_min and eta_max of appendix C.6


@dataclass(frozen=True)
class Mapping:
    """A quantity in which r(s, t) is a constant step back from t, and the (t_min, t_max) that the paper gives it on pixels.

    t_max None: the schedule's. Appendices C.6 and C.7; latents have t_min 0.
    """

    of: Callable[[Schedule, Tensor], Tensor]
    inverse: Callable[[Schedule, Tensor], Tensor]
    t_min: float
    t_max: float | None


# As printed, the rule in log-SNR has the wrong sign: the log-SNR rises where t falls
MAPPINGS = {
    "eta": Mapping(lambda path, t: path.eta(t), lambda path, eta: path.eta_inverse(eta.clamp(min=0)), 0.006, None),
    "t": Mapping(lambda path, t: t, lambda path, t: t, 0.0, 1.0),
    "log_snr": Mapping(lambda path, t: path.log_snr(t), lambda path, value: path.log_snr_inverse(value), 0.001, None),
    "inverse_eta": Mapping(lambda path, t: 1 / path.eta(t), lambda path, value: path.eta_inverse(1 / value), 0.005, 1.0),
}
MappingName = Literal[tuple(MAPPINGS)]


def documented_times(mapping: str, schedule_t_max: float) -> tuple[float, float]:
    """(t_min, t_max) that the paper gives for a mapping r(s, t)."""
    found = MAPPINGS[mapping]
    return found.t_min, schedule_t_max if found.t_max is None else found.t_max


def draw_times(settings: ImmSettings, flow: FlowMapSettings, key: Tensor) -> tuple[Tensor, Tensor]:
    """(s, t), float64 [G], one pair per key int64 [G]: t in (t_min, t_max) and s in (t_min, t) (appendix C.7), or s = t_min."""
    first, second = uniform(key, (2,)).unbind(1)
    if settings.time_distribution == "uniform":
        t = flow.t_min + (flow.t_max - flow.t_min) * first
        return _jump(settings, flow, flow.t_min + (t - flow.t_min) * second), t
    # log eta ~ N(mean, std^2), cut to the range exactly: a uniform draw between the cumulative probabilities of the ends
    schedule = flow.get_schedule()
    low, high = _eta_probability(settings, schedule.eta(_ends(flow))).tolist()
    p_t = low + (high - low) * first
    p_s = low + (p_t - low) * second
    t, s = (schedule.eta_inverse(torch.exp(settings.lognormal_mean + settings.lognormal_std * torch.special.ndtri(p)))
            for p in (p_t, p_s))  # fmt: skip
    return _jump(settings, flow, s.clamp(flow.t_min)), t.clamp(flow.t_min, flow.t_max)


def _jump(settings: ImmSettings, flow: FlowMapSettings, s: Tensor) -> Tensor:
    return s if settings.jump == "drawn" else torch.full_like(s, flow.t_min)


def _ends(flow: FlowMapSettings) -> Tensor:
    """[t_min, t_max], float64 on the CPU: what is computed from them are numbers, not tensors on the device."""
    return torch.tensor([flow.t_min, flow.t_max], dtype=torch.float64)


def _eta_probability(settings: ImmSettings, eta: Tensor) -> Tensor:
    return torch.special.ndtr((eta.log() - settings.lognormal_mean) / settings.lognormal_std)


def earlier_time(settings: ImmSettings, flow: FlowMapSettings, s: Tensor, t: Tensor) -> Tensor:
    """r(s, t) in [s, t], float64 [G]: a constant step back from t in eta, t, log-SNR or 1/eta (appendix C.6)."""
    schedule, mapping = flow.get_schedule(), MAPPINGS[settings.mapping]
    paper = settings.mapping == "eta" and settings.eta_range == "paper"
    at_t_min, at_t_max = ETA_RANGE if paper else mapping.of(schedule, _ends(flow)).tolist()
    r = mapping.inverse(schedule, mapping.of(schedule, t) - (at_t_max - at_t_min) / 2.0**settings.k)
    if settings.min_gap > 0:
        r = torch.minimum(r, t - settings.min_gap)
    return torch.maximum(r, s)


def loss_weight(settings: ImmSettings, flow: FlowMapSettings, t: Tensor) -> Tensor:
    """w(s, t) = 1/2 sigmoid(b - lambda_t) (-d lambda_t/dt) alpha_t^a / (alpha_t^2 + sigma_t^2), float64 [G] (eq. 13).

    Since exp(lambda) = alpha^2 / sigma^2, the first three factors are
    sigma (alpha sigma' - sigma alpha') alpha^(a-1) / (sigma^2 + alpha^2 exp(-b)), which has no 0/0 at the ends of the path.
    """
    return WEIGHTS[settings.weighting](settings, flow.get_schedule(), t)


def _elbo(schedule: Schedule, t: Tensor, a: float, b: float) -> Tensor:
    """1/2 sigmoid(b - lambda_t) (-d lambda_t/dt) alpha_t^a."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    wronskian = alpha * schedule.d_sigma(t) - sigma * schedule.d_alpha(t)
    return sigma * wronskian * alpha ** (a - 1) / (sigma**2 + alpha**2 * math.exp(-b))


WEIGHTS = {  # the terms of the ablation in table 4, one after another
    "full": lambda loss, path, t: _elbo(path, t, loss.a, loss.b) / (path.alpha(t) ** 2 + path.sigma(t) ** 2),
    "elbo_alpha": lambda loss, path, t: _elbo(path, t, loss.a, loss.b),
    "elbo": lambda loss, path, t: _elbo(path, t, 0.0, loss.b),
    "none": lambda loss, path, t: torch.ones_like(t),
}
Weighting = Literal[tuple(WEIGHTS)]


def kernel_weight(flow: FlowMapSettings, s: Tensor, t: Tensor) -> Tensor:
    """w~(s, t) = 1 / |c_out(s, t)|, float64 [G] (appendix C.8); (s, t) serve all three terms of the MMD."""
    _, c_out = coefficients(flow, s, t)
    return 1 / c_out.abs().clamp(min=1e-12)  # s = t has no output to compare: keep it finite


def jump_difference(
    flow: FlowMapSettings, s: Tensor, r: Tensor, t: Tensor, x: Tensor, noise: Tensor, out_t: Tensor, out_r: Tensor
) -> tuple[Tensor, Tensor]:
    """(y_t - y_r, y_r) from the data, the noise and the network's raw outputs at t and at r; all [N, ...], times float64 [N].

    y_t = f_{s,t}(x_t) and y_r = f_{s,r}(x_r) share x and the noise, so their difference is a combination of x, noise, the
    output at t and the change of the output, whose coefficients are small and computed in float64: the images may be float32
    however close t and r are, where subtracting y_r from y_t would leave rounding errors only.
    """
    schedule = flow.get_schedule()
    skip_t, outer_t = coefficients(flow, s, t)
    skip_r, outer_r = coefficients(flow, s, r)
    x_t, noise_t = skip_t * schedule.alpha(t), skip_t * schedule.sigma(t)
    x_r, noise_r = skip_r * schedule.alpha(r), skip_r * schedule.sigma(r)

    y_r = per_image(x_r, x) * x + per_image(noise_r, noise) * noise + per_image(outer_r, out_r) * out_r
    from_data = per_image(x_t - x_r, x) * x + per_image(noise_t - noise_r, noise) * noise
    from_network = per_image(outer_t - outer_r, out_r) * out_r + per_image(outer_t, out_t) * (out_t - out_r)
    return from_data + from_network, y_r


def imm_loss(
    settings: ImmSettings, flow: FlowMapSettings, s: Tensor, r: Tensor, t: Tensor, difference: Tensor, y_r: Tensor
) -> Tensor:
    """The weighted loss of each group, float64 [G] (eq. 67); its mean over the batch is what training descends.

    s, r, t: float64 [G], one per group of M = `group_size` consecutive particles. difference = y_t - y_r and y_r:
    [G M, ...], float32 or float64, y_r without gradient.
    """
    groups = (len(t), settings.group_size, -1)
    mmd = group_mmd(
        difference.reshape(groups),
        y_r.reshape(groups),
        kernel_weight(flow, s, t),
        settings.kernel,
        settings.distance_floor,
    )
    return loss_weight(settings, flow, t) * mmd
