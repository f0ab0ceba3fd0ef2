"""Samplers of denoisers, one function each and one signature: sampler(model, y, sigmas, condition, guidance, noise) -> x.

    model     has denoise(y, sigma, condition, guidance), which is x_hat, and settings
    y         float64 [N, C, H, W], x + sigma e at sigmas[0]: see `start`
    sigmas    descending floats, the last 0 (for `restart` sigma_min): len(sigmas) - 1 steps
    condition a `Condition` or None
    guidance  w of classifier-free guidance; other than 1 costs two evaluations instead of one
    noise     noise(i) -> standard normal like y, for step i; only samplers that add noise call it

All state is y = x + sigma e in float64. A model trained on z = a x + s e has y = z / a and sigma = s / a; in these
coordinates the probability-flow ODE of every such process is the same, dy/dsigma = (y - x_hat(y; sigma)) / sigma (Karras et
al., arXiv:2206.00364, eq. 3 and appendix B.2), so that one sampler serves them all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.denoiser import TIMESTEPS, DenoiserSettings, network_time, rounded_sigma, sigma_at, sigma_range
from ..errors import ConfigError
from ..networks.conditions import Condition
from .flow_map_samplers import Noise, full
from ..diffusion.schedules import VARIANCE_PRESERVING, ScheduleSettings, make_schedule

RHO = 7  # of the grid `edm`
PURE_NOISE = 1e12  # sigma of a schedule's t = 1 where it is infinite or more than this: the data are lost in float64 too
RESPACED = ("linspace", "leading")  # grids of timesteps, by the way in which other projects space them
EDM_RANGE = 0.002, 80.0  # of sigma, from which EDM samples the models that know more: vp, ve and iddpm


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


def ddim(model, y: Tensor, sigmas: Sequence[float], condition: Condition | None, guidance: float, noise: Noise) -> Tensor:
    """Song et al., arXiv:2010.02502, eq. 12 with no noise: Euler's method for the ODE. Also that of a flow's own ODE."""
    own_eps = model.settings.clip and not model.settings.clip_eps
    for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        if own_eps:  # diffusers' scheduler: x_hat is clipped, and the noise is the network's
            raw = model.denoise(y, full(y, sigma), condition, guidance, clip=False)
            y = raw.clamp(-1, 1) + following / sigma * (y - raw)
            continue
        x = model.denoise(y, full(y, sigma), condition, guidance)
        y = x + following / sigma * (y - x)
    return y


def ancestral(
    model,
    y: Tensor,
    sigmas: Sequence[float],
    condition: Condition | None,
    guidance: float,
    noise: Noise,
    stochasticity: float = 1.0,
) -> Tensor:
    """DDPM's sampler: each y is drawn from its distribution given the y before and x_hat in the place of x.

    With r = sigma'^2 / sigma^2 that is normal with mean x + r (y - x) and variance sigma'^2 (1 - r) (Ho et al.,
    arXiv:2006.11239, eqs. 6 and 7, in these coordinates). `stochasticity` times the standard deviation is drawn, and the noise
    that y has keeps the rest of the variance: 0 is `ddim` (see `diffusion.posterior`).
    """
    for i, (sigma, following) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        x = model.denoise(y, full(y, sigma), condition, guidance)
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
    guidance: float,
    noise: Noise,
    churn: Churn = Churn(),
) -> Tensor:
    """Karras et al., arXiv:2206.00364, algorithm 2 (with churn = 0 algorithm 1): second order, two evaluations a step but the
    last, which has one."""
    for i, (sigma, following) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        raised = rounded_sigma(model.settings, sigma * (1 + churn.gamma(sigma, len(sigmas) - 1)))
        if raised > sigma:
            y = y + math.sqrt(raised**2 - sigma**2) * churn.s_noise * noise(i + 1)
        else:
            raised = sigma
        x = model.denoise(y, full(y, raised), condition, guidance)
        euler = x + following / raised * (y - x)
        if following == 0:
            return euler
        slope = (y - x) / raised
        corrected = (euler - model.denoise(euler, full(y, following), condition, guidance)) / following
        y = y + (following - raised) * 0.5 * (slope + corrected)
    return y


def restart(model, y: Tensor, sigmas: Sequence[float], condition: Condition | None, guidance: float, noise: Noise) -> Tensor:
    """Of a consistency model: from each sigma jump to the end, then go back to the next with fresh noise (Song et al.,
    arXiv:2303.01469, algorithm 1)."""
    for i, sigma in enumerate(sigmas[:-1]):
        x = model.denoise(y, full(y, sigma), condition, guidance)
        if i < len(sigmas) - 2:
            y = x + math.sqrt(sigmas[i + 1] ** 2 - sigmas[-1] ** 2) * noise(i + 1)
    return x


SAMPLERS = {"ddim": ddim, "ancestral": ancestral, "heun": heun}
CONSISTENCY_SAMPLERS = {"restart": restart}
STEPS = {"ddim": 50, "ancestral": 250, "heun": 18, "restart": 1}  # where neither the user nor the model says


def samplers_of(settings: DenoiserSettings) -> dict:
    """The samplers that suit a model, the usual one first: heun where EDM trained it, else ddim."""
    if settings.precondition == "cm":
        return CONSISTENCY_SAMPLERS
    usual = "ddim" if settings.precondition in ("discrete", "flow", "schedule") else "heun"
    return {usual: SAMPLERS[usual], **SAMPLERS}


def evaluations(sampler: str, steps: int) -> int:
    """Evaluations of the denoiser in so many steps."""
    return 2 * steps - 1 if sampler == "heun" else steps


def most_steps(settings: DenoiserSettings) -> float:
    """How many steps there can be: of models with timesteps as many as those."""
    return {"discrete": settings.num_timesteps, "iddpm": TIMESTEPS}.get(settings.precondition, math.inf)


def start(settings: DenoiserSettings, sigma: float, noise: Tensor, schedule: ScheduleSettings | None = None) -> Tensor:
    """y at the first sigma, of standard normal noise [N, C, H, W]: sigma noise, the data being lost in it.

    Models with timesteps are sampled from z = noise, which has the variance 1 that their z has: then y = sqrt(1 + sigma^2)
    noise. So are those of a variance-preserving schedule: their own, or a student's, `schedule`.
    """
    schedule = schedule or settings.schedule
    preserving = settings.precondition == "discrete" if schedule is None else schedule.name in VARIANCE_PRESERVING
    return (math.sqrt(1 + sigma**2) if preserving else sigma) * noise


def sigma_grid(
    settings: DenoiserSettings,
    steps: int,
    grid: str = "default",
    etas: Sequence[float] = (),
    sampler: str = "default",
    schedule: ScheduleSettings | None = None,
) -> list[float]:
    """steps + 1 descending sigmas; the last is 0, for a consistency model sigma_min.

    edm: sigma_i = (sigma_max^(1/7) + i/(n - 1) (sigma_min^(1/7) - sigma_max^(1/7)))^7 for i < n = steps (Karras et al.,
    eq. 5), from sigma_max to sigma_min as far as the model knows them; vp, ve and iddpm from 80 to 0.002 at most, as EDM.
    uniform: evenly spaced in the time that the network is given. That is linear in t for `vp` and `flow`, geometric in sigma
    for edm, ve and edm_cm; for timesteps it is every T/n-th, beginning with the last one, T - 1 (Lin et al.,
    arXiv:2305.08891, table 2, "trailing"), and for `iddpm` those from sigma_max to sigma_min. For `flow` and `schedule` t = 1
    is the first and 1/n the last.
    linspace: timesteps round(i (T - 1)/(n - 1)), both ends included, as guided-diffusion and DiT respace them. leading: every
    T/n-th, beginning with timestep 0, diffusers' default. Both for timesteps only (arXiv:2305.08891, table 2).
    schedule: sigma at t = 1, (n - 1)/n, ..., 1/n of `schedule`, a student's (Salimans et al., arXiv:2406.04103, algorithm 1).
    Here and where `schedule` is the model's own, sigma may lie outside `sigma_range`: such a step is taken as it is, with x_hat
    by `Denoiser.denoise_within`. Where it is infinite at t = 1, it is 1e12.
    default: schedule where there is one, uniform for timesteps, flows and models of a schedule, but edm if the sampler is heun;
    otherwise edm.
    eta: the values `etas`, descending, steps - 1 of them, between those ends.
    Raises ConfigError for a grid that cannot be.
    """
    if steps < 1:
        raise ConfigError(f"steps must be at least 1, not {steps}")
    kind = settings.precondition
    if steps > (total := most_steps(settings)):
        raise ConfigError(f"this model has {total} timesteps, so that {steps} steps cannot be: take at most {total}")
    low, high = sigma_range(settings)
    asked = grid
    if grid == "default":
        usual = "schedule" if schedule else "uniform" if kind in ("discrete", "flow", "schedule") else "edm"
        grid = "edm" if sampler == "heun" else usual
    if grid in RESPACED and kind != "discrete":
        raise ConfigError(f"the grid {grid} is for models with timesteps, and this one has none: take uniform or edm")
    if grid == "schedule" and schedule is None:
        raise ConfigError("the grid schedule is for students, and this model is none: take uniform or edm")
    if grid == "uniform" and kind == "schedule":
        grid, schedule = "schedule", settings.schedule
    # Up to a sigma of hundreds, thousands, or infinity
    far = kind in ("discrete", "flow") if grid in ("uniform", *RESPACED) else grid == "schedule" and schedule.name != "edm"
    if far and sampler == "heun":  # the mean of two slopes, of which one is far away
        raise ConfigError(
            f"heun cannot take the first step of this model's {asked} grid, where sigma falls too far: use the grid edm"
        )
    if grid == "schedule":
        t = 1 - torch.arange(steps, dtype=torch.float64) / steps
        if schedule.name == "discrete":  # whole timesteps, as diffusers has them
            t = (t * schedule.num_timesteps).round() / schedule.num_timesteps
        return [*make_schedule(schedule).eta(t).clamp(max=PURE_NOISE).tolist(), 0.0]
    if grid == "edm":
        ends = EDM_RANGE if kind in ("vp", "ve", "iddpm") else (settings.sigma_min, settings.sigma_max)
        low, high = max(low, ends[0]), min(high, ends[1])
    count = steps + (kind == "cm")  # of a consistency model sigma_min is the end, and not evaluated
    if grid == "eta":
        if len(etas) != steps - 1:
            raise ConfigError(f"{steps} steps need {steps - 1} intermediate eta values, not {len(etas)}")
        sigmas = [high, *etas, *([low] if kind == "cm" else [])]
        if not all(following < sigma for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True)) or sigmas[-1] < low:
            raise ConfigError(f"eta values must descend between {high:.6g} and {low:.6g}, not {list(etas)}")
    elif grid == "edm":
        fraction = torch.arange(count, dtype=torch.float64) / max(count - 1, 1)
        first, last = high ** (1 / RHO), low ** (1 / RHO)
        sigmas = ((first + fraction * (last - first)) ** RHO).tolist()
        sigmas[0] = high
        if count > 1:
            sigmas[-1] = low
    else:
        sigmas = sigma_at(settings, _uniform_times(settings, count, high, low, grid)).tolist()
    # Of few timesteps two neighbours may be the same one: a step that changes nothing, as EDM has it
    sigmas = [rounded_sigma(settings, sigma) for sigma in sigmas]
    return sigmas if kind == "cm" else [*sigmas, 0.0]


def _uniform_times(settings: DenoiserSettings, count: int, high: float, low: float, grid: str) -> Tensor:
    """The network's times of `count` steps, float64 [count], the noisiest first."""
    i = torch.arange(count, dtype=torch.float64)
    if grid == "linspace":
        return ((settings.num_timesteps - 1) * (1 - i / max(count - 1, 1))).round()
    if grid == "leading":
        return (i * (settings.num_timesteps // count)).flip(0)
    if settings.precondition == "discrete":
        return (settings.num_timesteps * (1 - i / count)).round() - 1
    if settings.precondition == "flow":
        return i / count
    ends = network_time(settings, torch.tensor([high, low], dtype=torch.float64))
    return ends[0] + i / max(count - 1, 1) * (ends[1] - ends[0])
