"""The ADM U-Net (Dhariwal & Nichol, arXiv:2105.05233): as guided-diffusion and consistency_models have it, and as EDM has
re-written it (Karras et al., arXiv:2206.00364, appendix F.3).

The two are one network but for: the number of groups of the norms in levels narrower than 128 channels, the order of q, k
and v in the channels of the attention, and classes (EDM's re-write has a null class, the others have none). `ADMSettings`
says which.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError
from .conditions import Condition, class_numbers, has_null
from .keyed_dropout import run_block
from .dropout import Dropout
from .embeddings import TimeMLP, positional_frequencies, sinusoid
from .half import GroupNorm, doubled
from .limits import BLOCKS, FACTOR, HEADS, PROBABILITY, SIDE, WIDTH, check_groups, check_levels

EPSILON = 1e-5  # of every group norm


@dataclass(frozen=True)
class ADMSettings:
    """Defaults: ImageNet-64, in EDM's form."""

    kind: Literal["adm"] = "adm"
    model_channels: int = 192
    channel_mult: tuple[float, ...] = (1, 2, 3, 4)  # width of each level, times model_channels
    num_blocks: int = 3  # residual blocks per level
    attn_resolutions: tuple[int, ...] = (32, 16, 8)  # sides at which blocks have self-attention
    channels_per_head: int = 64
    num_heads: int = 0  # of every attention; 0: as many as channels_per_head makes
    qkv_order: Literal["edm", "legacy", "new"] = "edm"  # outermost first: head channel qkv, head qkv channel, qkv head channel
    scale_shift_norm: bool = True  # the embedding scales and shifts; else it is added
    channels_per_group: int = 4  # of the norms, at least; there are 32 groups at most
    null_class: bool = True  # it also knows images without a class
    learn_sigma: bool = False  # twice the channels out: the second half is the learned variance
    dropout: float = 0.1
    gradient_checkpointing: bool = False  # recompute blocks in the backward pass: less memory, a third more time

    limits: ClassVar = {
        "model_channels": WIDTH, "channel_mult": FACTOR, "num_blocks": BLOCKS, "attn_resolutions": SIDE, "channels_per_head": WIDTH,
        "num_heads": HEADS, "channels_per_group": WIDTH, "dropout": PROBABILITY,
    }  # fmt: skip

    def check(self, resolution: int) -> None:
        """Raises ConfigError where the settings do not fit each other or images of this size."""
        check_levels(self, resolution)
        check_groups(self, least=self.channels_per_group)


