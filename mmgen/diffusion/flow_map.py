"""IMM's flow map f_{s,t}: from a sample at time t to one at time s <= t, in a single evaluation of the network.

    f_{s,t}(x_t) = c_skip(s, t) x_t + c_out(s, t) G(c_in(t) x_t, c_noise(t), c_noise(s))

Zhou et al., "Inductive Moment Matching", arXiv:2503.07565, section 5 and appendix C.5. The noise has standard deviation
sigma_data, so that everything the network sees has one scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .process import ddim_coefficients
from ..errors import ConfigError
from .preconditioning import DenoiserSettings, preconditioning
from .preconditioning import check_settings as check_denoiser
from .schedules import SCHEDULES, Schedule


@dataclass(frozen=True)
class FlowMapSettings:
    """What turns a network into a flow map. Part of every model file."""

    schedule: Literal["fm", "vp_cosine"] = "fm"  # OT-FM or cosine
    # euler_fm: with schedule fm only; given: the network is a denoiser's, `given`, which begins as its DDIM step
    parametrization: Literal["identity", "simple_edm", "euler_fm", "given"] = "simple_edm"
    second_time: Literal["s", "t-s"] = "s"  # what the network is given beside t
    sigma_data: float = 0.5  # standard deviation of the data, and of the noise
    time_scale: float = 1000.0  # c in c_noise(t) = c t
    t_min: float | None = None  # smallest time, epsilon; unset: the paper's for the mapping r(s, t)
    t_max: float | None = None  # largest time, T; unset: the paper's for the mapping and the schedule
    given: DenoiserSettings | None = None  # of the model that the training began with, filled in

    def get_schedule(self) -> Schedule:
        return SCHEDULES[self.schedule]


def check_settings(flow: FlowMapSettings) -> None:
    """Raises ConfigError for settings that make no flow map. Times that are unset make one only once they are filled in."""
    if flow.sigma_data <= 0 or flow.time_scale <= 0:
        raise ConfigError(f"flow.sigma_data {flow.sigma_data:g} and flow.time_scale {flow.time_scale:g} must be more than 0")
    if flow.t_min is None or flow.t_max is None or not 0 <= flow.t_min < flow.t_max <= 1:
        raise ConfigError(f"0 <= flow.t_min < flow.t_max <= 1 must hold, not {flow.t_min}, {flow.t_max}")
    if (flow.parametrization == "given") != (flow.given is not None):
        raise ConfigError("flow.parametrization given and the settings of the denoiser, flow.given, go together")
    if flow.given is not None:
        check_denoiser(flow.given)


def coefficients(flow: FlowMapSettings, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(c_skip, c_out) of f_{s,t}, float64 [N], for s <= t (IMM, table 5 and appendix C.5).

    At s = t every parametrisation is the identity map: c_skip 1, c_out 0 (`identity` and `given` only for s > 0).
    `given` is the DDIM step with the x_hat of a denoiser in the place of g (eq. 11).
    """
    schedule = flow.get_schedule()
    if flow.parametrization == "given":
        on_x_t, on_x = ddim_coefficients(schedule, s, t)
        skip, out, _, _ = _given(flow, t)
        return on_x_t + on_x * skip / schedule.alpha(t), on_x * out
    if flow.parametrization == "euler_fm":
        return torch.ones_like(t), -(t - s) * flow.sigma_data
    if flow.parametrization == "identity":
        return ddim_coefficients(schedule, s, t)
    alpha_s, sigma_s, alpha_t, sigma_t = schedule.alpha(s), schedule.sigma(s), schedule.alpha(t), schedule.sigma(t)
    power = alpha_t**2 + sigma_t**2
    c_skip = (alpha_s * alpha_t + sigma_s * sigma_t) / power
    c_out = -flow.sigma_data * (alpha_s * sigma_t - sigma_s * alpha_t) / power.sqrt()
    return c_skip, c_out


def input_scale(flow: FlowMapSettings, t: Tensor) -> Tensor:
    """c_in(t) = 1 / (sigma_data sqrt(alpha_t^2 + sigma_t^2)), float64 [N]: gives the network inputs of unit variance.

    With `given` it is that of the denoiser, of y = x_t / alpha_t.
    """
    schedule = flow.get_schedule()
    if flow.parametrization == "given":
        return _given(flow, t)[2] / schedule.alpha(t)
    return 1 / (flow.sigma_data * (schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2).sqrt())


def network_times(flow: FlowMapSettings, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The two times as the network gets them, c_noise(t) and c_noise(s) or c_noise(t - s), float64 [N].

    With `given` c_noise(t) is the denoiser's.
    """
    second = s if flow.second_time == "s" else t - s
    first = _given(flow, t)[3] if flow.parametrization == "given" else flow.time_scale * t
    return first, flow.time_scale * second


def _given(flow: FlowMapSettings, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The denoiser's coefficients at sigma = sigma_data eta_t, the noise to signal of x_t, within its trained range."""
    kind = preconditioning(flow.given)
    return kind((flow.sigma_data * flow.get_schedule().eta(t)).clamp(*kind.range))
