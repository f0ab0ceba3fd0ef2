"""What a model trained from nothing is: by its settings and the shape of the data."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..data import DataShape
from ..errors import ConfigError
from ..models.config import ModelConfig
from ..networks.limits import check_sizes
from ..sampling.drawing import check_defaults
from ..training.augment import AUGMENT_DIM


def fresh_model_config(config: Any, shape: DataShape, latents_std: float, **own: Any) -> ModelConfig:
    """latents_std: what the standard deviation of latents becomes. own: what differs from method to method.

    Raises ConfigError where settings and data do not go together.
    """
    check_sizes(config.network, resolution=shape.resolution, channels=shape.channels)
    conditional, latents, guidance = config.data.conditional, shape.latents, config.sampling.guidance
    hidden = "caption_dropout" if config.data.text else "label_dropout" if conditional else None
    if guidance != 1 and hidden and getattr(config.data, hidden) == 0:  # said now, not when the model is sampled
        raise ConfigError(f"sampling.guidance {guidance:g} needs images without a condition in training: set data.{hidden} to 0.1, say, or the guidance to 1")
    if conditional and shape.num_classes == 0:
        raise ConfigError("data.conditional needs class labels, and the data have none: leave labels out with --unconditional")
    model_config = ModelConfig(
        network=config.network,
        resolution=shape.resolution,
        channels=shape.channels,
        num_classes=shape.num_classes if conditional else 0,
        augment_dim=AUGMENT_DIM if config.data.augment > 0 else 0,
        class_names=shape.class_names if conditional else None,
        class_counts=shape.class_counts if conditional else None,
        data=config.data.name,
        latents=None if latents is None else replace(latents, target_std=latents_std),
        sampling=config.sampling if conditional or config.data.text else replace(config.sampling, guidance=1.0),
        **own,
    )
    check_defaults(model_config)
    return model_config
