"""From a config to a model with freshly initialised weights."""

from __future__ import annotations

import os

from ..errors import ConfigError
from ..networks.empty import without_weights
from .config import ModelConfig, kind_of
from .denoiser import Denoiser
from .flow_model import FlowModel

AnyModel = FlowModel | Denoiser


def build_model(config: ModelConfig) -> AnyModel:
    """A model with freshly initialised weights."""
    return FlowModel(config) if kind_of(config) == "imm" else Denoiser(config)


def check_weights(config: ModelConfig) -> None:
    """Raises ConfigError for a network whose weights alone are more than this machine's memory, before it is built."""
    with without_weights():
        count = sum(p.numel() for p in build_model(config).network.parameters())
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not a system that tells
        return
    if 4 * count > memory:
        raise ConfigError(
            f"the network has {count:,} parameters, whose weights take {4 * count / 1e9:,.0f} GB, and this machine has "
            f"{memory / 1e9:,.0f} GB of memory: make it smaller by the settings of network"
        )
