"""Drawing images from a model: which noise, which classes, which times. Image i depends on (seed, i) alone."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from . import denoiser_samplers as diffusion
from ..models.denoiser import Denoiser
from ..models.autoguidance import autoguided
from ..models.guidance import is_told
from .classes import class_numbers, random_labels, with_images
from .types import check_types
from .denoiser_samplers import Churn
from .prompts import cut_prompts, text_condition, texts_of
from .sigma_grids import RESPACED, sigma_grid
from ..config.sections import check_steps
from ..diffusion.preconditioning import preconditioning
from ..errors import ConfigError, nearest
from ..models.build import AnyModel
from ..models.compilation import compile_network
from ..models.config import ModelConfig, SamplingSettings, drawn_shape, is_conditional, kind_of
from ..models.pixels import to_uint8
from ..models.precision import check_precision, computed_in
from ..networks.conditions import Condition, Labels
from ..networks.text import BYTES
from ..system.random import keys, normal, uniform
from .flow_map_samplers import GRIDS, SAMPLERS, at, time_grid
from .guidance import Guide, check_guidance_defaults, choose_guidance, evaluations
from .guidance_interval import visited, weights

_LABEL, _NOISE = 1, 2  # purposes of random numbers; the noise of step i has _NOISE + i
_OWN = 10_000  # what a student draws itself in evaluation c has _OWN + c


@dataclass(frozen=True)
class SampleSettings:
    """How to sample. None: the model's own default."""

    steps: int | None = None  # of the sampler; `Plan.nfe` are the network evaluations that they cost
    seed: int = 0  # image i has the random numbers of (seed, i)
    classes: str | Sequence[int | str] = "random"  # as often as in the training data; balanced; or as `class_numbers` has it
    prompts: tuple[str, ...] = ()  # of a text model: image i has prompt i mod P; none: captions of the training data at random
    negative: str = ""  # of a text model with guidance: what it is led away from
    guidance: float | None = None  # w of classifier-free guidance; 1: none
    guide: Guide | None = None  # what guidance leads away from, in place of the null: a worse version of the model, or its name
    guidance_interval: tuple[float, ...] | None = None  # LOW, HIGH: the sigma / alpha at which guidance acts; (): everywhere
    sampler: str | None = None  # of a flow map pushforward or restart, of a denoiser ddim, ancestral or heun
    grid: str | None = None  # default, uniform, edm, eta or schedule: see `time_grid`, `sigma_grids`
    etas: tuple[float, ...] = ()  # intermediate eta values of the grid `eta`
    churn: float | None = None  # S_churn of heun, and what else it has: see `diffusion_samplers.Churn`
    s_tmin: float | None = None
    s_tmax: float | None = None
    s_noise: float | None = None
    stochasticity: float | None = None  # of ancestral: 1 is DDPM, 0 is DDIM: see `diffusion.posterior`
    batch_size: int = 256  # images at a time; has no influence on the images
    precision: str | None = None  # fp32, tf32, bf16 or fp16; None: as the weights are, on a GPU by torch's own settings
    compile: bool = False  # torch.compile the network first, for many images on a GPU

    def __post_init__(self) -> None:
        check_types(self)
        if self.guide is not None and not isinstance(self.guide, Guide):
            object.__setattr__(self, "guide", Guide.of(self.guide))


@dataclass(frozen=True)
class Plan:
    """Settings with the model's defaults filled in, checked against the model."""

    steps: int
    seed: int
    classes: str | list[int]
    guidance: float
    sampler: str
    grid: str
    times: list[float]  # of a denoiser: sigmas
    nfe: int  # network evaluations per image
    churn: Churn | None  # None: nothing is churned
    batch_size: int
    stochasticity: float = 1.0
    guidance_interval: tuple[float, ...] = ()
    guide: Guide | None = None
    prompts: tuple[str, ...] = ()
    negative: str = ""
    notes: tuple[str, ...] = ()  # what a person should know, a sentence each
    precision: str | None = None
    compile: bool = False


