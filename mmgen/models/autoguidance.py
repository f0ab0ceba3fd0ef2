"""Autoguidance: guidance by a smaller or less trained version of a model, in place of the null.

Karras et al., arXiv:2406.02507, eq. 3 with such a version as D_0: D_w(x; sigma, c) = w D_1(x; sigma, c) + (1 - w) D_0(x; sigma, c).
Both are asked for the same condition, so that unconditional models can be guided too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..diffusion.process import each_time, per_image
from ..errors import ConfigError
from ..networks.conditions import Condition
from .config import ModelConfig, kind_of
from .denoiser import Denoiser
from .flow_model import FlowModel
from .guidance import is_told


class AutoguidedDenoiser(Denoiser):
    """A denoiser led away from its guide: x_hat is the guide's + w (its own - the guide's), clipped as its own."""

    def __init__(self, model: Denoiser, guide: Denoiser) -> None:
        super().__init__(model.config, model.network)
        self.guide = guide

    def denoise(
        self, y: Tensor, sigma: Tensor | float, condition: Condition | None = None, guidance: float | Tensor = 1.0,
        noise: Tensor | None = None, *, clip: bool = True,
    ) -> Tensor:  # fmt: skip
        if not isinstance(guidance, Tensor) and guidance == 1:
            return super().denoise(y, sigma, condition, 1.0, noise, clip=clip)
        own = super().denoise(y, sigma, condition, 1.0, noise, clip=False)
        sigma = each_time(sigma, y)
        x = led(self.guide.denoise_within(y, torch.ones_like(sigma), sigma, condition, clip=False), own, guidance)
        return x.clamp(-1, 1) if self.settings.clip and clip else x


class AutoguidedFlow(FlowModel):
    """Likewise a flow map, which is linear in the network's output."""

    def __init__(self, model: FlowModel, guide: FlowModel) -> None:
        super().__init__(model.config, model.network)
        self.guide = guide

    def f(
        self, x: Tensor, s: Tensor | float, t: Tensor | float, condition: Condition | None = None, guidance: float = 1.0
    ) -> Tensor:
        own = super().f(x, s, t, condition)
        return own if guidance == 1 else led(self.guide.f(x, s, t, condition), own, guidance)


def led(bad: Tensor, good: Tensor, guidance: float | Tensor) -> Tensor:
    """bad + w (good - bad), in their dtype. w: one number, or one for each image, [N]."""
    w = per_image(guidance, good) if isinstance(guidance, Tensor) else guidance
    return (bad + w * (good - bad)).to(good.dtype)


def autoguided(model: FlowModel | Denoiser, guide: FlowModel | Denoiser) -> AutoguidedFlow | AutoguidedDenoiser:
    """The model with its `guidance` away from the guide. Raises ConfigError for what is no version of the same model."""
    check_guide(model.config, guide.config)
    return (AutoguidedFlow if kind_of(model.config) == "imm" else AutoguidedDenoiser)(model, guide)


def check_guide(config: ModelConfig, guide: ModelConfig) -> None:
    """Raises ConfigError for a guide of another kind of images, conditions or times; its network may be any."""
    if kind_of(config) != kind_of(guide):
        raise ConfigError("a flow map is guided by a flow map, a denoiser by a denoiser: give as the guide a version of the same model")
    if is_told(config) or is_told(guide):
        raise ConfigError("a student that is told its guidance neither has a guide nor is one: leave the guide out")
    if guide.denoiser is not None and (guide.denoiser.noise_channels or guide.denoiser.noise_dropout):
        raise ConfigError("the guide is a student with randomness of its own, which no guide can be: give a teacher")
    for name, of in (
        ("channels", lambda one: one.channels),
        ("resolution", lambda one: one.resolution),
        ("num_classes", lambda one: one.num_classes),
        ("text encoder", lambda one: one.text),
        ("latents", lambda one: one.latents and (one.latents.kind, one.latents.mean, one.latents.std, one.latents.target_std)),
        ("flow.schedule", lambda one: one.flow and one.flow.schedule),
        ("flow.sigma_data", lambda one: one.flow and one.flow.sigma_data),
    ):
        if of(config) != of(guide):
            raise ConfigError(f"the guide differs from the model in {name}: give a version of the same model, trained less or smaller")
