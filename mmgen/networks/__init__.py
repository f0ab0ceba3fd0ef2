"""Networks: `network(x, t, s=None, label=None, augment=None)` with times already scaled. They know no schedule.

`label` int64 [N], num_classes being the null class; a network that has none says so with `has_null_class = False`. Some give
twice as many channels as they get: the second half is a learned variance.
"""

from __future__ import annotations

from torch import nn

from ..errors import ConfigError
from .adm import ADM, ADMSettings
from .diffusers_unet import DiffusersUNet, DiffusersUNetSettings
from .dit import DiT, DiTSettings
from .edm2 import EDM2, EDM2Settings
from .unet import UNet, UNetSettings

NetworkSettings = UNetSettings | DiTSettings | ADMSettings | EDM2Settings | DiffusersUNetSettings


def build_network(
    settings: NetworkSettings,
    *,
    resolution: int,
    channels: int,
    num_classes: int = 0,
    augment_dim: int = 0,
    second_time: bool = True,
) -> nn.Module:
    """A freshly initialised network for images [N, channels, resolution, resolution]; num_classes 0 is unconditional.

    `second_time`: whether it is given s beside t, as a flow map is and a denoiser is not. Raises ConfigError for a network
    that cannot be one, or has no place for an augmentation label.
    """
    if isinstance(settings, UNetSettings):
        return UNet(settings, resolution, channels, num_classes, augment_dim, second_time=second_time)
    if isinstance(settings, ADMSettings):
        return ADM(settings, resolution, channels, num_classes, augment_dim, second_time=second_time)
    if augment_dim:
        raise ConfigError(f"a network of kind {settings.kind!r} takes no augmentation label")
    if isinstance(settings, DiTSettings):
        return DiT(settings, resolution, channels, num_classes, second_time=second_time)
    if second_time:
        raise ConfigError(f"a network of kind {settings.kind!r} has no second time: it can be a denoiser, not a flow map")
    network = EDM2 if isinstance(settings, EDM2Settings) else DiffusersUNet
    return network(settings, resolution, channels, num_classes)
