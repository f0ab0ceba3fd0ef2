"""Text in a network: bytes or the features of a frozen encoder become tokens to attend to and a vector beside the times.

The pooled vector is added to the embedding of the times, and blocks attend to the tokens (cross-attention as in Rombach et al.,
arXiv:2112.10752, section 3.3). What a block's attention adds is zero at first, so training begins with the pooled vector alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError
from .conditions import Condition, Text

BYTES = "bytes"
_PADDING, _START, _FIRST = 0, 1, 2  # ids: nothing, the start of every text, and byte 0
VOCABULARY = _FIRST + 256
EPSILON = 1e-6  # of every layer norm


@dataclass(frozen=True)
class TextSettings:
    """How a text becomes what a network is conditioned on."""

    # bytes: a small transformer on UTF-8, trained with the network; else a folder of transformers or of `pipeline`, frozen
    encoder: str = BYTES
    length: int = 64  # tokens; what is longer is cut. Of bytes: the start and the bytes of the text
    width: int = 128  # of a token. Of a folder: its own, filled in
    pooled: int = 128  # of the vector for the whole text. Of a folder: its own, filled in
    depth: int = 2  # bytes only: transformer blocks
    heads: int = 4  # of the attention, the encoder's own (bytes only) and that of the network's blocks
    sha256: str = ""  # of a folder: of its weights and tokenizer, filled in
    pipeline: str = ""  # class name of the diffusers pipeline whose text encoders these are, in the folder or hub id `encoder`


def check_text(settings: TextSettings) -> None:
    """Raises ConfigError for sizes that no encoder has."""
    no_pooled = 0 if settings.pipeline else 1  # some pipelines have no vector for the whole text
    limits = {"length": (2, 4096), "width": (1, 2**17), "pooled": (no_pooled, 2**17), "depth": (0, 64), "heads": (1, 2**10)}
    for name, (least, most) in limits.items():
        if not least <= getattr(settings, name) <= most:
            raise ConfigError(f"text.{name} = {getattr(settings, name)} is impossible: from {least} to {most:,}")
    if settings.pipeline and settings.encoder == BYTES:
        raise ConfigError(f"text.pipeline {settings.pipeline} needs text.encoder: the folder or hub id of the pipeline")
    if settings.encoder == BYTES and settings.width % settings.heads:
        raise ConfigError(f"text.width {settings.width} must be a multiple of text.heads {settings.heads}")


def byte_ids(texts: Sequence[str], length: int) -> tuple[Tensor, Tensor, int]:
    """Ids int64 [N, length] of texts, the mask of what is there, bool [N, length], and how many texts were cut.

    >>> byte_ids(["", "é"], 4)[0].tolist()
    [[1, 0, 0, 0], [1, 197, 171, 0]]
    """
    ids, cut = torch.full((len(texts), length), _PADDING, device="cpu"), 0
    for row, text in enumerate(texts):
        content = [_START, *(byte + _FIRST for byte in text.encode("utf-8"))]
        ids[row, : min(len(content), length)] = torch.tensor(content[:length], device="cpu")
        cut += len(content) > length
    return ids, ids != _PADDING, cut


def byte_text(texts: Sequence[str], length: int) -> tuple[Text, int]:
    """The condition that a network with an encoder of bytes takes, its null being the empty text, and how many were cut."""
    ids, mask, cut = byte_ids(texts, length)
    return Text(ids, mask, empty=Text(*byte_ids([""], length)[:2])), cut


class _Block(nn.Module):
    """Self-attention and an MLP on normalised tokens [N, L, D]; mask bool [N, 1, 1, L]."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=EPSILON), nn.LayerNorm(dim, eps=EPSILON)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        n, length, dim = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.proj(attended.transpose(1, 2).reshape(n, length, dim))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate="tanh"))


