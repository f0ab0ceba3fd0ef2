"""The diffusion transformer as a textbook writes it (Peebles & Xie, arXiv:2212.09748), to be measured against: a function of a
state dict of mmgen's `DiT`. Attention by einsum in float32, the layers of the times in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from mmgen.networks import DiTSettings

from .plain_unet import Weights, embedding, linear, time_layers


def layer_norm(x: Tensor) -> Tensor:
    mean = x.mean(dim=-1, keepdim=True)
    return (x - mean) / (x.var(dim=-1, keepdim=True, correction=0) + 1e-6).sqrt()


def attention(w: Weights, name: str, x: Tensor, heads: int) -> Tensor:
    n, tokens, dim = x.shape
    q, k, v = linear(w, f"{name}.qkv", x).reshape(n, tokens, 3, heads, dim // heads).unbind(2)
    weights = torch.einsum("nqhc,nkhc->nhqk", q.float(), k.float()) / math.sqrt(dim // heads)
    return linear(w, f"{name}.proj", torch.einsum("nhqk,nkhc->nqhc", weights.softmax(-1).to(v.dtype), v).flatten(2))


def dit(w: Weights, settings: DiTSettings, x: Tensor, t: Tensor, s: Tensor, label: Tensor | None, augment: None = None) -> Tensor:
    """As mmgen's `DiT`: x float32 [N, C, R, R], t and s float64 [N] -> [N, C, R, R]."""
    n, channels, height = x.shape[:3]
    patch = settings.patch_size
    side = height // patch
    condition = time_layers(w, "time_mlp", embedding(t, 256, sine_first=False, endpoint=False))
    condition = condition + time_layers(w, "second_time_mlp", embedding(s, 256, sine_first=False, endpoint=False))
    if label is not None:
        condition = condition + w["label_embed.weight"].double()[label]
    condition = F.silu(condition).to(x.dtype)
    x = F.conv2d(x, w["patch_embed.weight"], w["patch_embed.bias"], stride=patch).flatten(2).transpose(1, 2) + w["position"]
    for index in range(settings.depth):
        name = f"blocks.{index}"
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(w, f"{name}.modulation", condition)[:, None].chunk(6, dim=2)
        x = x + gate1 * attention(w, name, layer_norm(x) * (1 + scale1) + shift1, settings.num_heads)
        hidden = F.gelu(linear(w, f"{name}.fc1", layer_norm(x) * (1 + scale2) + shift2), approximate="tanh")
        x = x + gate2 * linear(w, f"{name}.fc2", hidden)
    shift, scale = linear(w, "out_modulation", condition)[:, None].chunk(2, dim=2)
    x = linear(w, "out", layer_norm(x) * (1 + scale) + shift).reshape(n, side, side, patch, patch, channels)
    return torch.einsum("nhwpqc->nchpwq", x).reshape(n, channels, side * patch, side * patch)
