"""Samplers of flow maps, one function each and one signature: sampler(model, x, times, condition, guidance, noise) -> x at
times[-1].

    model     has f(x, s, t, condition, guidance), the flow map, and config.flow
    x         float64 [N, C, H, W], noise of standard deviation sigma_data at times[0]
    times     descending floats, times[0] = T to times[-1] = epsilon: len(times) - 1 evaluations
    condition a `Condition` or None
    guidance  w of classifier-free guidance, or w(t) of a step's time; other than 1 costs two evaluations a step
    noise     noise(i) -> standard normal like x, for step i; only samplers that add noise call it

Zhou et al., "Inductive Moment Matching", arXiv:2503.07565, algorithms 4 and 5. x stays in float64 between steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..config.sections import check_steps
from ..diffusion.process import diffuse
from ..errors import ConfigError
from ..diffusion.flow_map import FlowMapSettings
from ..networks.conditions import Condition

Noise = Callable[[int], Tensor]
Weight = float | Callable[[float], float]

TWO_STEP_ETA = 1.4  # eta of the intermediate time of two-step sampling (IMM, section 6)


def pushforward(model, x: Tensor, times: Sequence[float], condition: Condition | None, guidance: Weight, noise: Noise) -> Tensor:
    """Algorithm 4: jump from each time to the next. Nothing random after the start."""
    for t, s in zip(times[:-1], times[1:], strict=True):
        x = model.f(x, full(x, s), full(x, t), condition, at(guidance, t))
    return x


def restart(model, x: Tensor, times: Sequence[float], condition: Condition | None, guidance: Weight, noise: Noise) -> Tensor:
    """Algorithm 5: from each time jump to the end, then go back to the next time with fresh noise."""
    flow = model.config.flow
    for i, t in enumerate(times[:-1]):
        clean = model.f(x, full(x, times[-1]), full(x, t), condition, at(guidance, t))
        if i < len(times) - 2:
            x = diffuse(flow.get_schedule(), clean, flow.sigma_data * noise(i + 1), full(x, times[i + 1]))
    return clean


SAMPLERS = {"pushforward": pushforward, "restart": restart}


def at(guidance: Weight, t: float) -> float:
    return guidance(t) if callable(guidance) else guidance


def full(x: Tensor, t: float) -> Tensor:
    """The time t for each of the images x [N, ...], float64 [N]."""
    return torch.full((x.shape[0],), t, dtype=torch.float64, device=x.device)


GRIDS = ("default", "uniform", "edm", "eta")


def time_grid(flow: FlowMapSettings, steps: int, grid: str = "default", etas: Sequence[float] = ()) -> list[float]:
    """steps + 1 descending times from T to epsilon.

    default: what the paper uses, [T, eps] for one step, eta = 1.4 between for two, uniform for more.
    uniform: t_i = T + (N - i)/N (eps - T).
    edm: eta_i = (eta_max^(1/7) + (N - i)/N (eta_min^(1/7) - eta_max^(1/7)))^7 (Karras et al., arXiv:2206.00364, eq. 5).
    eta: the intermediate times are those where eta = sigma/alpha has the values `etas`, descending, steps - 1 of them.
    Raises ConfigError for a grid that cannot be.
    """
    check_steps(steps)
    high, low, schedule = flow.t_max, flow.t_min, flow.get_schedule()
    if grid == "default" and steps == 2:
        grid, etas = "eta", (TWO_STEP_ETA,)
    if grid == "eta":
        if len(etas) != steps - 1:
            raise ConfigError(f"{steps} steps need {steps - 1} intermediate eta values, not {len(etas)}")
        middle = schedule.eta_inverse(torch.tensor(etas, dtype=torch.float64)).tolist()
        times = [high, *middle, low]
        if not all(s < t for t, s in zip(times[:-1], times[1:], strict=True)):  # so that nan is refused too
            ends = torch.tensor([low, high], dtype=torch.float64)
            eta_low, eta_high = schedule.eta(ends).tolist()
            raise ConfigError(f"eta values must descend between {eta_high:.6g} and {eta_low:.6g}, not {list(etas)}")
        return times
    fraction = torch.arange(steps + 1, dtype=torch.float64) / steps
    if grid == "edm":
        eta_low, eta_high = schedule.eta(torch.tensor([low, high], dtype=torch.float64)) ** (1 / 7)
        if not torch.isfinite(eta_high):
            raise ConfigError("the edm grid needs t_max < 1: eta is infinite at t = 1")
        middle = schedule.eta_inverse((eta_high + fraction * (eta_low - eta_high)) ** 7)
    else:
        middle = high + fraction * (low - high)
    return [high, *middle[1:-1].tolist(), low]  # the ends exactly