class TextEncoder(nn.Module):
    """A condition -> tokens [N, L, width], their mask bool [N, 1, 1, L], and the embedding's part [N, emb_channels].

    For bytes it is a transformer whose pooled vector is the mean of its tokens. For a frozen encoder it normalises the features
    and keeps those of the null ("" by the encoder) as buffers, so that a model file is complete without the encoder.
    """

    def __init__(self, settings: TextSettings, emb_channels: int) -> None:
        super().__init__()
        self.settings = settings
        width, length = settings.width, settings.length
        if settings.encoder == BYTES:
            self.embed = nn.Embedding(VOCABULARY, width)
            self.position = nn.Parameter(torch.empty(1, length, width))
            nn.init.normal_(self.embed.weight, std=0.5)
            nn.init.normal_(self.position, std=0.5)
            self.blocks = nn.ModuleList(_Block(width, settings.heads) for _ in range(settings.depth))
            self.norm = nn.LayerNorm(width, eps=EPSILON)
        else:
            self.register_buffer("null_tokens", torch.zeros(1, length, width))
            self.register_buffer("null_mask", torch.ones(1, length, dtype=torch.bool))
            self.register_buffer("null_pooled", torch.zeros(1, settings.pooled))
        self.project = nn.Linear(width if settings.encoder == BYTES else settings.pooled, emb_channels)

    def set_null(self, null: Text) -> None:
        """What a frozen encoder makes of "": one row."""
        self.null_tokens.copy_(null.tokens)
        self.null_mask.copy_(null.mask)
        self.null_pooled.copy_(null.pooled)

    def null(self) -> Text:
        """The null, one row."""
        if self.settings.encoder == BYTES:
            return byte_text([""], self.settings.length)[0].to(self.position.device)
        return Text(self.null_tokens, self.null_mask, self.null_pooled)

    def forward(self, condition: Condition | None, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        text = self._checked(condition, like)
        mask = text.mask[:, None, None, :]
        if self.settings.encoder == BYTES:
            x = self.embed(text.tokens) + self.position
            for block in self.blocks:
                x = block(x, mask)
            tokens, there = self.norm(x), text.mask[:, :, None].to(x.dtype)
            pooled = (tokens * there).sum(1) / there.sum(1)
        else:
            dtype = self.project.bias.dtype
            tokens = F.layer_norm(text.tokens.to(dtype), text.tokens.shape[-1:], eps=EPSILON)
            pooled = F.layer_norm(text.pooled.to(dtype), text.pooled.shape[-1:], eps=EPSILON)
        return tokens, mask, self.project(pooled)

    def _checked(self, condition: Condition | None, like: Tensor) -> Text:
        """The condition, or the null for every image of `like` [N]. Raises ConfigError for another network's."""
        if condition is None:
            return self.null()[torch.zeros_like(like, dtype=torch.int64)]
        settings = self.settings
        if not isinstance(condition, Text):
            raise ConfigError(f"this network is conditioned on text, not on {type(condition).__name__}")
        expected = (settings.length,) if settings.encoder == BYTES else (settings.length, settings.width)
        if tuple(condition.tokens.shape[1:]) != expected:
            given = list(condition.tokens.shape[1:])
            raise ConfigError(f"this network takes texts of {list(expected)} each, and these are {given}: encode them for it")
        return condition


class CrossAttention(nn.Module):
    """What the text adds to normalised x [N, T, D]; zero at first. tokens [N, L, W], mask bool [N, 1, 1, L]."""

    def __init__(self, dim: int, text: TextSettings) -> None:
        super().__init__()
        self.heads = next(heads for heads in range(min(text.heads, dim), 0, -1) if dim % heads == 0)
        self.query, self.key_value, self.proj = nn.Linear(dim, dim), nn.Linear(text.width, 2 * dim), nn.Linear(dim, dim)
        self.start_at_zero()

    def start_at_zero(self) -> None:
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        n, count, dim = x.shape
        q = self.query(F.layer_norm(x, (dim,), eps=EPSILON)).reshape(n, count, self.heads, -1).transpose(1, 2)
        k, v = self.key_value(tokens).reshape(n, tokens.shape[1], 2, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(attended.transpose(1, 2).reshape(n, count, dim))


def start_attention_at_zero(network: nn.Module) -> None:
    """For networks that initialise all layers alike."""
    for module in network.modules():
        if isinstance(module, CrossAttention):
            module.start_at_zero()
