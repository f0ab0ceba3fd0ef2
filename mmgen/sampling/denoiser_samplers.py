"""Samplers of denoisers, one function each and one signature: sampler(model, y, sigmas, condition, guidance, noise) -> x.

    model     has denoise(y, sigma, condition, guidance), which is x_hat, and settings
    y         float64 [N, C, H, W], x + sigma e at sigmas[0]: see `start`
    sigmas    descending floats, the last 0 (for `restart` sigma_min): len(sigmas) - 1 steps
    condition a `Condition` or None
    guidance  w of classifier-free guidance, or w(sigma); other than 1 costs two evaluations instead of one
    noise     noise(i) -> standard normal like y, for step i; only samplers that add noise call it

All state is y = x + sigma e in float64. A model trained on z = a x + s e has y = z / a and sigma = s / a; in these
coordinates the probability-flow ODE of every such process is the same, dy/dsigma = (y - x_hat(y; sigma)) / sigma (Karras et
al., arXiv:2206.00364, eq. 3 and appendix B.2), so that one sampler serves them all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..diffusion.preconditioning import DenoiserSettings, preconditioning
from ..networks.conditions import Condition
from .flow_map_samplers import Noise, Weight, at, full
from ..diffusion.schedules import ScheduleSettings, make_schedule


@dataclass(frozen=True)
class Churn:
    """Noise that `heun` adds before a step, to correct errors of earlier ones (Karras et al., algorithm 2)."""

    amount: float = 0.0  # S_churn; 0: none, and the sampler is deterministic
    s_tmin: float = 0.0
    s_tmax: float | None = None  # None: no limit
    s_noise: float = 1.0

    def gamma(self, sigma: float, steps: int) -> float:
        """How much larger sigma becomes, relatively."""
        inside = self.s_tmin <= sigma and (self.s_tmax is None or sigma <= self.s_tmax)
        return min(self.amount / steps, math.sqrt(2) - 1) if inside else 0.0


def ddim(model, y: Tensor, sigmas: Sequence[float], condition: Condition | None, guidance: Weight, noise: Noise) -> Tensor:
    """Song et al., arXiv:2010.02502, eq. 12 with no noise: Euler's method for the ODE. Also that of a flow's own ODE."""
    own_eps = model.settings.clip and not model.settings.clip_eps
    for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        if own_eps:  # diffusers' scheduler: x_hat is clipped, and the noise is the network's
            raw = model.denoise(y, full(y, sigma), condition, at(guidance, sigma), clip=False)
            y = raw.clamp(-1, 1) + following / sigma * (y - raw)
            continue
        x = model.denoise(y, full(y, sigma), condition, at(guidance, sigma))
        y = x + following / sigma * (y - x)
    return y


def ancestral(
    model,
    y: Tensor,
    sigmas: Sequence[float],
    condition: Condition | None,
    guidance: Weight,
    noise: Noise,
    stochasticity: float = 1.0,
) -> Tensor:
    """DDPM's sampler: each y is drawn from its distribution given the y before and x_hat in the place of x.

    With r = sigma'^2 / sigma^2 that is normal with mean x + r (y - x) and variance sigma'^2 (1 - r) (Ho et al.,
    arXiv:2006.11239, eqs. 6 and 7, in these coordinates). `stochasticity` times the standard deviation is drawn, and the noise
    that y has keeps the rest of the variance: 0 is `ddim` (see `diffusion.posterior`).
    """
    for i, (sigma, following) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        x = model.denoise(y, full(y, sigma), condition, at(guidance, sigma))
        ratio = (following / sigma) ** 2
        kept = ratio if stochasticity == 1 else following / sigma * math.sqrt(1 - stochasticity**2 * (1 - ratio))
        y = x + kept * (y - x)
        if following > 0 and stochasticity > 0:
            y = y + stochasticity * following * math.sqrt(1 - ratio) * noise(i + 1)
    return y


def heun(
    model,
    y: Tensor,
    sigmas: Sequence[float],
    condition: Condition | None,
    guidance: Weight,
    noise: Noise,
    churn: Churn = Churn(),
) -> Tensor:
    """Karras et al., arXiv:2206.00364, algorithm 2 (with churn = 0 algorithm 1): second order, two evaluations a step but the
    last, which has one."""
    for i, (sigma, following) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        raised = preconditioning(model.settings).rounded(sigma * (1 + churn.gamma(sigma, len(sigmas) - 1)))
        if raised > sigma:
            y = y + math.sqrt(raised**2 - sigma**2) * churn.s_noise * noise(i + 1)
        else:
            raised = sigma
        x = model.denoise(y, full(y, raised), condition, at(guidance, raised))
        euler = x + following / raised * (y - x)
        if following == 0:
            return euler
        slope = (y - x) / raised
        corrected = (euler - model.denoise(euler, full(y, following), condition, at(guidance, following))) / following
        y = y + (following - raised) * 0.5 * (slope + corrected)
    return y


def restart(model, y: Tensor, sigmas: Sequence[float], condition: Condition | None, guidance: Weight, noise: Noise) -> Tensor:
    """Of a consistency model: from each sigma jump to the end, then go back to the next with fresh noise (Song et al.,
    arXiv:2303.01469, algorithm 1)."""
    for i, sigma in enumerate(sigmas[:-1]):
        x = model.denoise(y, full(y, sigma), condition, at(guidance, sigma))
        if i < len(sigmas) - 2:
            y = x + math.sqrt(sigmas[i + 1] ** 2 - sigmas[-1] ** 2) * noise(i + 1)
    return x


SAMPLERS = {"ddim": ddim, "ancestral": ancestral, "heun": heun}
CONSISTENCY_SAMPLERS = {"restart": restart}
STEPS = {"ddim": 50, "ancestral": 250, "heun": 18, "restart": 1}  # where neither the user nor the model says


def samplers_of(settings: DenoiserSettings) -> dict:
    """The samplers that suit a model, the usual one first."""
    kind = preconditioning(settings)
    if kind.is_consistency:
        return CONSISTENCY_SAMPLERS
    return {kind.sampler: SAMPLERS[kind.sampler], **SAMPLERS}


def most_steps(settings: DenoiserSettings) -> float:
    """How many steps there can be: of models with timesteps as many as those."""
    return preconditioning(settings).num_timesteps or math.inf


def start(
    settings: DenoiserSettings, sigma: float, noise: Tensor, schedule: ScheduleSettings | None = None, grid: str = "default"
) -> Tensor:
    """y at the first sigma, of standard normal noise [N, C, H, W]: sigma noise, the data being lost in it.

    Models with timesteps are sampled from z = noise, which has the variance 1 that their z has: then y = sqrt(1 + sigma^2)
    noise. So are those of a variance-preserving schedule: their own, or a student's, `schedule`. The grid `flow` begins a little
    before the noise is all, and from z = noise nonetheless: z = y / (1 + sigma).
    """
    if grid == "flow":
        return (1 + sigma) * noise
    preserving = make_schedule(schedule).keeps == "variance" if schedule else preconditioning(settings).variance_preserving
    return (math.sqrt(1 + sigma**2) if preserving else sigma) * noise
