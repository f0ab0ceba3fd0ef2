"""Time grids of denoisers, one function each: the sigmas of `steps` steps, descending, without the end at 0.

A further grid is one function here and one line in `sigma_grid`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..config.sections import check_steps
from ..diffusion.preconditioning import DenoiserSettings, Preconditioning, preconditioning
from ..diffusion.schedules import ScheduleSettings, make_schedule
from ..errors import ConfigError

RHO = 7  # of the grid `edm`
PURE_NOISE = 1e12  # sigma of a schedule's t = 1 where it is infinite or more than this: the data are lost in float64 too
# Grids by the way in which other projects space them, and the kinds of model that they are for
RESPACED = {"linspace": ("discrete", "schedule"), "leading": ("discrete",), "flow": ("schedule",)}


def edm(kind: Preconditioning, count: int) -> list[float]:
    """sigma_i = (high^(1/7) + i/(n - 1) (low^(1/7) - high^(1/7)))^7 for i < n (Karras et al., arXiv:2206.00364, eq. 5).

    high and low are sigma_max and sigma_min as far as the model knows them; for vp, ve and iddpm 80 and 0.002 at most, as EDM.
    """
    low, high = max(kind.range[0], kind.edm_range[0]), min(kind.range[1], kind.edm_range[1])
    fraction = torch.arange(count, dtype=torch.float64) / max(count - 1, 1)
    first, last = high ** (1 / RHO), low ** (1 / RHO)
    inner = ((first + fraction * (last - first)) ** RHO).tolist()[1:-1]
    return [high, *inner, low][:count]  # the ends exactly


def uniform(kind: Preconditioning, count: int) -> list[float]:
    """Evenly spaced in the time that the network is given, from sigma_max to sigma_min.

    That is linear in t for vp and geometric in sigma for edm, ve and edm_cm. A flow ends one step before the data. For timesteps
    it is every T/n-th, beginning with the last one.
    """
    return kind.sigma(kind.even_times(count, kind.range[1], kind.range[0])).tolist()


def linspace(kind: Preconditioning, count: int) -> list[float]:
    """Timesteps round(i (T - 1)/(n - 1)), both ends included, as guided-diffusion and DiT respace them (arXiv:2305.08891, table 2)."""
    i = torch.arange(count, dtype=torch.float64)
    return kind.sigma(((kind.num_timesteps - 1) * (1 - i / max(count - 1, 1))).round()).tolist()


def leading(kind: Preconditioning, count: int) -> list[float]:
    """Every T/n-th timestep, beginning with timestep 0: diffusers' default (arXiv:2305.08891, table 2)."""
    return kind.sigma((torch.arange(count, dtype=torch.float64) * (kind.num_timesteps // count)).flip(0)).tolist()


def evenly_in(schedule: ScheduleSettings, count: int) -> list[float]:
    """sigma at t = 1, (n - 1)/n, ..., 1/n of a schedule, a student's (Salimans et al., arXiv:2406.04103, algorithm 1).

    It may lie outside the model's range: such a step is taken as it is, with x_hat by `Denoiser.denoise_within`. Where it is
    infinite at t = 1, it is 1e12.
    """
    t = 1 - torch.arange(count, dtype=torch.float64) / count
    if schedule.name == "discrete":  # whole timesteps, as diffusers has them
        t = (t * schedule.num_timesteps).round() / schedule.num_timesteps
    return make_schedule(schedule).eta(t).clamp(max=PURE_NOISE).tolist()


def both_ends(schedule: ScheduleSettings, count: int, first: float) -> list[float]:
    """sigma at n times from 1 to the one at which flow matching has its `first` timestep, evenly spaced, both included: diffusers'
    FlowMatchEulerDiscreteScheduler, which shifts its ends and then all times between them once more."""
    made = make_schedule(schedule)
    last = made.sigma(torch.tensor(first, dtype=torch.float64))
    t = 1 - (1 - last) * torch.arange(count, dtype=torch.float64) / max(count - 1, 1)
    return made.eta(t).clamp(max=PURE_NOISE).tolist()


def flow(schedule: ScheduleSettings, count: int, first: float) -> list[float]:
    """sigma at j/n of the time 1 - `first`, a timestep before the end: diffusers' DPMSolverMultistepScheduler with flow sigmas."""
    t = (1 - first) * (1 - torch.arange(count, dtype=torch.float64) / count)
    return make_schedule(schedule).eta(t).tolist()


def given(kind: Preconditioning, steps: int, etas: Sequence[float]) -> list[float]:
    """The values `etas`, descending, steps - 1 of them, after sigma_max."""
    low, high = kind.range
    if len(etas) != steps - 1:
        raise ConfigError(f"{steps} steps need {steps - 1} intermediate eta values, not {len(etas)}")
    sigmas = [high, *etas, *([low] if kind.is_consistency else [])]
    if not all(following < sigma for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True)) or sigmas[-1] < low:
        raise ConfigError(f"eta values must descend between {high:.6g} and {low:.6g}, not {list(etas)}")
    return sigmas


def sigma_grid(
    settings: DenoiserSettings,
    steps: int,
    grid: str = "default",
    etas: Sequence[float] = (),
    sampler: str = "default",
    schedule: ScheduleSettings | None = None,
) -> list[float]:
    """steps + 1 descending sigmas; the last is 0, for a consistency model sigma_min. `schedule`: a student's.

    default: schedule where there is one, else the usual one of the model's kind, but edm if the sampler is heun.
    Raises ConfigError for a grid that cannot be.
    """
    kind = preconditioning(settings)
    name, schedule = _named(kind, grid, sampler, schedule)
    check_steps(steps)
    if kind.num_timesteps is not None and steps > kind.num_timesteps:
        total = kind.num_timesteps
        raise ConfigError(f"this model has {total} timesteps, so that {steps} steps cannot be: take at most {total}")
    if name == "schedule":
        return [*evenly_in(schedule, steps), 0.0]
    if name in RESPACED and kind.settings.precondition == "schedule":
        spaced = {"linspace": both_ends, "flow": flow}[name]
        return [*spaced(schedule or kind.process, steps, 1 / kind.settings.time_scale), 0.0]
    count = steps + kind.is_consistency  # its last one, sigma_min, is the end and not evaluated
    if name == "eta":
        sigmas = given(kind, steps, etas)
    else:
        sigmas = {"edm": edm, "uniform": uniform, "linspace": linspace, "leading": leading}[name](kind, count)
    # Of few timesteps two neighbours may be the same one: a step that changes nothing, as EDM has it
    sigmas = [kind.rounded(sigma) for sigma in sigmas]
    return sigmas if kind.is_consistency else [*sigmas, 0.0]


def _named(
    kind: Preconditioning, grid: str, sampler: str, schedule: ScheduleSettings | None
) -> tuple[str, ScheduleSettings | None]:
    """The grid's function and schedule. Raises ConfigError for one that does not suit the model or the sampler."""
    name = grid
    if name == "default":
        name = "edm" if sampler == "heun" else "schedule" if schedule else kind.grid
    own = kind.settings.precondition
    if name in RESPACED and (own not in RESPACED[name] or (own == "schedule" and kind.process.name != "fm")):
        which = " or ".join({"discrete": "models with timesteps", "schedule": "flows (fm)"}[one] for one in RESPACED[name])
        raise ConfigError(f"the grid {name} is for {which}, and this model is none: take uniform or edm")
    if name == "schedule" and schedule is None:
        raise ConfigError("the grid schedule is for students, and this model is none: take uniform or edm")
    if name == "uniform" and kind.settings.schedule is not None:
        name, schedule = "schedule", kind.settings.schedule
    far = kind.far or own == "schedule" if name in ("uniform", *RESPACED) else name == "schedule" and schedule.name != "edm"
    if far and sampler == "heun":  # the mean of two slopes, of which one is far away
        raise ConfigError(
            f"heun cannot take the first step of this model's {grid} grid, where sigma falls too far: use the grid edm"
        )
    return name, schedule