def plan(config: ModelConfig, settings: SampleSettings) -> Plan:
    """Raises ConfigError where the settings do not suit the model."""
    grid = config.sampling.grid if settings.grid is None else settings.grid
    if settings.etas and settings.grid is None:
        grid = "eta"
    if settings.etas and grid != "eta":
        raise ConfigError(f"eta values need the grid 'eta', not {grid!r}")
    check_defaults(config)
    sampler = choose_sampler(config, config.sampling.sampler if settings.sampler is None else settings.sampler)
    if settings.grid is None and grid in RESPACED and sampler == "heun":  # which cannot start from pure noise
        grid = "default"
    grids = GRIDS if config.sampling.schedule is None else (*GRIDS, "schedule")
    grids = (*grids, *RESPACED) if config.denoiser is not None else grids
    if grid not in grids:
        raise ConfigError(f"unknown grid {grid!r}: {nearest(grid, grids)}")
    if settings.batch_size < 1:
        raise ConfigError(f"the batch size must be at least 1, not {settings.batch_size}")
    _check_kind(config, settings)
    classes = class_numbers(settings.classes, config)
    if not is_conditional(config) and classes != "random":
        raise ConfigError("classes cannot be chosen: this model is unconditional")
    guidance, interval, doubtful = choose_guidance(config, settings)
    steps = settings.steps
    if steps is None:
        steps = len(settings.etas) + 1 if grid == "eta" else _default_steps(config, sampler)
    if config.denoiser is None:
        times = time_grid(config.flow, steps, grid, settings.etas)
    else:
        times = sigma_grid(config.denoiser, steps, grid, settings.etas, sampler, config.sampling.schedule)
    weight = weights(interval, guidance, config.flow)
    return Plan(
        steps=steps,
        seed=settings.seed,
        classes=classes,
        guidance=guidance,
        sampler=sampler,
        grid=grid,
        times=times,
        nfe=sum(evaluations(config, at(weight, t), settings.guide) for t in visited(sampler, times)),
        churn=_churn(config.sampling, settings, sampler),
        batch_size=settings.batch_size,
        guidance_interval=interval,
        guide=settings.guide,
        stochasticity=_stochasticity(config, settings, sampler),
        prompts=settings.prompts,
        negative=settings.negative,
        notes=_notes(config, steps, sampler, grid, doubtful) + _cut_note(config, settings.prompts),
        precision=check_precision(settings.precision),
        compile=settings.compile,
    )


def _check_kind(config: ModelConfig, settings: SampleSettings) -> None:
    """Raises ConfigError for prompts of a model that takes none, and classes of one that takes prompts."""
    if config.text is None and (settings.prompts or settings.negative):
        kind = "draws classes: choose them with --classes" if config.num_classes else "is unconditional"
        raise ConfigError(f"this model takes no prompts, it {kind}")
    if config.text is None:
        return
    if settings.classes != "random":
        raise ConfigError("this model has no classes, it draws what a text says: give --prompt or --prompts")
    if settings.negative and config.sampling.student_steps is not None:
        raise ConfigError(
            "a negative prompt has no effect on a student: its teacher's guidance is built in, with the empty prompt; leave it out"
        )


def _cut_note(config: ModelConfig, prompts: tuple[str, ...]) -> tuple[str, ...]:
    cut = cut_prompts(config.text, prompts) if prompts else 0
    what = "bytes" if config.text is not None and config.text.encoder == BYTES else "tokens"
    few = f"{cut:,} of {len(set(prompts)):,} prompts are longer than the {config.text.length} {what}" if cut else ""
    return (f"{few} that this model reads: their ends are cut off",) if cut else ()


def samplers_of(config: ModelConfig) -> dict[str, Callable]:
    """The samplers that suit a model; the first is its default. A student's is the one that it was distilled for."""
    if config.sampling.student_steps is not None and config.denoiser is not None:
        return {"ancestral": diffusion.ancestral, **diffusion.SAMPLERS}
    return SAMPLERS if kind_of(config) == "imm" else diffusion.samplers_of(config.denoiser)


def choose_sampler(config: ModelConfig, name: str) -> str:
    """The sampler that a name means for a model. Raises ConfigError for one that is not for it."""
    valid = samplers_of(config)
    if name == "default":
        return next(iter(valid))
    if name in valid:
        return name
    if name in SAMPLERS or name in diffusion.SAMPLERS:
        kind = "a flow map" if config.denoiser is None else "a diffusion model"
        if config.denoiser is not None and preconditioning(config.denoiser).is_consistency:
            kind = "a consistency model"
        raise ConfigError(f"the sampler {name!r} is not for {kind}, which this model is: take {' or '.join(valid)}")
    raise ConfigError(f"unknown sampler {name!r}: {nearest(name, valid)}")


def check_defaults(config: ModelConfig) -> None:
    """Raises ConfigError where a model's own defaults do not suit it, or would be ignored."""
    defaults = config.sampling
    if defaults.steps is not None:
        check_steps(defaults.steps, "sampling.steps")
    check_guidance_defaults(config)
    sampler = choose_sampler(config, defaults.sampler)
    student = defaults.schedule is not None, defaults.student_steps is not None
    if config.denoiser is None and any(student):
        raise ConfigError("sampling.schedule and sampling.student_steps are for students, and a flow map is none")
    if student == (False, True) or (defaults.student_steps is not None and defaults.student_steps < 1):
        raise ConfigError("sampling.student_steps must be at least 1, and needs sampling.schedule")
    if defaults.grid == "schedule" and defaults.schedule is None:
        raise ConfigError("sampling.grid 'schedule' needs sampling.schedule")
    if defaults.stochasticity != 1 and sampler != "ancestral":
        raise ConfigError(f"sampling.stochasticity is for the sampler ancestral, and this model's is {sampler}")
    churned = (defaults.churn, defaults.s_tmin, defaults.s_tmax, defaults.s_noise) != (0.0, 0.0, None, 1.0)
    if churned and sampler != "heun":
        raise ConfigError(f"sampling.churn is for the sampler heun, and this model's is {sampler}")


