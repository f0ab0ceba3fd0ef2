"""Consistency distillation: a frozen denoiser whose ODE leads from x_t to x_r, in place of the image and noise of x_t."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...config.imm import ImmConfig
from ...diffusion.flow_map import FlowMapSettings
from ...errors import ConfigError
from ...losses.ode_step import Solver, image_and_noise
from ...models.config import ModelConfig
from ...models.denoiser import Denoiser
from ...networks.conditions import Condition
from ..distill.teachers import Teacher, check_data, load_teacher
from ..method import Start


@dataclass(frozen=True)
class TeacherPath:
    """From x_t towards x_r by the teacher."""

    model: Denoiser
    flow: FlowMapSettings
    solver: Solver

    @torch.no_grad()
    def __call__(self, x_t: Tensor, t: Tensor, r: Tensor, condition: Condition | None) -> tuple[Tensor, Tensor]:
        """(x, noise) of `losses.ode_step.image_and_noise`. The noise of x_t has the standard deviation sigma_data."""
        schedule = self.flow.get_schedule()

        def x_hat(z: Tensor, time: Tensor) -> Tensor:
            return self.model.denoise_within(z, schedule.alpha(time), self.flow.sigma_data * schedule.sigma(time), condition, clip=False)

        return image_and_noise(x_hat, schedule, x_t, t, r, self.solver)


def find_teacher(config: ImmConfig, device: Any) -> tuple[Teacher | None, ImmConfig]:
    """The teacher on the device, if one is named, and the config with the hash of its weights. Raises ConfigError and ModelError."""
    if not config.teacher.name:
        return None, config
    teacher = load_teacher(config.teacher.name, device)
    return teacher, replace(config, teacher=replace(config.teacher, sha256=teacher.sha256))


def as_teacher(config: ImmConfig, teacher: Teacher, model_config: ModelConfig) -> ModelConfig:
    """The config of a model that has the teacher's coordinates. Raises ConfigError where the two are of different images."""
    own = teacher.model.config
    for key in ("resolution", "channels", "num_classes"):
        ours, theirs = getattr(model_config, key), getattr(own, key)
        if ours != theirs:
            raise ConfigError(f"the teacher {teacher.name} has {key} {theirs}, and this training {ours}: make them the same")
    if model_config.text != own.text:
        raise ConfigError(f"the teacher {teacher.name} and this training read texts in different ways: give the same section text, or none")
    data, trained = config.data, teacher.has_null_class
    hidden = data.label_dropout if own.num_classes else data.caption_dropout if own.text is not None else 0
    if hidden and not trained:
        raise ConfigError(f"the teacher {teacher.name} knows no images without a condition: set data.label_dropout and data.caption_dropout to 0")
    return replace(model_config, latents=own.latents)


def check_teacher(start: Start) -> None:
    """Raises ConfigError where the data are not the teacher's kind."""
    if start.source is not None:
        check_data(start.source, start.dataset, start.reporter.note)


def teacher_path(start: Start) -> TeacherPath | None:
    if start.source is None:
        return None
    for note in start.source.notes:
        start.reporter.note(f"teacher: {note}")
    return TeacherPath(start.source.model, start.config.flow, start.config.teacher.solver)
