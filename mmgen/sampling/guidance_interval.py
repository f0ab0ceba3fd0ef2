"""Guidance at some noise levels only (Kynkaanniemi et al., arXiv:2404.07724, section 3): elsewhere it harms, or does nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..diffusion.flow_map import FlowMapSettings
from ..errors import ConfigError

Interval = tuple[float, ...]  # the ends in sigma / alpha; none at all: everywhere


def check_interval(interval: Interval) -> None:
    """Raises ConfigError for what is no interval."""
    if interval and not (len(interval) == 2 and 0 <= interval[0] < interval[1]):
        raise ConfigError(f"the guidance interval must be two numbers LOW,HIGH with 0 <= LOW < HIGH (sigma), not {list(interval)}")


def weight_at(interval: Interval, guidance: float, sigma: float) -> float:
    """w where LOW < sigma <= HIGH, and 1 elsewhere: the paper's eq. 5."""
    return guidance if not interval or interval[0] < sigma <= interval[1] else 1.0


def weights(
    interval: Interval, guidance: float, flow: FlowMapSettings | None = None
) -> float | Callable[[float], float]:
    """What samplers are given as guidance. flow: of a flow map, whose times t have sigma / alpha = eta(t)."""
    if not interval:
        return guidance
    if flow is None:
        return lambda sigma: weight_at(interval, guidance, sigma)
    eta = flow.get_schedule().eta
    return lambda t: weight_at(interval, guidance, eta(torch.tensor(t, dtype=torch.float64)).item())


def visited(sampler: str, times: Sequence[float]) -> list[float]:
    """The times at which a sampler evaluates the network."""
    return [*times[:-1], *(times[1:-1] if sampler == "heun" else ())]
