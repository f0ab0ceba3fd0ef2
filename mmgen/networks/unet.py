"""The U-Nets DDPM++ and NCSN++ in EDM's form, with an optional second time (IMM, arXiv:2503.07565, appendix I; Karras et
al., arXiv:2206.00364, appendix F; Song et al., arXiv:2011.13456).

DDPM++: positional embedding, box filter, plain encoder. NCSN++: Fourier embedding, [1, 3, 3, 1] filter, residual encoder.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .conditions import Condition, class_numbers
from .keyed_dropout import run_block
from .dropout import Dropout
from .embeddings import TimeMLP, positional_frequencies, sinusoid
from .half import GroupNorm, doubled
from .limits import BLOCKS, FACTOR, PROBABILITY, SIDE, WIDTH, check_groups, check_levels
from .text import CrossAttention, TextEncoder, TextSettings
from .winograd import Conv2d

EPSILON = 1e-6  # of every group norm
SKIP_SCALE = math.sqrt(0.5)  # keeps the variance of a sum of two


@dataclass(frozen=True)
class UNetSettings:
    """Defaults: DDPM++ as the paper trains it on CIFAR-10."""

    kind: Literal["unet"] = "unet"
    model_channels: int = 128  # width of the first level
    channel_mult: tuple[int, ...] = (2, 2, 2)  # width of each level, times model_channels
    num_blocks: int = 4  # residual blocks per level
    attn_resolutions: tuple[int, ...] = (16,)  # sides at which blocks have self-attention
    dropout: float = 0.2
    embedding: Literal["positional", "fourier"] = "positional"  # of the times
    encoder: Literal["standard", "residual"] = "standard"  # residual: the shrunken image is added at every level
    resample: Literal["box", "fir"] = "box"  # filter for going between levels: [1, 1] or [1, 3, 3, 1]
    gradient_checkpointing: bool = False  # recompute blocks in the backward pass: less memory, a third more time

    limits: ClassVar = {
        "model_channels": WIDTH, "channel_mult": FACTOR, "num_blocks": BLOCKS, "attn_resolutions": SIDE, "dropout": PROBABILITY,
    }  # fmt: skip
    null_class: ClassVar = True

    def check(self, resolution: int) -> None:
        """Raises ConfigError where the settings do not fit each other or images of this size."""
        check_levels(self, resolution)
        check_groups(self, least=4)


def _linear(in_dim: int, out_dim: int, bias: bool = True, gain: float = 1.0) -> nn.Linear:
    layer = nn.Linear(in_dim, out_dim, bias=bias)
    return _initialise(layer, gain)


def _conv(in_channels: int, out_channels: int, kernel: int, padding: int | None = None, gain: float = 1.0) -> nn.Conv2d:
    layer = Conv2d(in_channels, out_channels, kernel, padding=kernel // 2 if padding is None else padding)
    return _initialise(layer, gain)


def _initialise(layer: nn.Module, gain: float) -> nn.Module:
    nn.init.xavier_uniform_(layer.weight, gain=gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def _norm(channels: int) -> GroupNorm:
    return GroupNorm(min(32, channels // 4), channels, eps=EPSILON)


def _fir(x: Tensor, gain: float) -> tuple[Tensor, int]:
    """[1, 3, 3, 1] by itself, normalised to sum `gain`, as a depthwise kernel [C, 1, 4, 4]."""
    taps = x.new_full((4,), 3 / 8)  # made on the device: nothing is copied there
    taps[::3].fill_(1 / 8)
    return (gain * taps.outer(taps)).expand(x.shape[1], 1, 4, 4), x.shape[1]


def downsample(x: Tensor, resample: str, padding: int = 1) -> Tensor:
    """Half the side. `padding` (of the [1, 3, 3, 1] filter) is 0 where the caller has padded already."""
    if resample == "box":
        return F.avg_pool2d(x, 2)
    kernel, groups = _fir(x, 1.0)
    return F.conv2d(x, kernel, groups=groups, stride=2, padding=padding)


def upsample(x: Tensor, resample: str) -> Tensor:
    """Twice the side."""
    if resample == "box":
        return doubled(x)
    kernel, groups = _fir(x, 4.0)
    return F.conv_transpose2d(x, kernel, groups=groups, stride=2, padding=1)


class Block(nn.Module):
    """A residual block with optional resampling, and optional single-head self-attention and attention to a text after it."""

    def __init__(
        self, in_channels: int, out_channels: int, emb_channels: int, dropout: float, *,
        attention: bool = False, resampling: Literal["up", "down"] | None = None, resample: str = "box",
        text: TextSettings | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.resampling, self.resample = resampling, resample
        self.norm0 = _norm(in_channels)
        self.conv0 = _conv(in_channels, out_channels, 3)
        self.affine = _linear(emb_channels, out_channels)
        self.norm1 = _norm(out_channels)
        self.dropout = Dropout(dropout)
        self.conv1 = _conv(out_channels, out_channels, 3, gain=1e-5)
        self.skip = _conv(in_channels, out_channels, 1) if resampling or in_channels != out_channels else None
        self.attention = attention
        if attention:
            self.norm2 = _norm(out_channels)
            self.qkv = _conv(out_channels, 3 * out_channels, 1, gain=math.sqrt(0.2))
            self.proj = _conv(out_channels, out_channels, 1, gain=1e-5)
        self.cross = CrossAttention(out_channels, text) if attention and text is not None else None

    def forward(self, x: Tensor, emb: Tensor, tokens: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        hidden = self.conv0(self._resampled(F.silu(self.norm0(x))))
        hidden = F.silu(self.norm1(hidden + self.affine(emb)[:, :, None, None]))
        hidden = self.conv1(self.dropout(hidden))
        x = x if self.skip is None else self.skip(self._resampled(x))
        x = (x + hidden) * SKIP_SCALE
        x = (x + self._attend(x)) * SKIP_SCALE if self.attention else x
        if self.cross is None:
            return x
        return x + self.cross(x.flatten(2).transpose(1, 2), tokens, mask).transpose(1, 2).reshape(x.shape)

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resampling is None:
            return x
        return downsample(x, self.resample) if self.resampling == "down" else upsample(x, self.resample)

    def _attend(self, x: Tensor) -> Tensor:
        """Single-head attention over positions; q, k, v alternate in the channels of qkv."""
        n, c, h, w = x.shape
        qkv = self.qkv(self.norm2(x)).reshape(n, c, 3, h * w).permute(2, 0, 3, 1)
        q, k, v = qkv.contiguous().unsqueeze(2).unbind(0)  # as fused kernels want them
        attended = F.scaled_dot_product_attention(q, k, v)  # [N, 1, H W, C]
        return self.proj(attended.squeeze(1).transpose(1, 2).reshape(n, c, h, w))


class AuxiliaryDown(nn.Module):
    """The residual encoder's image path: convolution, then [1, 3, 3, 1] filtering at stride 2, zero-padded once for both."""

    def __init__(self, in_channels: int, out_channels: int, resample: str) -> None:
        super().__init__()
        self.resample = resample
        self.conv = _conv(in_channels, out_channels, 3, padding=2 if resample == "fir" else 1)

    def forward(self, x: Tensor) -> Tensor:
        return downsample(self.conv(x), self.resample, padding=0)


