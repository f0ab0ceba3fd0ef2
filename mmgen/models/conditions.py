"""The condition of a model's kind: any one, to try it with."""

from __future__ import annotations

import torch

from ..networks.conditions import Condition, Labels, Text
from ..networks.text import BYTES, byte_text
from .config import ModelConfig


def example(config: ModelConfig, count: int, device: str | torch.device) -> Condition | None:
    """Class 0, an empty text, or None for an unconditional model, for `count` images."""
    if config.num_classes:
        return Labels(torch.zeros(count, dtype=torch.int64, device=device), config.num_classes)
    if config.text is None:
        return None
    text = config.text
    if text.encoder == BYTES:
        return byte_text([""] * count, text.length)[0].to(device)
    zeros = torch.zeros(count, text.length, text.width, device="cpu")
    mask = torch.ones(count, text.length, dtype=torch.bool, device="cpu")
    pooled = torch.zeros(count, text.pooled, device="cpu") if text.pooled else None
    found = Text(zeros, mask, pooled)
    return Text(zeros, mask, pooled, empty=found[:1]).to(device)
