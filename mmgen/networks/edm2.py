"""The magnitude-preserving U-Net of EDM2 (Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion
Models", arXiv:2312.02696, configuration G; equations and figures below are its).

Not verified against outputs of NVIDIA's own networks, as none were at hand: the tests compare it with a second, plain
float64 reading of the same equations. Key names and shapes are as published. Weights are normalised whenever they are used;
the forced normalisation of the stored weights after each training step (eq. 66) is not done here, as nothing trains it.
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
from .half import doubled
from .keyed_dropout import run_block
from .dropout import Dropout
from .limits import BLOCKS, FACTOR, PROBABILITY, SHARE, SIDE, WIDTH, WIDTH_OR_0, check_levels

EPSILON = 1e-4  # added to every magnitude that is divided by


@dataclass(frozen=True)
class EDM2Settings:
    """Defaults: EDM2-S on ImageNet-64."""

    kind: Literal["edm2"] = "edm2"
    model_channels: int = 192
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)  # width of each level, times model_channels
    noise_channels: int = 0  # of the embedding of the noise level; 0: the first level's width
    emb_channels: int = 0  # of the embedding that blocks get; 0: the widest level's
    num_blocks: int = 3  # residual blocks per level
    attn_resolutions: tuple[int, ...] = (16, 8)  # sides at which blocks have self-attention
    channels_per_head: int = 64
    dropout: float = 0.0
    label_balance: float = 0.5  # between noise level (0) and class (1)
    concat_balance: float = 0.5  # between main path (0) and skip connection (1)
    res_balance: float = 0.3  # between main path (0) and residual branch (1)
    attn_balance: float = 0.3  # between main path (0) and attention (1)
    clip_activations: float | None = 256.0  # after every block
    gradient_checkpointing: bool = False  # recompute blocks in the backward pass: less memory, a third more time

    limits: ClassVar = {
        "model_channels": WIDTH, "channel_mult": FACTOR, "noise_channels": WIDTH_OR_0, "emb_channels": WIDTH_OR_0, "num_blocks": BLOCKS,
        "attn_resolutions": SIDE, "channels_per_head": WIDTH, "dropout": PROBABILITY, "label_balance": SHARE, "concat_balance": SHARE,
        "res_balance": SHARE, "attn_balance": SHARE, "clip_activations": (1e-3, 1e30),
    }  # fmt: skip
    null_class: ClassVar = True

    def check(self, resolution: int) -> None:
        """Raises ConfigError where the settings do not fit each other or images of this size."""
        check_levels(self, resolution)


def normalise(x: Tensor, dim: tuple[int, ...]) -> Tensor:
    """x with a root mean square of one over `dim` (pixel norm over channels: eq. 30), in x's dtype."""
    return x / (x.float().square().mean(dim, keepdim=True).sqrt() + EPSILON).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """SiLU that keeps the magnitude of Gaussian input (eq. 81)."""
    return F.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, balance: float) -> Tensor:
    """Weighted sum, scaled so that two independent inputs of magnitude one give magnitude one (eq. 88)."""
    return ((1 - balance) * a + balance * b) / math.hypot(1 - balance, balance)


def mp_cat(a: Tensor, b: Tensor, balance: float) -> Tensor:
    """Concatenation over channels in which each input's share of the magnitude is its weight, whatever its width (eq. 103)."""
    width_a, width_b = a.shape[1], b.shape[1]
    common = math.sqrt((width_a + width_b) / ((1 - balance) ** 2 + balance**2))
    return torch.cat([common * (1 - balance) / math.sqrt(width_a) * a, common * balance / math.sqrt(width_b) * b], dim=1)


