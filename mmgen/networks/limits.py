"""What sizes a network can have: a setting from a file or a command line is looked at before anything is built of it."""

from __future__ import annotations

from typing import Any

from ..errors import ConfigError, shortened

# Limits that several networks have; each names those of its own settings in `limits`. What divides what, its class says itself.
WIDTH, WIDTH_OR_0, FACTOR = (1, 2**17), (0, 2**17), (1e-3, 2**10)
BLOCKS, DEPTH, HEADS, PATCH, SIDE = (0, 64), (0, 512), (0, 2**12), (1, 2**12), (0, 2**20)
SHARE, PROBABILITY = (0, 1), (0, 0.999)
_MOST_LEVELS = 16


def check_sizes(settings: Any, *, resolution: int, channels: int, num_classes: int = 0) -> None:
    """Raises ConfigError for a size that no network has, such as 10^9 channels, and for settings that do not fit each other or the images.

    settings: of any network; resolution, channels, num_classes: of its images.
    """
    for name, value, most in (("resolution", resolution, 2**14), ("channels", channels, 2**12)):
        if not 1 <= value <= most:
            raise ConfigError(f"images with {name} {value} are none: 1 to {most:,}")
    if not 0 <= num_classes <= 1_000_000:
        raise ConfigError(f"{num_classes} classes are impossible: 0 to 1,000,000")
    for name, (least, most) in settings.limits.items():
        value = getattr(settings, name)
        values = value if isinstance(value, list | tuple) else [] if value is None else [value]
        if len(values) > _MOST_LEVELS:
            raise ConfigError(f"network.{name} has {len(values):,} entries: at most {_MOST_LEVELS} make sense")
        if not all(least <= one <= most for one in values):
            raise ConfigError(f"network.{name} = {shortened(value)} is impossible: from {least:,g} to {most:,g}")
    settings.check(resolution)


def check_levels(settings: Any, resolution: int) -> None:
    """Raises ConfigError where a U-Net with `channel_mult` has no levels, or cannot halve the images as often."""
    levels = len(settings.channel_mult)
    if levels == 0:
        raise ConfigError("network.channel_mult needs at least one level")
    if resolution % 2 ** (levels - 1):
        raise ConfigError(
            f"a U-Net of {levels} levels (network.channel_mult) needs a resolution divisible by {2 ** (levels - 1)}, not {resolution}"
        )


def check_groups(settings: Any, least: int) -> None:
    """Raises ConfigError where group norm cannot divide the layers of a U-Net, also those with a skip connection's channels.

    least: channels of a group.
    """
    widths = [int(m * settings.model_channels) for m in (1, *settings.channel_mult)]
    for width in widths + [a + b for a in widths for b in widths]:
        if width < least or width % min(32, width // least):
            raise ConfigError(
                f"network.model_channels {settings.model_channels} gives a layer of {width} channels, which group norm cannot "
                "divide into up to 32 groups: use a multiple of 32, or 4, 8 or 16"
            )