def _default_steps(config: ModelConfig, sampler: str) -> int:
    own = choose_sampler(config, config.sampling.sampler)
    if config.sampling.steps is not None and sampler == own:
        return config.sampling.steps
    if config.sampling.student_steps is not None:
        return config.sampling.student_steps
    return 1 if config.denoiser is None else min(diffusion.STEPS[sampler], diffusion.most_steps(config.denoiser))


def _stochasticity(config: ModelConfig, settings: SampleSettings, sampler: str) -> float:
    """1 of samplers that have none. Raises ConfigError where it has no effect, or no sense."""
    if sampler != "ancestral":
        if settings.stochasticity is not None:
            raise ConfigError(f"stochasticity: only the sampler ancestral has it, and this one is {sampler}")
        return 1.0
    chosen = config.sampling.stochasticity if settings.stochasticity is None else settings.stochasticity
    if not 0 <= chosen <= 1:
        raise ConfigError(f"stochasticity must be a number from 0 (ddim) to 1, not {chosen}")
    return chosen


def _notes(config: ModelConfig, steps: int, sampler: str, grid: str, doubtful: float) -> tuple[str, ...]:
    """Where a student is sampled otherwise than it was distilled for, or a `doubtful` guidance may not be possible."""
    own = config.sampling.student_steps
    notes = []
    if doubtful != 1:
        notes.append(
            f"guidance {doubtful:g} needs a model that also learned images without a class (label dropout), and nothing says "
            "whether this one did"
        )
    if own is None:
        return tuple(notes)
    if steps != own:
        notes.append(f"this student was distilled for {own} step{'s' * (own > 1)}, and its images of {steps} may be worse")
    if sampler != "ancestral":
        notes.append(f"this student was distilled for the sampler ancestral, and its images by {sampler} may be worse")
    elif grid not in ("default", config.sampling.grid, "schedule"):
        notes.append(f"this student was distilled for the grid {'flow' if config.sampling.grid == 'flow' else 'schedule'}, and its images on the grid {grid} may be worse")
    return tuple(notes)


def _churn(defaults: SamplingSettings, settings: SampleSettings, sampler: str) -> Churn | None:
    """What heun churns, None if nothing. Raises ConfigError for settings without effect or sense."""
    names = ("churn", "s_tmin", "s_tmax", "s_noise")
    given = {name: getattr(settings, name) for name in names if getattr(settings, name) is not None}
    if sampler != "heun":
        if given:
            raise ConfigError(f"{', '.join(given)}: only the sampler heun churns, and this one is {sampler}")
        return None
    chosen = {name: given.get(name, getattr(defaults, name)) for name in names}
    for name, value in chosen.items():
        if value is not None and not 0 <= value < math.inf:
            raise ConfigError(f"{name} must be a number that is not negative, not {value}")
    if chosen["churn"] == 0:
        useless = [name for name in given if name != "churn"]
        if useless:
            raise ConfigError(f"{', '.join(useless)}: nothing is churned; give churn too")
        return None
    return Churn(chosen["churn"], chosen["s_tmin"], chosen["s_tmax"], chosen["s_noise"])


Tell = Callable[[float], None]  # called with the number of images drawn, a fraction while a batch is under way


