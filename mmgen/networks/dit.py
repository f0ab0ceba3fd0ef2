"""The diffusion transformer DiT (Peebles & Xie, arXiv:2212.09748), with an optional second time (IMM, arXiv:2503.07565)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError
from .conditions import Condition, class_numbers, has_null
from .keyed_dropout import run_block
from .text import CrossAttention, TextEncoder, TextSettings, start_attention_at_zero
from .embeddings import TimeMLP, positional_frequencies, sinusoid
from .limits import DEPTH, FACTOR, HEADS, PATCH, WIDTH

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
    learn_sigma: bool = False  # twice the channels come out, of which the second half is DiT's variance: [N, 2 C, R, R]
    reversed_flow: bool = False  # REPA: its time 1 is noise and its output e - x, both turned round here to be SiT's
    time_endpoint: bool = False  # diffusers' DiT: the last frequency of the time embedding is 1/10000 itself
    null_class: bool = True  # a row of the class table for no class; without it neither guidance nor unlabelled images
    mlp_epsilon: float = EPSILON  # of the layer norm before the MLP: diffusers' DiT has 1e-5

    limits: ClassVar = {
        "hidden_size": WIDTH, "depth": DEPTH, "num_heads": HEADS, "patch_size": PATCH, "mlp_ratio": FACTOR, "mlp_epsilon": (1e-30, 1.0),
    }  # fmt: skip

    def check(self, resolution: int) -> None:
        """Raises ConfigError where the settings do not fit each other or images of this size."""
        if self.num_heads < 1:
            raise ConfigError("network.num_heads must be at least 1")
        if resolution % self.patch_size:
            raise ConfigError(f"network.patch_size {self.patch_size} does not divide the resolution {resolution}")
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise ConfigError(f"network.hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads} and of 4")


def grid_embedding(dim: int, side: int) -> Tensor:
    """Fixed sine-cosine embedding of a side x side grid, float32 [1, side^2, dim]: first half x, second half y."""
    frequencies = positional_frequencies(dim // 2, endpoint=False)
    position = torch.arange(side, dtype=torch.float64, device="cpu")
    waves = sinusoid(position, frequencies, sine_first=True)  # [side, dim / 2]
    x, y = waves.expand(side, side, -1), waves[:, None].expand(side, side, -1)
    return torch.cat([x, y], dim=2).reshape(1, side * side, dim)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x [N, T, D] times (1 + scale) plus shift, both [N, D]."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the emb (adaLN-zero); between them, attention to a text, if any."""

    def __init__(
        self, dim: int, heads: int, mlp_ratio: float, mlp_epsilon: float = EPSILON, text: TextSettings | None = None
    ) -> None:
        super().__init__()
        self.heads, hidden, self.mlp_epsilon = heads, int(dim * mlp_ratio), mlp_epsilon
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.modulation = nn.Linear(dim, 6 * dim)
        self.cross = CrossAttention(dim, text) if text is not None else None

    def forward(self, x: Tensor, emb: Tensor, tokens: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(emb).chunk(6, dim=1)
        x = x + gate1[:, None] * self._attend(modulate(_layer_norm(x), shift1, scale1))
        if self.cross is not None:
            x = x + self.cross(x, tokens, mask)
        hidden = F.gelu(self.fc1(modulate(_layer_norm(x, self.mlp_epsilon), shift2, scale2)), approximate="tanh")
        return x + gate2[:, None] * self.fc2(hidden)

    def _attend(self, x: Tensor) -> Tensor:
        n, tokens, dim = x.shape
        q, k, v = self.qkv(x).reshape(n, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, dim))


def _layer_norm(x: Tensor, epsilon: float = EPSILON) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=epsilon)


class DiT(nn.Module):
    """x float [N, C, R, R], times float64 [N] -> float [N, C, R, R], with `learn_sigma` [N, 2 C, R, R].

    `condition`: class labels, the null being the last row of the table, with `text` texts, or None for all null. With `extra_channels`
    more than C come in, behind those of the image.

    Raises ConfigError for settings of denoisers together with a second time.
    """

    supports = frozenset({"second_time", "extra_channels", "text"})

    def __init__(
        self, settings: DiTSettings, resolution: int, channels: int, num_classes: int = 0, *,
        second_time: bool = True, extra_channels: int = 0, text: TextSettings | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if second_time and (settings.learn_sigma or settings.reversed_flow):
            raise ConfigError("learn_sigma and reversed_flow are settings of denoisers: a flow map's network has neither")
        self.settings, self.num_classes = settings, num_classes
        dim, patch = settings.hidden_size, settings.patch_size
        self.side = resolution // patch
        frequencies = positional_frequencies(SINUSOID_DIM, endpoint=settings.time_endpoint)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.register_buffer("position", grid_embedding(dim, self.side))
        self.patch_embed = nn.Conv2d(channels + extra_channels, dim, patch, stride=patch)
        self.time_mlp = TimeMLP(SINUSOID_DIM, dim)
        self.second_time_mlp = TimeMLP(SINUSOID_DIM, dim) if second_time else None
        self.label_embed = nn.Embedding(num_classes + settings.null_class, dim) if num_classes else None
        self.text = TextEncoder(text, dim) if text is not None else None
        self.blocks = nn.ModuleList(
            Block(dim, settings.num_heads, settings.mlp_ratio, settings.mlp_epsilon, text) for _ in range(settings.depth)
        )
        self.out_modulation = nn.Linear(dim, 2 * dim)
        self.out_channels = 2 * channels if settings.learn_sigma else channels
        self.out = nn.Linear(dim, patch * patch * self.out_channels)
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
        start_attention_at_zero(self)

    def forward(
        self, x: Tensor, t: Tensor, s: Tensor | None = None, condition: Condition | None = None, augment: Tensor | None = None
    ) -> Tensor:
        if augment is not None:
            raise ValueError("DiT takes no augmentation label")
        n, channels, patch = x.shape[0], self.out_channels, self.settings.patch_size
        t = 1 - t if self.settings.reversed_flow else t
        emb = self.time_mlp(sinusoid(t, self.frequencies, sine_first=False))
        if self.second_time_mlp is not None:
            emb = emb + self.second_time_mlp(sinusoid(s, self.frequencies, sine_first=False))
        if self.label_embed is not None:
            label = class_numbers(condition, self.num_classes, t)
            if not self.settings.null_class and has_null(condition):
                raise ConfigError("this DiT has no null class: every image needs a class, and guidance must be 1")
            emb = emb + self.label_embed(label)
        text: tuple[Tensor, ...] = ()
        if self.text is not None:
            *text, pooled = self.text(condition, t)
            emb = emb + pooled
        emb = F.silu(emb)
        x = self.patch_embed(x).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = run_block(block, self.settings.gradient_checkpointing, x, emb, *text)
        shift, scale = self.out_modulation(emb).chunk(2, dim=1)
        x = self.out(modulate(_layer_norm(x), shift, scale))
        x = x.reshape(n, self.side, self.side, patch, patch, channels)
        x = x.permute(0, 5, 1, 3, 2, 4).reshape(n, channels, self.side * patch, self.side * patch)
        return -x if self.settings.reversed_flow else x
