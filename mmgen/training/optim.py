"""Optimisers and the learning rate."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from ..config.sections import OptimizerSettings

class _WithoutMomentum(torch.optim.Optimizer):
    """With beta1 = 0 the first moment is the gradient itself: for the time of a step it lies where the gradient does, and no
    memory is kept for it. Updates are the same to the last bit.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        used = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for group, p in used:
            state = self.state[p]
            if not state:  # as torch makes it
                fused = group.get("fused")
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device if fused else "cpu")
                state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state[FIRST_MOMENT] = p.grad
        try:
            return super().step(closure)
        finally:
            for _, p in used:
                del self.state[p][FIRST_MOMENT]


class Adam(_WithoutMomentum, torch.optim.Adam):
    pass


class AdamW(_WithoutMomentum, torch.optim.AdamW):
    pass


class RAdam(_WithoutMomentum, torch.optim.RAdam):
    pass


FIRST_MOMENT = "exp_avg"
_CLASSES = {"radam": torch.optim.RAdam, "adamw": torch.optim.AdamW, "adam": torch.optim.Adam}
_WITHOUT_MOMENTUM = {"radam": RAdam, "adamw": AdamW, "adam": Adam}


def build_optimizer(settings: OptimizerSettings, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """RAdam, AdamW or Adam, in the form that touches all parameters at once rather than one by one; without its first moment
    where beta1 is 0.
    """
    fast = {"foreach": True} if settings.name == "radam" else {"fused": True}
    return (_CLASSES if settings.beta1 else _WITHOUT_MOMENTUM)[settings.name](
        parameters,
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        **fast,
    )


def moments(beta1: float) -> int:
    """How many numbers an optimiser keeps for each parameter."""
    return 2 if beta1 else 1


def suited(state: dict[int, dict[str, Any]], optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
    """The states of parameters, by number, as this optimiser keeps them: a run may go on with beta1 = 0, or without it."""
    kept = moments(optimizer.param_groups[0]["betas"][0]) == 2
    for values in state.values():
        if not kept:
            values.pop(FIRST_MOMENT, None)
        elif FIRST_MOMENT not in values and "exp_avg_sq" in values:
            values[FIRST_MOMENT] = torch.zeros_like(values["exp_avg_sq"])
    return state


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
