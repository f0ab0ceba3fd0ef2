"""What flow maps and denoisers have in common: a network, and what is known of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..networks import build_network
from .config import ModelConfig


class Model(nn.Module):
    """network: None builds one with freshly initialised weights; `needs` are what `build_network` is asked for beside the config."""

    def __init__(self, config: ModelConfig, network: nn.Module | None = None, **needs: Any) -> None:
        super().__init__()
        self.config = config
        self.network = network or build_network(
            config.network,
            resolution=config.resolution,
            channels=config.channels,
            num_classes=config.num_classes,
            augment_dim=config.augment_dim,
            text=config.text,
            **needs,
        )

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.config.channels, self.config.resolution, self.config.resolution
