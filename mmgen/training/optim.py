"""Optimisers and the learning rate."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ..config import OptimizerSettings

_CLASSES = {"radam": torch.optim.RAdam, "adamw": torch.optim.AdamW, "adam": torch.optim.Adam}


def build_optimizer(settings: OptimizerSettings, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """RAdam, AdamW or Adam, in the form that touches all parameters at once rather than one by one."""
    fast = {"foreach": True} if settings.name == "radam" else {"fused": True}
    return _CLASSES[settings.name](
        parameters,
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        **fast,
    )


def learning_rate(settings: OptimizerSettings, images: int) -> float:
    """The learning rate of the step that starts after `images` images: rises linearly over the warm-up, then constant."""
    if images >= settings.warmup_images:
        return settings.lr
    return settings.lr * (images + 1) / (settings.warmup_images + 1)
