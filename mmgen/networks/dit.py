"""The diffusion transformer DiT (Peebles & Xie, arXiv:2212.09748), with an optional second time (IMM, arXiv:2503.07565)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .embeddings import TimeMLP, positional_frequencies, sinusoid

EPSILON = 1e-6  # of every layer norm
SINUSOID_DIM = 256


@dataclass(frozen=True)
class DiTSettings:
    """Defaults: DiT-S/2."""

    kind: Literal["dit"] = "dit"
    hidden_size: int = 384
    depth: int = 12
    num_heads: int = 6
    patch_size: int = 2
    mlp_ratio: float = 4.0
    gradient_checkpointing: bool = False  # recompute blocks in the backward pass: less memory, a third more time


def grid_embedding(dim: int, side: int) -> Tensor:
    """Fixed sine-cosine embedding of a side x side grid, float32 [1, side^2, dim]: first half x, second half y."""
    frequencies = positional_frequencies(dim // 2, endpoint=False)
    position = torch.arange(side, dtype=torch.float64)
    waves = sinusoid(position, frequencies, sine_first=True)  # [side, dim / 2]
    x, y = waves.expand(side, side, -1), waves[:, None].expand(side, side, -1)
    return torch.cat([x, y], dim=2).reshape(1, side * side, dim)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x [N, T, D] times (1 + scale) plus shift, both [N, D]."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition (adaLN-zero)."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.heads, hidden = heads, int(dim * mlp_ratio)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, dim=1)
        x = x + gate1[:, None] * self._attend(modulate(_layer_norm(x), shift1, scale1))
        hidden = F.gelu(self.fc1(modulate(_layer_norm(x), shift2, scale2)), approximate="tanh")
        return x + gate2[:, None] * self.fc2(hidden)

    def _attend(self, x: Tensor) -> Tensor:
        n, tokens, dim = x.shape
        q, k, v = self.qkv(x).reshape(n, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, dim))


def _layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPSILON)


class DiT(nn.Module):
    """x float [N, C, R, R], times float64 [N] -> float [N, C, R, R].

    `label` int64 [N] with num_classes as the null class (the last row of the table), or None for all null.
    """

    def __init__(
        self, settings: DiTSettings, resolution: int, channels: int, num_classes: int = 0, *, second_time: bool = True
    ) -> None:
        super().__init__()
        self.settings, self.num_classes = settings, num_classes
        dim, patch = settings.hidden_size, settings.patch_size
        self.side = resolution // patch
        self.register_buffer("frequencies", positional_frequencies(SINUSOID_DIM, endpoint=False), persistent=False)
        self.register_buffer("position", grid_embedding(dim, self.side))
        self.patch_embed = nn.Conv2d(channels, dim, patch, stride=patch)
        self.time_mlp = TimeMLP(SINUSOID_DIM, dim)
        self.second_time_mlp = TimeMLP(SINUSOID_DIM, dim) if second_time else None
        self.label_embed = nn.Embedding(num_classes + 1, dim) if num_classes else None
        self.blocks = nn.ModuleList(Block(dim, settings.num_heads, settings.mlp_ratio) for _ in range(settings.depth))
        self.out_modulation = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, patch * patch * channels)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.weight.flatten(1))  # as the linear map that it is
        nn.init.zeros_(self.patch_embed.bias)
        if self.label_embed is not None:
            nn.init.normal_(self.label_embed.weight, std=0.02)
        for mlp in filter(None, (self.time_mlp, self.second_time_mlp)):
            nn.init.normal_(mlp.linear0.weight, std=0.02)
            nn.init.normal_(mlp.linear1.weight, std=0.02)
        # adaLN-zero: every block starts as the identity, the network as zero
        for layer in [block.modulation for block in self.blocks] + [self.out_modulation, self.out]:
            nn.init.zeros_(layer.weight)

    def forward(
        self, x: Tensor, t: Tensor, s: Tensor | None = None, label: Tensor | None = None, augment: Tensor | None = None
    ) -> Tensor:
        if augment is not None:
            raise ValueError("DiT takes no augmentation label")
        n, channels, patch = x.shape[0], x.shape[1], self.settings.patch_size
        condition = self.time_mlp(sinusoid(t, self.frequencies, sine_first=False))
        if self.second_time_mlp is not None:
            condition = condition + self.second_time_mlp(sinusoid(s, self.frequencies, sine_first=False))
        if self.label_embed is not None:
            label = torch.full_like(t, self.num_classes, dtype=torch.int64) if label is None else label
            condition = condition + self.label_embed(label)
        condition = F.silu(condition)
        x = self.patch_embed(x).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            if self.settings.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, condition, use_reentrant=False)
            else:
                x = block(x, condition)
        shift, scale = self.out_modulation(condition).chunk(2, dim=1)
        x = self.out(modulate(_layer_norm(x), shift, scale))
        x = x.reshape(n, self.side, self.side, patch, patch, channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(n, channels, self.side * patch, self.side * patch)