def draw(
    model: AnyModel, settings: SampleSettings | Plan, indices: Sequence[int], tell: Tell | None = None, *, decode: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Images number `indices`: uint8 [N, C, H, W] and their labels int64 [N] (None if unconditional), on the CPU.

    decode: False gives the latents of a model of latents as they are, float32. Image i is the same whatever other images are drawn
    with it, up to rounding in the network's last bits.
    """
    chosen = plan(model.config, settings) if isinstance(settings, SampleSettings) else settings
    if chosen.compile:
        for each in [model] if chosen.guide is None else [model, chosen.guide.model]:
            compile_network(each.network)
    images, labels = [], []
    for start in range(0, len(indices), chosen.batch_size):
        numbers = list(indices[start : start + chosen.batch_size])
        known = len(numbers)
        if chosen.compile:  # batches of one size need one compilation
            numbers += numbers[-1:] * (chosen.batch_size - known)
        batch = torch.as_tensor(numbers, device=model.device)
        condition = draw_condition(model.config, chosen, batch)
        with _telling(model, chosen, start, known, tell), computed_in(chosen.precision, model.network):
            drawn = _draw_batch(model, chosen, batch, condition)[:known]
        if model.config.latents is not None and not decode:
            images.append(drawn.float().cpu())
        elif model.config.latents is not None:
            from ..encoders.vae import decoder

            images.append(decoder(model.config.latents, model.device)(drawn).cpu())
        else:
            images.append(to_uint8(drawn).cpu())
        labels.append(condition.classes[:known].cpu() if isinstance(condition, Labels) else None)
    if not images:
        empty = None if model.config.num_classes == 0 else torch.empty(0, dtype=torch.int64)
        return torch.empty(0, *drawn_shape(model.config), dtype=torch.uint8), empty
    return torch.cat(images), None if labels[0] is None else torch.cat(labels)


@contextlib.contextmanager
def _telling(model: AnyModel, chosen: Plan, done: int, count: int, tell: Tell | None) -> Iterator[None]:
    """Tells, after each evaluation of the network for a batch of `count` images, how many images are drawn, beside `done`."""
    if tell is None:
        yield
        return
    calls = len(visited(chosen.sampler, chosen.times))  # both passes of guidance are one batch
    made = 0

    def after(*_: object) -> None:
        nonlocal made
        made += 1
        tell(done + count * min(made / calls, 1))

    hook = model.network.register_forward_hook(torch.compiler.disable(after) if chosen.compile else after)
    try:
        yield
    finally:
        hook.remove()
    tell(done + count)


def draw_condition(config: ModelConfig, chosen: Plan, index: Tensor) -> Condition | None:
    """For images number `index` [N]; None for an unconditional model."""
    if config.text is not None:
        texts = texts_of(config, chosen.prompts, chosen.seed, index)
        condition = text_condition(config, texts, chosen.negative, index.device)
    elif config.num_classes:
        condition = Labels(_classes(config, chosen, index), config.num_classes)
    else:
        return None
    if not is_told(config):
        return condition
    return replace(condition, guidance=torch.full((len(index),), chosen.guidance, dtype=torch.float64, device=index.device))


def _classes(config: ModelConfig, chosen: Plan, index: Tensor) -> Tensor:
    if chosen.classes == "balanced":
        return _in_turn(with_images(config), index)
    if chosen.classes == "random":
        return random_labels(config, uniform(keys(chosen.seed, index, _LABEL)))
    return _in_turn(chosen.classes, index)


def _in_turn(classes: Sequence[int], index: Tensor) -> Tensor:
    return torch.tensor(classes, device=index.device)[index % len(classes)]


@torch.no_grad()
def _draw_batch(model: AnyModel, chosen: Plan, index: Tensor, condition: Condition | None) -> Tensor:
    """Images or latents number `index`, float64 [N, C, H, W]."""

    def noise(step: int) -> Tensor:
        return normal(keys(chosen.seed, index, _NOISE + step), model.image_shape, torch.float64)

    config, sampler = model.config, samplers_of(model.config)[chosen.sampler]
    if chosen.guide is not None:
        model = autoguided(model, chosen.guide.model.to(model.device))
    weight = weights(chosen.guidance_interval, 1.0 if is_told(config) else chosen.guidance, config.flow)
    if chosen.churn is not None:
        sampler = partial(sampler, churn=chosen.churn)
    if chosen.sampler == "ancestral":
        sampler = partial(sampler, stochasticity=chosen.stochasticity)
    if config.denoiser is None:
        return sampler(model, config.flow.sigma_data * noise(0), chosen.times, condition, weight, noise)
    schedule = config.sampling.schedule
    x = diffusion.start(config.denoiser, chosen.times[0], noise(0), schedule, chosen.grid)
    ours = schedule is not None or config.denoiser.schedule is not None or model.is_random
    denoiser = _Bound(model, chosen.seed, index) if ours else model
    return sampler(denoiser, x, chosen.times, condition, weight, noise)


class _Bound:
    """A denoiser as samplers see it, at any sigma and with its own randomness, which belongs to the images number `index`."""

    def __init__(self, model: Denoiser, seed: int, index: Tensor) -> None:
        self.model, self.settings, self.seed, self.index, self.calls = model, model.settings, seed, index, 0

    def denoise(self, y: Tensor, sigma: Tensor, condition: Condition | None, guidance: float, *, clip: bool = True) -> Tensor:
        noise = keys(self.seed, self.index, _OWN + self.calls) if self.model.is_random else None
        self.calls += 1
        return self.model.denoise_within(y, torch.ones_like(sigma), sigma, condition, guidance, noise, clip=clip)
