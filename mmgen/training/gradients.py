"""The norm of a step's gradient: measured at every step, and limited where the settings say so."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .sharding import whole


@torch.no_grad()
def measure_and_clip(network: nn.Module, optimizer: Any, clip: float, accelerator: Any) -> Tensor:
    """The Euclidean norm of the whole gradient before clipping, a scalar on the device that nothing waits for.

    With fp16 the gradients are divided by the scaler's factor first; where they overflowed, the norm is not finite, and the
    scaler leaves the step out. Of a sharded network all processes call this.

    Args:
        optimizer: that of the network, as the accelerator prepared it.
        clip: gradients of a larger norm are scaled down to it; 0: none are.
    """
    if accelerator.scaler is not None:
        accelerator.scaler.unscale_(getattr(optimizer, "optimizer", optimizer))
    parameters = [p for p in network.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters])
    if clip > 0:
        nn.utils.clip_grads_with_norm_(parameters, clip, norm)
    return whole(norm)