def _norm(channels: int, settings: ADMSettings) -> GroupNorm:
    return GroupNorm(min(32, channels // settings.channels_per_group), channels, eps=EPSILON)


def _zero(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class Block(nn.Module):
    """A residual block with optional resampling and optional self-attention after it. Starts as the identity."""

    def __init__(
        self, in_channels: int, out_channels: int, emb_channels: int, settings: ADMSettings, *,
        attention: bool = False, resampling: Literal["up", "down"] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.settings, self.resampling = settings, resampling
        self.norm0 = _norm(in_channels, settings)
        self.conv0 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.affine = nn.Linear(emb_channels, out_channels * (2 if settings.scale_shift_norm else 1))
        self.norm1 = _norm(out_channels, settings)
        self.dropout = Dropout(settings.dropout)
        self.conv1 = _zero(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None
        self.heads = 0
        if attention:
            self.heads = settings.num_heads or out_channels // settings.channels_per_head
            if self.heads == 0 or out_channels % self.heads:
                raise ConfigError(
                    f"attention over {out_channels} channels cannot have "
                    + (f"{self.heads} heads" if self.heads else f"heads of {settings.channels_per_head} channels")
                )
            self.norm2 = _norm(out_channels, settings)
            self.qkv = nn.Conv2d(out_channels, 3 * out_channels, 1)
            self.proj = _zero(nn.Conv2d(out_channels, out_channels, 1))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        hidden = self.conv0(self._resampled(F.silu(self.norm0(x))))
        affine = self.affine(emb)[:, :, None, None]
        if self.settings.scale_shift_norm:
            scale, shift = affine.chunk(2, dim=1)
            hidden = self.norm1(hidden) * (1 + scale) + shift
        else:
            hidden = self.norm1(hidden + affine)
        hidden = self.conv1(self.dropout(F.silu(hidden)))
        x = self._resampled(x)
        x = hidden + (x if self.skip is None else self.skip(x))
        return x + self._attend(x) if self.heads else x

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resampling is None:
            return x
        return F.avg_pool2d(x, 2) if self.resampling == "down" else doubled(x)

    def _attend(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        qkv, heads, depth = self.qkv(self.norm2(x)), self.heads, c // self.heads
        # to [3, N, heads, H W, depth] from each order of the channels
        if self.settings.qkv_order == "edm":
            qkv = qkv.reshape(n, heads, depth, 3, h * w).permute(3, 0, 1, 4, 2)
        elif self.settings.qkv_order == "legacy":
            qkv = qkv.reshape(n, heads, 3, depth, h * w).permute(2, 0, 1, 4, 3)
        else:
            qkv = qkv.reshape(n, 3, heads, depth, h * w).permute(1, 0, 2, 4, 3)
        attended = F.scaled_dot_product_attention(*qkv.contiguous().unbind(0))  # as fused kernels want them
        return self.proj(attended.transpose(2, 3).reshape(n, c, h, w))


class ADM(nn.Module):
    """x float [N, C, R, R], times float64 [N] -> float [N, C, R, R], or [N, 2 C, R, R] with `learn_sigma`.

    `condition`: class labels, or None for all null. Without `null_class` in the settings these
    two raise ConfigError: such a network was only ever trained with classes. `augment` float [N, augment_dim] or None.
    With `extra_channels` more than C come in, behind those of the image.
    """

    supports = frozenset({"second_time", "augment_dim", "extra_channels"})

    def __init__(
        self, settings: ADMSettings, resolution: int, channels: int, num_classes: int = 0, augment_dim: int = 0, *,
        second_time: bool = False, extra_channels: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.settings, self.num_classes = settings, num_classes
        width, emb = settings.model_channels, 4 * settings.model_channels
        self.register_buffer("frequencies", positional_frequencies(width, endpoint=False), persistent=False)
        self.augment_embed = nn.Linear(augment_dim, width, bias=False) if augment_dim else None
        self.label_embed = nn.Linear(num_classes, emb, bias=False) if num_classes else None
        self.time_mlp = TimeMLP(width, emb)
        self.second_time_mlp = TimeMLP(width, emb) if second_time else None

        # Names of the blocks are EDM's: side of the image, then place.
        self.encoder, self.decoder = nn.ModuleDict(), nn.ModuleDict()
        widths = [int(mult * width) for mult in settings.channel_mult]
        current, skips = widths[0], [widths[0]]
        for level, out in enumerate(widths):
            side = resolution >> level
            if level == 0:
                self.encoder[f"{side}x{side}_conv"] = nn.Conv2d(channels + extra_channels, out, 3, padding=1)
            else:
                self.encoder[f"{side}x{side}_down"] = Block(current, current, emb, settings, resampling="down")
                skips.append(current)
            for index in range(settings.num_blocks):
                attention = side in settings.attn_resolutions
                self.encoder[f"{side}x{side}_block{index}"] = Block(current, out, emb, settings, attention=attention)
                current = out
                skips.append(current)
        for level, out in reversed(list(enumerate(widths))):
            side = resolution >> level
            if level == len(widths) - 1:
                self.decoder[f"{side}x{side}_in0"] = Block(current, current, emb, settings, attention=True)
                self.decoder[f"{side}x{side}_in1"] = Block(current, current, emb, settings)
            else:
                self.decoder[f"{side}x{side}_up"] = Block(current, current, emb, settings, resampling="up")
            for index in range(settings.num_blocks + 1):
                attention = side in settings.attn_resolutions
                name = f"{side}x{side}_block{index}"
                self.decoder[name] = Block(current + skips.pop(), out, emb, settings, attention=attention)
                current = out
        self.out_norm = _norm(current, settings)
        self.out_conv = _zero(nn.Conv2d(current, channels * (2 if settings.learn_sigma else 1), 3, padding=1))

    def forward(
        self, x: Tensor, t: Tensor, s: Tensor | None = None, condition: Condition | None = None, augment: Tensor | None = None
    ) -> Tensor:
        emb = self._embed(t, s, condition, augment)
        skips, again = [], self.settings.gradient_checkpointing
        for name, module in self.encoder.items():
            x = module(x) if name.endswith("_conv") else run_block(module, again, x, emb)
            skips.append(x)
        for name, module in self.decoder.items():
            if "_block" in name:
                x = torch.cat([x, skips.pop()], dim=1)
            x = run_block(module, again, x, emb)
        return self.out_conv(F.silu(self.out_norm(x)))

    def _embed(self, t: Tensor, s: Tensor | None, condition: Condition | None, augment: Tensor | None) -> Tensor:
        """[N, 4 model_channels] from the times, the class and the augmentation."""
        emb = sinusoid(t, self.frequencies, sine_first=False)
        if augment is not None:
            if self.augment_embed is None:
                raise ValueError("this network takes no augmentation label")
            emb = emb + self.augment_embed(augment)
        emb = self.time_mlp(emb)
        if self.second_time_mlp is not None:
            emb = emb + self.second_time_mlp(sinusoid(s, self.frequencies, sine_first=False))
        if self.label_embed is not None:
            label = class_numbers(condition, self.num_classes, t)
            if not self.settings.null_class and has_null(condition):
                raise ConfigError(
                    f"this network was trained with its {self.num_classes} classes only: it has no null class, so that every "
                    "image needs a class, and classifier-free guidance (other than 1) is not possible"
                )
            one_hot = F.one_hot(label, self.num_classes + 1)[:, :-1].to(emb.dtype)
            emb = emb + self.label_embed(one_hot)
        return F.silu(emb)