class UNet(nn.Module):
    """x float [N, C, R, R], times float64 [N] -> float [N, C, R, R].

    `condition`: class labels, with `text` texts, or None for all null. `augment` float [N, augment_dim] or None for
    images that were not augmented. With `extra_channels` more than C come in, behind those of the image.
    """

    supports = frozenset({"second_time", "augment_dim", "extra_channels", "text"})

    def __init__(
        self, settings: UNetSettings, resolution: int, channels: int, num_classes: int = 0, augment_dim: int = 0, *,
        second_time: bool = True, extra_channels: int = 0, text: TextSettings | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.settings, self.num_classes = settings, num_classes
        width, emb = settings.model_channels, 4 * settings.model_channels
        if settings.embedding == "fourier":
            embed_dim = 2 * width
            self.register_buffer("frequencies", torch.randn(width) * 16)
        else:
            embed_dim = width
            self.register_buffer("frequencies", positional_frequencies(width, endpoint=True), persistent=False)
        self.label_embed = _linear(num_classes, embed_dim) if num_classes else None
        self.augment_embed = _linear(augment_dim, embed_dim, bias=False) if augment_dim else None
        self.text = TextEncoder(text, embed_dim) if text is not None else None
        self.time_mlp = TimeMLP(embed_dim, emb)
        self.second_time_mlp = TimeMLP(embed_dim, emb) if second_time else None
        for mlp in filter(None, (self.time_mlp, self.second_time_mlp)):
            _initialise(mlp.linear0, 1.0), _initialise(mlp.linear1, 1.0)

        def block(in_channels: int, out_channels: int, **options) -> Block:
            return Block(in_channels, out_channels, emb, settings.dropout, resample=settings.resample, text=text, **options)

        # Names of the blocks are EDM's: side of the image, then place.
        self.encoder = nn.ModuleDict()
        skips, current, image = [], width, channels + extra_channels
        for level, mult in enumerate(settings.channel_mult):
            side = resolution >> level
            if level == 0:
                self.encoder[f"{side}x{side}_conv"] = _conv(image, width, 3)
            else:
                self.encoder[f"{side}x{side}_down"] = block(current, current, resampling="down")
                if settings.encoder == "residual":
                    self.encoder[f"{side}x{side}_aux_residual"] = AuxiliaryDown(image, current, settings.resample)
                    image = current
            skips.append(current)
            for index in range(settings.num_blocks):
                out = mult * width
                self.encoder[f"{side}x{side}_block{index}"] = block(current, out, attention=side in settings.attn_resolutions)
                current = out
                skips.append(current)

        self.decoder = nn.ModuleDict()
        for level, mult in reversed(list(enumerate(settings.channel_mult))):
            side = resolution >> level
            if level == len(settings.channel_mult) - 1:
                self.decoder[f"{side}x{side}_in0"] = block(current, current, attention=True)
                self.decoder[f"{side}x{side}_in1"] = block(current, current)
            else:
                self.decoder[f"{side}x{side}_up"] = block(current, current, resampling="up")
            for index in range(settings.num_blocks + 1):
                attention = index == settings.num_blocks and side in settings.attn_resolutions
                out = mult * width
                self.decoder[f"{side}x{side}_block{index}"] = block(current + skips.pop(), out, attention=attention)
                current = out
        self.out_norm = _norm(current)
        self.out_conv = _conv(current, channels, 3, gain=1e-5)

    def forward(
        self, x: Tensor, t: Tensor, s: Tensor | None = None, condition: Condition | None = None, augment: Tensor | None = None
    ) -> Tensor:
        emb, *text = self._embed(t, s, condition, augment)
        image, skips, again = x, [], self.settings.gradient_checkpointing
        for name, module in self.encoder.items():
            if name.endswith("_conv"):
                x = module(x)
            elif name.endswith("_aux_residual"):
                x = skips.pop()
                x = image = (x + module(image)) * SKIP_SCALE
            else:
                x = run_block(module, again, x, emb, *text)
            skips.append(x)
        for name, module in self.decoder.items():
            if "_block" in name:
                x = torch.cat([x, skips.pop()], dim=1)
            x = run_block(module, again, x, emb, *text)
        return self.out_conv(F.silu(self.out_norm(x)))

    def _embed(
        self, t: Tensor, s: Tensor | None, condition: Condition | None, augment: Tensor | None
    ) -> tuple[Tensor, ...]:
        """[N, 4 model_channels] from the times, the class or text and the augmentation; of a text its tokens and their mask."""
        frequencies = self.frequencies * (2 * math.pi if self.settings.embedding == "fourier" else 1)
        emb = sinusoid(t, frequencies, sine_first=True)
        if self.label_embed is not None:
            label = class_numbers(condition, self.num_classes, t)
            one_hot = F.one_hot(label, self.num_classes + 1)[:, :-1].to(emb.dtype)
            emb = emb + self.label_embed(one_hot * math.sqrt(self.num_classes))
        text: tuple[Tensor, ...] = ()
        if self.text is not None:
            *text, pooled = self.text(condition, t)
            emb = emb + pooled
        if augment is not None:
            emb = emb + self.augment_embed(augment)
        emb = self.time_mlp(emb)
        if self.second_time_mlp is not None:
            emb = emb + self.second_time_mlp(sinusoid(s, frequencies, sine_first=True))
        return F.silu(emb), *text
