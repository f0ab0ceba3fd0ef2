"""The UViT of simple diffusion (Hoogeboom et al., arXiv:2301.11093, section 3.5 and appendix B): a U-Net of convolutional
blocks whose lowest level is a plain transformer, for images of 64 pixels and more without an autoencoder.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError
from .conditions import Condition, class_numbers
from .keyed_dropout import run_block
from .dropout import Dropout
from .half import GroupNorm, doubled
from .text import CrossAttention, TextEncoder, TextSettings, start_attention_at_zero
from .embeddings import TimeMLP, positional_frequencies, sinusoid
from .limits import BLOCKS, DEPTH, FACTOR, PATCH, PROBABILITY, SIDE, WIDTH, WIDTH_OR_0

EPSILON = 1e-6  # of every norm
SINUSOID_DIM = 256
SKIP_SCALE = math.sqrt(0.5)  # keeps the variance of a sum of two


@dataclass(frozen=True)
class UViTSettings:
    """Defaults: for ImageNet-128, of about 2 billion parameters as the paper's, nearly all of them in the transformer.

    Only that size is known for certain. Widths, depth, emb_channels and dropout are the paper's from memory; num_blocks,
    channels_per_head and where the transformer gets its scale and shift are choices made here.

    A network of about 400 million parameters, such as Salimans et al., arXiv:2406.04103, distil: model_channels 256,
    channel_mult (1, 2, 4), num_blocks (3, 3), depth 22 at 64 pixels (that size is from memory as well, its division is ours).
    """

    kind: Literal["uvit"] = "uvit"
    model_channels: int = 128  # width of the first level
    channel_mult: tuple[int, ...] = (1, 2, 4, 16)  # width of each level, times model_channels; the last is the transformer's
    num_blocks: tuple[int, ...] = (3, 3, 3)  # of each convolutional level, on the way down and again on the way up
    depth: int = 36  # transformer blocks
    channels_per_head: int = 128  # of the attention
    mlp_ratio: float = 4.0  # hidden width of the MLPs, times the transformer's
    emb_channels: int = 1024  # of the embedding of times and class
    patch_size: int = 1  # above 1, patches of the image are made channels first: for images of 256 pixels and more
    dropout: float = 0.1
    dropout_resolution: int = 32  # the largest side at which there is dropout: none in the high-resolution levels
    gradient_checkpointing: bool = False  # recompute blocks in the backward pass: less memory, a third more time

    limits: ClassVar = {
        "model_channels": WIDTH, "channel_mult": FACTOR, "num_blocks": BLOCKS, "depth": DEPTH, "channels_per_head": WIDTH,
        "mlp_ratio": FACTOR, "emb_channels": WIDTH_OR_0, "patch_size": PATCH, "dropout": PROBABILITY, "dropout_resolution": SIDE,
    }  # fmt: skip
    null_class: ClassVar = True

    def check(self, resolution: int) -> None:
        """Raises ConfigError where the settings do not fit each other or images of this size."""
        level_widths(self, resolution)


class ConvBlock(nn.Module):
    """Two convolutions with the embedding's scale and shift between them, added to what came in. Starts as the identity.

    x, and what the way down has kept for it (`skip`): [N, C, H, W]; emb [N, emb_channels]. The skip connection is a sum of two
    normalised images.
    """

    def __init__(self, channels: int, emb_channels: int, dropout: float, *, skip: bool = False) -> None:
        super().__init__()
        self.norm0 = _group_norm(channels)
        self.norm_skip = _group_norm(channels) if skip else None
        self.conv0 = nn.Conv2d(channels, channels, 3, padding=1)
        self.affine = nn.Linear(emb_channels, 2 * channels)
        self.norm1 = _group_norm(channels)
        self.dropout = Dropout(dropout)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor, skip: Tensor | None = None) -> Tensor:
        hidden = self.norm0(x)
        if self.norm_skip is not None:
            hidden = (hidden + self.norm_skip(skip)) * SKIP_SCALE
        hidden = self.conv0(F.silu(hidden))
        scale, shift = self.affine(emb)[:, :, None, None].chunk(2, dim=1)
        hidden = self.norm1(hidden) * (1 + scale) + shift
        return x + self.conv1(self.dropout(F.silu(hidden)))


class TransformerBlock(nn.Module):
    """Self-attention, then an MLP, each on normalised tokens with the embedding's scale and shift, and between them attention to a
    text, if any. Starts as the identity.

    x [N, tokens, D]; emb [N, emb_channels]. Queries and keys are normalised to root mean square 1 in each head, times a
    learned gain.
    """

    def __init__(self, dim: int, emb_channels: int, settings: UViTSettings, text: TextSettings | None = None) -> None:
        super().__init__()
        hidden = int(dim * settings.mlp_ratio)
        self.heads = dim // settings.channels_per_head
        self.affine = nn.Linear(emb_channels, 4 * dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.query_gain = nn.Parameter(torch.ones(settings.channels_per_head))
        self.key_gain = nn.Parameter(torch.ones(settings.channels_per_head))
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.dropout = Dropout(settings.dropout)
        self.cross = CrossAttention(dim, text) if text is not None else None

    def forward(self, x: Tensor, emb: Tensor, tokens: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        scale1, shift1, scale2, shift2 = self.affine(emb)[:, None].chunk(4, dim=2)
        x = x + self._attend(_layer_norm(x) * (1 + scale1) + shift1)
        if self.cross is not None:
            x = x + self.cross(x, tokens, mask)
        hidden = F.gelu(self.fc1(_layer_norm(x) * (1 + scale2) + shift2), approximate="tanh")
        return x + self.fc2(self.dropout(hidden))

    def _attend(self, x: Tensor) -> Tensor:
        n, tokens, dim = x.shape
        q, k, v = self.qkv(x).reshape(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = _rms_norm(q, self.query_gain), _rms_norm(k, self.key_gain)
        attended = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
        return self.proj(attended.transpose(1, 2).reshape(n, tokens, dim))


def _group_norm(channels: int) -> GroupNorm:
    return GroupNorm(_groups(channels), channels, eps=EPSILON)


def _groups(channels: int) -> int:
    return max(1, min(32, channels // 4))


def _layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPSILON)


def _rms_norm(x: Tensor, gain: Tensor) -> Tensor:
    """Written out, as the fused one has no forward-mode derivative everywhere."""
    return x * (x.pow(2).mean(-1, keepdim=True) + EPSILON).rsqrt() * gain


class Resampling(nn.Module):
    """Half or twice the side, and another width: average pooling or repetition, and a 1 x 1 convolution.

    The two commute, so the convolution is on the side where there are fewer pixels.
    """

    def __init__(self, in_channels: int, out_channels: int, direction: Literal["down", "up"]) -> None:
        super().__init__()
        self.direction = direction
        self.conv = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.direction == "down":
            return self.conv(F.avg_pool2d(x, 2))
        return doubled(self.conv(x))


class UViT(nn.Module):
    """x float [N, C + extra_channels, R, R], times float64 [N] -> float [N, C, R, R].

    `condition`: class labels, the null being the last row of the table, with `text` texts, or None for all null. It takes no
    augmentation label. Raises ConfigError for settings that make no network.
    """

    supports = frozenset({"second_time", "extra_channels", "text"})

    def __init__(
        self, settings: UViTSettings, resolution: int, channels: int, num_classes: int = 0, *,
        second_time: bool = True, extra_channels: int = 0, text: TextSettings | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.settings, self.num_classes = settings, num_classes
        patch, emb = settings.patch_size, settings.emb_channels
        widths = level_widths(settings, resolution)
        sides = [resolution // patch >> level for level in range(len(widths))]
        self.register_buffer("frequencies", positional_frequencies(SINUSOID_DIM, endpoint=False), persistent=False)
        self.time_mlp = TimeMLP(SINUSOID_DIM, emb)
        self.second_time_mlp = TimeMLP(SINUSOID_DIM, emb) if second_time else None
        self.label_embed = nn.Embedding(num_classes + 1, emb) if num_classes else None
        self.text = TextEncoder(text, emb) if text is not None else None

        self.encoder, self.decoder = nn.ModuleDict(), nn.ModuleDict()
        self.in_conv = nn.Conv2d((channels + extra_channels) * patch**2, widths[0], 3, padding=1)
        levels = list(enumerate(zip(sides[:-1], widths[:-1], settings.num_blocks, strict=True)))
        for level, (side, width, count) in levels:
            dropout = settings.dropout if side <= settings.dropout_resolution else 0.0
            for index in range(count):
                self.encoder[f"{side}x{side}_block{index}"] = ConvBlock(width, emb, dropout)
            self.encoder[f"{side}x{side}_down"] = Resampling(width, widths[level + 1], "down")
        self.position = nn.Parameter(torch.empty(1, sides[-1] ** 2, widths[-1]))
        self.transformer = nn.ModuleList(TransformerBlock(widths[-1], emb, settings, text) for _ in range(settings.depth))
        for level, (side, width, count) in reversed(levels):
            dropout = settings.dropout if side <= settings.dropout_resolution else 0.0
            self.decoder[f"{side}x{side}_up"] = Resampling(widths[level + 1], width, "up")
            for index in range(count):
                self.decoder[f"{side}x{side}_block{index}"] = ConvBlock(width, emb, dropout, skip=True)
        self.out_norm = _group_norm(widths[0])
        self.out_conv = nn.Conv2d(widths[0], channels * patch**2, 3, padding=1)
        self._initialise()

    def _initialise(self) -> None:
        """Normal weights of variance 1 / fan-in, zero biases; blocks begin as the identity and the network as zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.position, std=0.02)
        if self.label_embed is not None:
            nn.init.normal_(self.label_embed.weight, std=0.02)
        ends = [self.out_conv]
        for module in self.modules():
            if isinstance(module, ConvBlock):
                ends.append(module.conv1)
            elif isinstance(module, TransformerBlock):
                ends += [module.proj, module.fc2]
        for layer in ends:
            nn.init.zeros_(layer.weight)
        start_attention_at_zero(self)

    def forward(
        self, x: Tensor, t: Tensor, s: Tensor | None = None, condition: Condition | None = None, augment: Tensor | None = None
    ) -> Tensor:
        if augment is not None:
            raise ValueError("UViT takes no augmentation label")
        (emb, *text), patch = self._embed(t, s, condition), self.settings.patch_size
        x = self.in_conv(F.pixel_unshuffle(x, patch))
        skips, again = [], self.settings.gradient_checkpointing
        for name, module in self.encoder.items():
            if name.endswith("_down"):
                x = module(x)
            else:
                x = run_block(module, again, x, emb)
                skips.append(x)
        shape = x.shape
        x = x.flatten(2).transpose(1, 2) + self.position
        for block in self.transformer:
            x = run_block(block, again, x, emb, *text)
        x = x.transpose(1, 2).reshape(shape)
        for name, module in self.decoder.items():
            x = module(x) if name.endswith("_up") else run_block(module, again, x, emb, skips.pop())
        return F.pixel_shuffle(self.out_conv(F.silu(self.out_norm(x))), patch)

    def _embed(self, t: Tensor, s: Tensor | None, condition: Condition | None) -> tuple[Tensor, ...]:
        """[N, emb_channels] from the times and the class or text; of a text its tokens and their mask."""
        dtype = self.time_mlp.linear0.bias.dtype
        emb = self.time_mlp(sinusoid(t, self.frequencies, sine_first=False).to(dtype))
        if self.second_time_mlp is not None:
            emb = emb + self.second_time_mlp(sinusoid(s, self.frequencies, sine_first=False).to(dtype))
        if self.label_embed is not None:
            emb = emb + self.label_embed(class_numbers(condition, self.num_classes, t))
        text: tuple[Tensor, ...] = ()
        if self.text is not None:
            *text, pooled = self.text(condition, t)
            emb = emb + pooled
        return F.silu(emb), *text