class Fourier(nn.Module):
    """sqrt(2) cos(2 pi (f t + phase)) with random frequencies and phases (eq. 75): t [N] -> float32 [N, channels]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def forward(self, t: Tensor) -> Tensor:
        angle = t.double()[:, None] * self.freqs.double() + self.phases.double()
        return (math.sqrt(2) * angle.cos()).float()


class Layer(nn.Module):
    """A linear layer (kernel 0) or convolution without bias whose weights have magnitude one per output (eqs. 47, 66)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *([kernel] * 2 if kernel else [])))

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        weight = self.weight.float()
        weight = normalise(weight, tuple(range(1, weight.ndim))) * (gain / math.sqrt(weight[0].numel()))
        weight = weight.to(x.dtype)
        return x @ weight.t() if weight.ndim == 2 else F.conv2d(x, weight, padding=weight.shape[-1] // 2)


class Block(nn.Module):
    """A residual block of the encoder or the decoder, with optional self-attention after it (figure 21)."""

    def __init__(
        self, in_channels: int, out_channels: int, emb_channels: int, settings: EDM2Settings, *, side: Literal["enc", "dec"],
        attention: bool = False, resampling: Literal["up", "down"] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.settings, self.side, self.resampling = settings, side, resampling
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = Layer(out_channels if side == "enc" else in_channels, out_channels, 3)
        self.emb_linear = Layer(emb_channels, out_channels)
        self.dropout = Dropout(settings.dropout)
        self.conv_res1 = Layer(out_channels, out_channels, 3)
        self.conv_skip = Layer(in_channels, out_channels, 1) if in_channels != out_channels else None
        self.heads = out_channels // settings.channels_per_head if attention else 0
        if attention and (self.heads == 0 or out_channels % self.heads):
            raise ConfigError(f"attention over {out_channels} channels cannot have heads of {settings.channels_per_head}")
        if attention:
            self.attn_qkv = Layer(out_channels, 3 * out_channels, 1)
            self.attn_proj = Layer(out_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.resampling is not None:
            x = F.avg_pool2d(x, 2) if self.resampling == "down" else doubled(x)
        if self.side == "enc":
            x = x if self.conv_skip is None else self.conv_skip(x)
            x = normalise(x, (1,))
        scale = 1 + self.emb_linear(emb, self.emb_gain)
        hidden = mp_silu(self.conv_res0(mp_silu(x)) * scale[:, :, None, None])
        hidden = self.conv_res1(self.dropout(hidden))
        if self.side == "dec" and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, hidden, self.settings.res_balance)
        if self.heads:
            x = mp_sum(x, self._attend(x), self.settings.attn_balance)
        limit = self.settings.clip_activations
        return x if limit is None else x.clamp(-limit, limit)

    def _attend(self, x: Tensor) -> Tensor:
        """Cosine attention: q, k and v have magnitude one per head and position; they alternate in the channels."""
        n, c, h, w = x.shape
        qkv = normalise(self.attn_qkv(x).reshape(n, self.heads, c // self.heads, 3, h * w), (2,))
        q, k, v = qkv.permute(3, 0, 1, 4, 2).contiguous().unbind(0)  # each [N, heads, H W, depth], as fused kernels want them
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.attn_proj(attended.transpose(2, 3).reshape(n, c, h, w))


class EDM2(nn.Module):
    """x float [N, C, R, R], time float64 [N] -> float [N, C, R, R].

    `condition`: class labels, the null being a vector of zeros, or None for all null. No second time, no
    augmentation label. With `extra_channels` more than C come in, behind those of the image.
    """

    supports = frozenset({"extra_channels"})

    def __init__(
        self, settings: EDM2Settings, resolution: int, channels: int, num_classes: int = 0, *, extra_channels: int = 0
    ) -> None:
        super().__init__()
        self.settings, self.num_classes, self.channels = settings, num_classes, channels
        widths = [settings.model_channels * mult for mult in settings.channel_mult]
        noise, emb = settings.noise_channels or widths[0], settings.emb_channels or max(widths)
        self.out_gain = nn.Parameter(torch.zeros([]))
        self.emb_fourier = Fourier(noise)
        self.emb_noise = Layer(noise, emb)
        self.emb_label = Layer(num_classes, emb) if num_classes else None

        def block(in_channels: int, out_channels: int, **options) -> Block:
            return Block(in_channels, out_channels, emb, settings, **options)

        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        current, skips = widths[0], [widths[0]]
        for level, out in enumerate(widths):
            side = resolution >> level
            if level == 0:
                self.enc[f"{side}x{side}_conv"] = Layer(channels + 1 + extra_channels, out, 3)
            else:
                self.enc[f"{side}x{side}_down"] = block(current, current, side="enc", resampling="down")
                skips.append(current)
            for index in range(settings.num_blocks):
                attention = side in settings.attn_resolutions
                self.enc[f"{side}x{side}_block{index}"] = block(current, out, side="enc", attention=attention)
                current = out
                skips.append(current)
        for level, out in reversed(list(enumerate(widths))):
            side = resolution >> level
            if level == len(widths) - 1:
                self.dec[f"{side}x{side}_in0"] = block(current, current, side="dec", attention=True)
                self.dec[f"{side}x{side}_in1"] = block(current, current, side="dec")
            else:
                self.dec[f"{side}x{side}_up"] = block(current, current, side="dec", resampling="up")
            for index in range(settings.num_blocks + 1):
                attention = side in settings.attn_resolutions
                name = f"{side}x{side}_block{index}"
                self.dec[name] = block(current + skips.pop(), out, side="dec", attention=attention)
                current = out
        self.out_conv = Layer(current, channels, 3)

    def forward(
        self, x: Tensor, t: Tensor, s: Tensor | None = None, condition: Condition | None = None, augment: Tensor | None = None
    ) -> Tensor:
        if s is not None or augment is not None:
            raise ValueError("EDM2's network takes neither a second time nor an augmentation label")
        emb = self.emb_noise(self.emb_fourier(t))
        if self.emb_label is not None:
            label = class_numbers(condition, self.num_classes, t)
            one_hot = F.one_hot(label, self.num_classes + 1)[:, :-1].to(emb.dtype)
            emb = mp_sum(emb, self.emb_label(one_hot * math.sqrt(self.num_classes)), self.settings.label_balance)
        emb = mp_silu(emb)
        image, extra = x[:, : self.channels], x[:, self.channels :]
        x = torch.cat([image, torch.ones_like(x[:, :1]), extra], dim=1)  # the constant stands in for biases
        skips, again = [], self.settings.gradient_checkpointing
        for name, module in self.enc.items():
            x = module(x) if name.endswith("_conv") else run_block(module, again, x, emb)
            skips.append(x)
        for name, module in self.dec.items():
            if "_block" in name:
                x = mp_cat(x, skips.pop(), self.settings.concat_balance)
            x = run_block(module, again, x, emb)
        return self.out_conv(x, self.out_gain)
