"""The DDPM++ U-Net as a textbook writes it, to be measured against: functions of a state dict of mmgen's `UNet`.

Attention by einsum in float32, time and label layers in float64, resampling by depthwise convolutions (Karras et al.,
arXiv:2206.00364, appendix F; Song et al., arXiv:2011.13456; Zhou et al., arXiv:2503.07565, appendix I).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from mmgen.networks import UNetSettings

Weights = dict[str, Tensor]  # by mmgen's names


def embedding(t: Tensor, dim: int, sine_first: bool = True, endpoint: bool = True) -> Tensor:
    """Sines and cosines of t times dim / 2 frequencies from 1 to 1/10000, float64 [N, dim]."""
    half = dim // 2
    frequencies = (1 / 10000) ** (torch.arange(half, dtype=torch.float64, device=t.device) / (half - endpoint))
    angle = t.double().outer(frequencies)
    return torch.cat([angle.sin(), angle.cos()] if sine_first else [angle.cos(), angle.sin()], dim=1)


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    """In the precision of x."""
    bias = w.get(f"{name}.bias")
    return F.linear(x, w[f"{name}.weight"].to(x.dtype), None if bias is None else bias.to(x.dtype))


def time_layers(w: Weights, name: str, x: Tensor) -> Tensor:
    return linear(w, f"{name}.linear1", F.silu(linear(w, f"{name}.linear0", x)))


def conv(w: Weights, name: str, x: Tensor) -> Tensor:
    weight = w[f"{name}.weight"]
    return F.conv2d(x, weight, w[f"{name}.bias"], padding=weight.shape[-1] // 2)


def norm(w: Weights, name: str, x: Tensor) -> Tensor:
    channels = x.shape[1]
    return F.group_norm(x, min(32, channels // 4), w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)


def resample(x: Tensor, direction: str | None) -> Tensor:
    """Half or twice the side by the box filter [1, 1], a convolution of each channel by itself."""
    channels = x.shape[1]
    box = torch.full((channels, 1, 2, 2), 0.25, dtype=x.dtype, device=x.device)
    if direction == "down":
        return F.conv2d(x, box, groups=channels, stride=2)
    return F.conv_transpose2d(x, 4 * box, groups=channels, stride=2) if direction == "up" else x


def attention(w: Weights, name: str, x: Tensor) -> Tensor:
    n, c, h, side = x.shape
    q, k, v = conv(w, f"{name}.qkv", norm(w, f"{name}.norm2", x)).reshape(n, c, 3, h * side).unbind(2)
    weights = torch.einsum("ncq,nck->nqk", q.float(), k.float() / math.sqrt(c)).softmax(dim=2).to(q.dtype)
    return conv(w, f"{name}.proj", torch.einsum("nqk,nck->ncq", weights, v).reshape(n, c, h, side))


def block(w: Weights, name: str, x: Tensor, emb: Tensor, dropout: float, direction: str | None) -> Tensor:
    hidden = conv(w, f"{name}.conv0", resample(F.silu(norm(w, f"{name}.norm0", x)), direction))
    hidden = F.silu(norm(w, f"{name}.norm1", hidden + linear(w, f"{name}.affine", emb)[:, :, None, None]))
    hidden = conv(w, f"{name}.conv1", F.dropout(hidden, dropout, dropout > 0))
    if f"{name}.skip.weight" in w:
        x = conv(w, f"{name}.skip", resample(x, direction))
    x = (x + hidden) * math.sqrt(0.5)
    return (x + attention(w, name, x)) * math.sqrt(0.5) if f"{name}.qkv.weight" in w else x


def unet(
    w: Weights, settings: UNetSettings, x: Tensor, t: Tensor, s: Tensor | None, label: Tensor | None = None,
    augment: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As mmgen's `UNet` of kind DDPM++: x float32 [N, C, R, R], t and s float64 [N] -> [N, C, R, R]."""
    emb = embedding(t, settings.model_channels)
    if "label_embed.weight" in w:
        classes = w["label_embed.weight"].shape[1]
        one_hot = F.one_hot(label, classes + 1)[:, :classes].double()
        emb = emb + linear(w, "label_embed", one_hot * math.sqrt(classes))
    if augment is not None:
        emb = emb + linear(w, "augment_embed", augment.double())
    emb = time_layers(w, "time_mlp", emb)
    if s is not None:
        emb = emb + time_layers(w, "second_time_mlp", embedding(s, settings.model_channels))
    emb = F.silu(emb).to(x.dtype)

    sides = [x.shape[-1] >> level for level in range(len(settings.channel_mult))]
    skips = []
    for level, side in enumerate(sides):
        if level == 0:
            x = conv(w, f"encoder.{side}x{side}_conv", x)
        else:
            x = block(w, f"encoder.{side}x{side}_down", x, emb, settings.dropout, "down")
        skips.append(x)
        for index in range(settings.num_blocks):
            x = block(w, f"encoder.{side}x{side}_block{index}", x, emb, settings.dropout, None)
            skips.append(x)
    for level, side in reversed(list(enumerate(sides))):
        if level == len(sides) - 1:
            x = block(w, f"decoder.{side}x{side}_in0", x, emb, settings.dropout, None)
            x = block(w, f"decoder.{side}x{side}_in1", x, emb, settings.dropout, None)
        else:
            x = block(w, f"decoder.{side}x{side}_up", x, emb, settings.dropout, "up")
        for index in range(settings.num_blocks + 1):
            x = torch.cat([x, skips.pop()], dim=1)
            x = block(w, f"decoder.{side}x{side}_block{index}", x, emb, settings.dropout, None)
    return conv(w, "out_conv", F.silu(norm(w, "out_norm", x)))
