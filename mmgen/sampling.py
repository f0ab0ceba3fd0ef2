"""Drawing images from a model: which noise, which classes, which times. Image i depends on (seed, i) alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .errors import ConfigError, nearest
from .models import Model, ModelConfig, to_uint8
from .random import keys, normal, uniform
from .samplers import GRIDS, SAMPLERS, time_grid

_LABEL, _NOISE = 1, 2  # purposes of random numbers; the noise of step i has _NOISE + i


@dataclass(frozen=True)
class SampleSettings:
    """How to sample. None: the model's own default."""

    steps: int = 1  # network evaluations per image (twice that with guidance)
    seed: int = 0  # image i has the random numbers of (seed, i)
    classes: Literal["random", "balanced"] | Sequence[int] = "random"  # random: as often as in the training data
    guidance: float | None = None  # w of classifier-free guidance; 1: none
    sampler: str | None = None  # pushforward or restart
    grid: str | None = None  # default, uniform, edm or eta: see `samplers.time_grid`
    etas: tuple[float, ...] = ()  # intermediate eta values of the grid `eta`
    batch_size: int = 256  # images at a time; has no influence on the images


@dataclass(frozen=True)
class Plan:
    """Settings with the model's defaults filled in, checked against the model."""

    steps: int
    seed: int
    classes: str | list[int]
    guidance: float
    sampler: str
    grid: str
    times: list[float]
    nfe: int  # network evaluations per image
    batch_size: int


def plan(config: ModelConfig, settings: SampleSettings) -> Plan:
    """Raises ConfigError where the settings do not suit the model."""
    guidance = config.sampling.guidance if settings.guidance is None else settings.guidance
    sampler, grid = settings.sampler or config.sampling.sampler, settings.grid or config.sampling.grid
    if settings.etas and settings.grid is None:
        grid = "eta"
    if settings.etas and grid != "eta":
        raise ConfigError(f"eta values need the grid 'eta', not {grid!r}")
    if sampler not in SAMPLERS:
        raise ConfigError(f"unknown sampler {sampler!r}: {nearest(sampler, SAMPLERS)}")
    if grid not in GRIDS:
        raise ConfigError(f"unknown grid {grid!r}: {nearest(grid, GRIDS)}")
    if not math.isfinite(guidance):
        raise ConfigError(f"guidance must be a finite number, not {guidance}")
    if settings.batch_size < 1:
        raise ConfigError(f"the batch size must be at least 1, not {settings.batch_size}")
    classes = settings.classes if isinstance(settings.classes, str) else list(settings.classes)
    if config.num_classes == 0:
        if guidance != 1 and settings.guidance is not None:
            raise ConfigError(f"guidance {guidance:g} needs a class-conditional model, and this one is unconditional")
        if classes != "random":
            raise ConfigError("classes cannot be chosen: this model is unconditional")
        guidance = 1.0
    elif isinstance(classes, str):
        if classes not in ("random", "balanced"):
            raise ConfigError(f"classes = {classes!r} is not possible: random, balanced or a list of class numbers")
    elif not classes or not all(0 <= c < config.num_classes for c in classes):
        raise ConfigError(f"classes must be numbers from 0 to {config.num_classes - 1}, not {classes}")
    evaluations = 1 if guidance in (0, 1) else 2
    times = time_grid(config.flow, settings.steps, grid, settings.etas)
    return Plan(
        settings.steps,
        settings.seed,
        classes,
        guidance,
        sampler,
        grid,
        times,
        settings.steps * evaluations,
        settings.batch_size,
    )


def draw(model: Model, settings: SampleSettings | Plan, indices: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """Images number `indices`: uint8 [N, C, H, W] and their labels int64 [N] (None if unconditional), on the CPU.

    Image i is the same whatever other images are drawn with it, up to rounding in the network's last bits.
    """
    chosen = plan(model.config, settings) if isinstance(settings, SampleSettings) else settings
    images, labels = [], []
    for start in range(0, len(indices), chosen.batch_size):
        batch = torch.as_tensor(list(indices[start : start + chosen.batch_size]), device=model.device)
        label = draw_labels(model.config, chosen, batch)
        images.append(to_uint8(_draw_batch(model, chosen, batch, label)).cpu())
        labels.append(None if label is None else label.cpu())
    if not images:
        empty = None if model.config.num_classes == 0 else torch.empty(0, dtype=torch.int64)
        return torch.empty(0, *model.image_shape, dtype=torch.uint8), empty
    return torch.cat(images), None if labels[0] is None else torch.cat(labels)


def draw_labels(config: ModelConfig, chosen: Plan, index: Tensor) -> Tensor | None:
    """int64 [N] for images number `index` [N]; None for an unconditional model."""
    if config.num_classes == 0:
        return None
    if chosen.classes == "balanced":
        return index % config.num_classes
    if chosen.classes == "random":
        counts = torch.tensor(config.class_counts or [1] * config.num_classes, dtype=torch.float64, device=index.device)
        position = uniform(keys(chosen.seed, index, _LABEL)) * counts.sum()
        return torch.searchsorted(counts.cumsum(0), position, right=True).clamp(max=config.num_classes - 1)
    return torch.tensor(chosen.classes, device=index.device)[index % len(chosen.classes)]


@torch.no_grad()
def _draw_batch(model: Model, chosen: Plan, index: Tensor, label: Tensor | None) -> Tensor:
    def noise(step: int) -> Tensor:
        return normal(keys(chosen.seed, index, _NOISE + step), model.image_shape, torch.float64)

    x = model.config.flow.sigma_data * noise(0)
    return SAMPLERS[chosen.sampler](model, x, chosen.times, label, chosen.guidance, noise)
