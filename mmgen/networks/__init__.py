"""Networks: `network(x, t, s=None, condition=None, augment=None)` with times already scaled. They know no schedule.

`condition` is a `conditions.Condition`, None for all null; a network without a null has `null_class = False` in its settings. Some
give twice as many channels as they get: the second half is a learned variance.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Union

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .adm import ADM, ADMSettings
from .diffusers_text import DiffusersText, DiffusersTextSettings
from .diffusers_unet import DiffusersUNet, DiffusersUNetSettings
from .dit import DiT, DiTSettings
from .edm2 import EDM2, EDM2Settings
from .limits import check_sizes
from .text import TextSettings, check_text
from .unet import UNet, UNetSettings
from .uvit import UViT, UViTSettings

# A further network is a file and a line here. Its class says by `supports` which of the options of `build_network` it has; its
# settings, by `limits`, `check` and `null_class`, which sizes it can have and whether it can do without a class.
NETWORKS: dict[type, type[nn.Module]] = {
    UNetSettings: UNet, DiTSettings: DiT, ADMSettings: ADM, EDM2Settings: EDM2, DiffusersUNetSettings: DiffusersUNet,
    UViTSettings: UViT, DiffusersTextSettings: DiffusersText,
}  # fmt: skip
_LACKS = {
    "augment_dim": "takes no augmentation label",
    "second_time": "has no second time: it can be a denoiser, not a flow map",
    "extra_channels": "takes no channels beside those of the image",
    "text": "takes no text",
}
NetworkSettings = Union[tuple(NETWORKS)]  # noqa: UP007


def kinds_with(option: str) -> list[str]:
    """The kinds of network that have an option of `build_network`, such as `text`."""
    return [settings.kind for settings, network in NETWORKS.items() if option in network.supports]


def build_network(
    settings: NetworkSettings,
    *,
    resolution: int,
    channels: int,
    num_classes: int = 0,
    augment_dim: int = 0,
    second_time: bool = True,
    extra_channels: int = 0,
    text: TextSettings | None = None,
) -> nn.Module:
    """A freshly initialised network for images [N, channels, resolution, resolution], conditioned on one of `num_classes`
    classes, on `text`, or on nothing (num_classes 0).

    `second_time`: whether it is given s beside t, as a flow map is and a denoiser is not. `extra_channels`: how many
    channels it is given behind those of the image, such as a student's noise. Raises ConfigError for a network that cannot be
    such a one, or has no place for an augmentation label.
    """
    check_sizes(settings, resolution=resolution, channels=channels, num_classes=num_classes)
    if text is not None:
        check_text(text)
        if num_classes:
            raise ConfigError("a network is conditioned on text or on classes, not on both")
    network = NETWORKS[type(settings)]
    options = {"augment_dim": augment_dim, "second_time": second_time, "extra_channels": extra_channels, "text": text}
    for name in [name for name in options if name not in network.supports]:
        if options.pop(name):
            raise ConfigError(f"a network of kind {settings.kind!r} {_LACKS[name]}: {' or '.join(kinds_with(name))} can")
    return network(settings, resolution, channels, num_classes, **options)


def blocks(network: nn.Module) -> list[nn.Module]:
    """What the network is a sequence of: the modules in the lists and tables that it has."""
    network = network.model if isinstance(network, DiffusersText) else network
    containers = [child for child in network.children() if isinstance(child, nn.ModuleList | nn.ModuleDict)]
    inside = [block for container in containers for block in container.children()]
    return [b for b in inside if not isinstance(b, nn.ModuleList | nn.ModuleDict) and any(True for _ in b.parameters())]


def checkpoint_blocks(network: nn.Module) -> None:
    """From now on blocks are computed again in the backward pass, not kept; results are the same, and so is the state dict.

    Raises ConfigError for a network that cannot.
    """
    if not hasattr(network.settings, "gradient_checkpointing"):
        raise ConfigError(
            f"run.gradient_checkpointing: a network of kind {network.settings.kind!r} cannot recompute its blocks; leave it out "
            "and lower run.batch_per_device"
        )
    network.settings = replace(network.settings, gradient_checkpointing=True)


def widen_input(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """A network's state dict as that of `network`, which differs in `extra_channels` only: their weights are zero.

    So the wider network begins as the other, whatever the extra channels hold. What has its shape already is returned as it is;
    shapes that differ otherwise are left for `load_state_dict` to refuse.
    """
    widened = dict(state)
    for key, wanted in network.state_dict().items():
        found = state.get(key)
        if found is None or found.shape == wanted.shape or found.ndim != wanted.ndim or found.ndim < 2:
            continue
        more = wanted.shape[1] - found.shape[1]
        if more > 0 and (found.shape[0], *found.shape[2:]) == (wanted.shape[0], *wanted.shape[2:]):
            widened[key] = torch.cat([found, found.new_zeros(found.shape[0], more, *found.shape[2:])], dim=1)
    return widened


def with_second_time(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """The state dict of a network without a second time as that of `network`, which has one: without effect, as its last layer is zero."""
    ours = {key: value for key, value in network.state_dict().items() if key.startswith("second_time_mlp.")}
    return state | {key: torch.zeros_like(value) if ".linear1." in key else value for key, value in ours.items()}


def without_augment(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A network's state dict without its augmentation input, `augment_embed` in every network that has one."""
    return {key: value for key, value in state.items() if not key.startswith("augment_embed.")}
