"""Networks: `network(x, t, s=None, label=None, augment=None)` with times already scaled. They know no schedule."""

from __future__ import annotations

from torch import nn

from .dit import DiT, DiTSettings
from .unet import UNet, UNetSettings

NetworkSettings = UNetSettings | DiTSettings


def build_network(
    settings: NetworkSettings,
    *,
    resolution: int,
    channels: int,
    num_classes: int = 0,
    augment_dim: int = 0,
    second_time: bool = True,
) -> nn.Module:
    """A freshly initialised network for images [N, channels, resolution, resolution]; num_classes 0 is unconditional."""
    if isinstance(settings, DiTSettings):
        return DiT(settings, resolution, channels, num_classes, second_time=second_time)
    return UNet(settings, resolution, channels, num_classes, augment_dim, second_time=second_time)