def level_widths(settings: UViTSettings, resolution: int) -> list[int]:
    """The width of each level. Raises ConfigError where the settings do not fit each other or the resolution."""
    widths = [mult * settings.model_channels for mult in settings.channel_mult]
    if len(widths) < 2 or len(settings.num_blocks) != len(widths) - 1 or min(settings.num_blocks) < 1:
        raise ConfigError(
            f"num_blocks {list(settings.num_blocks)} does not fit channel_mult {list(settings.channel_mult)}: a UViT has a "
            "number of blocks, at least 1, for each level but the last, which is the transformer, and at least 2 levels"
        )
    factor = settings.patch_size << (len(widths) - 1)
    if settings.patch_size < 1 or resolution % factor:
        raise ConfigError(
            f"a UViT with {len(widths)} levels and patch_size {settings.patch_size} needs images whose side is a multiple of "
            f"{max(factor, 1)}, not {resolution}: give fewer levels (channel_mult, num_blocks) or another size"
        )
    if widths[-1] % settings.channels_per_head:
        raise ConfigError(f"{widths[-1]} channels cannot be split into heads of {settings.channels_per_head} (channels_per_head)")
    for width in widths[:-1]:
        if width % _groups(width):
            raise ConfigError(
                f"a level {width} channels wide cannot be normalised in {_groups(width)} groups: use a multiple of 32"
            )
    return widths
