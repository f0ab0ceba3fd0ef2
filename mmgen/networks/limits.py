"""What sizes a network can have: a setting from a file or a command line is looked at before anything is built of it."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..errors import ConfigError, shortened

MOST_LEVELS = 16
_WIDTH, _COUNT = (1, 2**17), (1, 2**12)

# Least and most of a number, or of each of a list, by the setting's name. What divides what, networks say themselves.
_LIMITS: dict[str, tuple[float, float]] = {
    "model_channels": _WIDTH, "hidden_size": _WIDTH, "channels_per_head": _WIDTH, "channels_per_group": _WIDTH,
    "num_blocks": (0, 64), "depth": (0, 512), "num_heads": (0, 2**12), "patch_size": _COUNT,
    "emb_channels": (0, 2**17), "noise_channels": (0, 2**17), "attn_resolutions": (0, 2**20), "dropout_resolution": (0, 2**20),
    "channel_mult": (1e-3, 2**10), "mlp_ratio": (1e-3, 2**10), "mlp_epsilon": (1e-30, 1.0), "clip_activations": (1e-3, 1e30),
    "label_balance": (0, 1), "concat_balance": (0, 1), "res_balance": (0, 1), "attn_balance": (0, 1), "dropout": (0, 0.999),
}  # fmt: skip


def check_sizes(settings: Any, *, resolution: int, channels: int, num_classes: int) -> None:
    """Raises ConfigError for a size that no network has, such as one below 1 or of 10^9 channels.

    settings: of any network; resolution, channels, num_classes: of its images.
    """
    for name, value, most in (("resolution", resolution, 2**14), ("channels", channels, 2**12)):
        if not 1 <= value <= most:
            raise ConfigError(f"images with {name} {value} are none: 1 to {most:,}")
    if not 0 <= num_classes <= 1_000_000:
        raise ConfigError(f"{num_classes} classes are impossible: 0 to 1,000,000")
    for field in dataclasses.fields(settings):
        value, limits = getattr(settings, field.name), _LIMITS.get(field.name)
        if limits is None or value is None:
            continue
        values = value if isinstance(value, list | tuple) else [value]
        if len(values) > MOST_LEVELS:
            raise ConfigError(f"network.{field.name} has {len(values):,} entries: at most {MOST_LEVELS} make sense")
        if not all(limits[0] <= one <= limits[1] for one in values):
            raise ConfigError(f"network.{field.name} = {shortened(value)} is impossible: from {limits[0]:,g} to {limits[1]:,g}")
