"""What methods that start from nothing do alike where they train on captions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from ..encoders.text import described, sizes_of
from ..models.config import ModelConfig
from ..networks.conditions import Text
from ..networks.text import BYTES
from .method import Start


def find_text(config: Any) -> Any:
    """The config with the sizes and the hash of the text encoder."""
    return replace(config, text=described(config.text)) if config.data.text else config


def find_sizes(config: Any) -> Any:
    """For a dry run: of an encoder that is not there, the sizes that are set."""
    return replace(config, text=sizes_of(config.text)) if config.data.text else config


def text_of(config: Any) -> Any:
    """`ModelConfig.text`, or None."""
    return sizes_of(config.text) if config.data.text else None


def null_of(start: Start) -> Text | None:
    """What the text encoder makes of the empty text; None where there are no texts."""
    texts = getattr(start.dataset, "texts", None)
    return None if texts is None else texts.null()


def set_null(network: nn.Module, config: ModelConfig, null: Text | None) -> None:
    """Into the network's buffers, where its encoder is a frozen one."""
    if null is not None and config.text.encoder != BYTES:
        (network if config.text.pipeline else network.text).set_null(null)
