"""diffusers' UNet2DModel as one of our networks. diffusers itself computes it, so that it gives what it gives there."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from ..errors import ConfigError
from .conditions import Condition, class_numbers


@dataclass(frozen=True, kw_only=True)
class DiffusersUNetSettings:
    """The architecture, in diffusers' words."""

    kind: Literal["diffusers_unet2d"] = "diffusers_unet2d"
    config: str  # config.json of the UNet2DModel: JSON with sorted keys
    old_attention_names: bool = False  # the source names its attention query, key, value, proj_attn, as before diffusers 0.17

    limits: ClassVar = {}  # diffusers has its own
    null_class: ClassVar = False

    def check(self, resolution: int) -> None:
        """Left to diffusers."""


class DiffusersUNet(nn.Module):
    """x float [N, C, R, R], times float64 [N] -> float [N, C or 2 C, R, R]: as many channels as the config has.

    `condition`: class labels. A UNet2DModel with classes has no null class (`null_class`), so that it can neither do without labels
    nor be guided. Its tensors are named as diffusers names them, after "unet.".

    Raises ConfigError where diffusers is not installed or does not know the architecture.
    """

    supports = frozenset(())

    def __init__(self, settings: DiffusersUNetSettings, resolution: int, channels: int, num_classes: int = 0) -> None:
        super().__init__()
        self.settings, self.num_classes = settings, num_classes
        self.unet = _build(settings)
        found = self.unet.config.in_channels, self.unet.config.num_class_embeds or 0
        if found != (channels, num_classes):
            raise ConfigError(f"the UNet2DModel has {found[0]} channels and {found[1]} classes, not {channels} and {num_classes}")

    def forward(
        self, x: Tensor, t: Tensor, s: Tensor | None = None, condition: Condition | None = None, augment: Tensor | None = None
    ) -> Tensor:
        if s is not None or augment is not None:
            raise ValueError("UNet2DModel takes neither a second time nor an augmentation label")
        if self.num_classes and condition is None:
            raise ConfigError("this UNet2DModel has classes and no null class: every image needs a class, and guidance must be 1")
        output = self.unet(
            x, t, class_labels=class_numbers(condition, self.num_classes, t) if self.num_classes else None, return_dict=False
        )[0]
        return output.to(x.dtype)  # time_embedding_type "fourier" divides by the float64 time


def _build(settings: DiffusersUNetSettings) -> nn.Module:
    try:
        from diffusers import UNet2DModel
    except ImportError as error:
        raise ConfigError("this model is run by diffusers, which is not installed: pip install 'mmgen[latents]'") from error
    try:
        return UNet2DModel.from_config(json.loads(settings.config))
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ConfigError(f"diffusers cannot build the UNet2DModel of this model: {error}") from error
