"""Which guidance a sampling has: its weight, where it acts, and what it leads away from, checked against the model."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError
from ..formats.opening import open_model
from ..models.autoguidance import check_guide
from ..models.build import AnyModel
from ..models.config import ModelConfig, is_conditional
from ..models.guidance import is_told, knows_null
from .guidance_interval import Interval, check_interval


@dataclass(frozen=True)
class Guide:
    """A worse version of a model, which guidance leads away from (`models.autoguidance`)."""

    name: str  # as it was given
    sha256: str  # of its file
    model: AnyModel = field(repr=False, compare=False)

    @classmethod
    def of(cls, path: str | os.PathLike) -> Guide:
        """From whatever `mmgen sample` takes as MODEL. Raises ModelError and ConfigError."""
        opened = open_model(path)
        return cls(str(path), opened.sha256, opened.build())


def check_guidance_defaults(config: ModelConfig) -> None:
    """Raises ConfigError where a model's own interval is none, or its range is ignored. An interval without a weight waits for one."""
    check_interval(config.sampling.guidance_interval)
    if config.sampling.guidance_range and not is_told(config):
        raise ConfigError("sampling.guidance_range is of students that are told their guidance, and this is none: leave it out")


def choose_guidance(config: ModelConfig, settings: Any) -> tuple[float, Interval, float]:
    """The weight, the interval, and the weight again where nothing says whether the model knows the null, else 1.

    settings: `drawing.SampleSettings`. Raises ConfigError where they do not suit the model.
    """
    guidance = config.sampling.guidance if settings.guidance is None else settings.guidance
    if not math.isfinite(guidance):
        raise ConfigError(f"guidance must be a finite number, not {guidance}")
    if settings.guide is None and not is_conditional(config):
        if guidance != 1 and settings.guidance is not None:
            raise ConfigError(f"guidance {guidance:g} needs a class-conditional model, or a guide, and this one is unconditional")
        guidance = 1.0
    if settings.negative and guidance == 1:
        raise ConfigError("a negative prompt needs guidance: give --guidance 3, say")
    doubtful = _check_guide(config, settings, guidance) if settings.guide is not None else _check_null(config, guidance)
    interval = config.sampling.guidance_interval if settings.guidance_interval is None else settings.guidance_interval
    interval = interval if guidance != 1 or settings.guidance_interval else ()
    if interval and is_told(config):
        raise ConfigError("this student was told its guidance in training, so an interval has no effect: leave guidance_interval out")
    check_interval(interval)
    if interval and guidance == 1:
        raise ConfigError("a guidance interval needs guidance: give --guidance 3, say, or leave the interval out")
    return guidance, interval, doubtful


def _check_guide(config: ModelConfig, settings: Any, guidance: float) -> float:
    check_guide(config, settings.guide.model.config)
    if guidance == 1:
        raise ConfigError("a guide needs guidance: give --guidance 2, say, or leave the guide out")
    if settings.negative:
        raise ConfigError("a guide takes the place of the negative prompt: leave one of them out")
    return 1.0


def _check_null(config: ModelConfig, guidance: float) -> float:
    null = None if is_told(config) else knows_null(config)
    ends = config.sampling.guidance_range
    if is_told(config) and ends and not ends[0] <= guidance <= ends[1]:
        raise ConfigError(f"guidance {guidance:g} is outside what this student learned: {ends[0]:g} to {ends[1]:g}")
    if guidance != 1 and null is False and (student := config.training.get("distilled")) is not None:
        built_in = f"its teacher's, {student.get('guidance', 1):g}, is built in"
        raise ConfigError(f"guidance {guidance:g} is not for this student, which never learned images without a condition: {built_in}; leave guidance at 1")
    if guidance != 1 and null is False:
        without = "a text (caption dropout)" if config.text is not None else "a class (label dropout)"
        raise ConfigError(
            f"guidance {guidance:g} needs a model that also learned images without {without}, and this one did not: leave guidance at 1"
        )
    return guidance if null is None and not is_told(config) else 1.0


def evaluations(config: ModelConfig, guidance: float, guide: Guide | None) -> int:
    """Of a network, for a step: one, and one more of the null or the guide."""
    if is_told(config) or guidance == 1:
        return 1
    return 1 if guide is None and guidance == 0 and getattr(config.denoiser, "guided_channels", None) is None else 2
