"""Classifier-free guidance on a network's raw output, for flow maps and denoisers alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..diffusion.process import per_image
from ..networks.conditions import Condition, concatenate

if TYPE_CHECKING:
    from .config import ModelConfig


def guided(
    network: nn.Module, x: Tensor, t: Tensor, s: Tensor | None, condition: Condition | None, guidance: float | Tensor,
    channels: int | None = None, guided_channels: int | None = None,
) -> Tensor:  # fmt: skip
    """G_w = G(null) + w (G(condition) - G(null)) (IMM, eqs. 14, 85, 86).

    x [N, C, H, W] and t, s float64 [N] as the network takes them; w one number, or one for each image, [N]. Both passes are one batch. With w = 1 the null is not
    evaluated; with w = 0 it alone is. Of the output's channels the first `channels` are kept: the others are learned variances. With
    `guided_channels` only the first so many are guided, and the rest is G(condition), as the code published for DiT and SiT has
    it. Returns float32 [N, channels, H, W], float64 where x is.
    """
    each = isinstance(guidance, Tensor)
    if condition is None or (not each and guidance == 1):
        return _precise(network(x, t, s, condition)[:, :channels], x)
    null = condition.null()
    if not each and guidance == 0 and guided_channels is None:
        return _precise(network(x, t, s, null)[:, :channels], x)
    both_s = None if s is None else torch.cat([s] * 2)
    both = network(torch.cat([x] * 2), torch.cat([t] * 2), both_s, concatenate([null, condition]))[:, :channels]
    unconditional, conditional = _precise(both, x).chunk(2)
    w = per_image(guidance, unconditional) if each else guidance
    result = unconditional + w * (conditional - unconditional)
    if guided_channels is not None:
        result[:, guided_channels:] = conditional[:, guided_channels:]
    return result


def is_single(condition: Condition | None, guidance: float | Tensor, guided_channels: int | None = None) -> bool:
    """Whether `guided` gives the network the images as they are, and not twice."""
    if isinstance(guidance, Tensor):
        return condition is None
    return condition is None or guidance == 1 or (guidance == 0 and guided_channels is None)


def is_told(config: ModelConfig) -> bool:
    """Whether the network itself is told w and learned what guidance makes of it, so that a pass without a null is all."""
    return getattr(config.network, "takes_guidance", False) or (config.denoiser is not None and config.denoiser.told_guidance)


def _precise(output: Tensor, x: Tensor) -> Tensor:
    return output if x.dtype == torch.float64 else output.float()


def knows_null(config: ModelConfig) -> bool | None:
    """Whether a model also learned images without a class or text, as guidance needs; None where nothing says.

    Not where the network has no null class, and not where it was trained with label dropout (of text caption dropout) 0.
    """
    data = config.training.get("config", {}).get("data", {})
    if config.text is not None:
        dropout = data.get("caption_dropout")
        return config.null_trained if not isinstance(dropout, int | float) else dropout > 0
    if config.num_classes == 0 or not config.network.null_class:
        return False
    if config.null_trained is not None:
        return config.null_trained
    return data["label_dropout"] > 0 if isinstance(data.get("label_dropout"), int | float) else None
