"""Optimisers and the learning rate."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ..config.sections import OptimizerSettings

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


def learning_rate(settings: OptimizerSettings, images: int, max_images: int) -> float:
    """The learning rate of the step that starts after `images` of `max_images` images.

    It rises linearly over the warm-up, then it is constant or falls linearly to 0 at `max_images`. A run shorter than its
    warm-up, such as a trial, ends while it rises.
    """
    if images < settings.warmup_images:
        return settings.lr * (images + 1) / (settings.warmup_images + 1)
    if settings.decay == "none":
        return settings.lr
    if images >= max_images:
        return 0.0
    return settings.lr * (max_images - images) / (max_images - settings.warmup_images)
