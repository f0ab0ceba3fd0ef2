"""The precision that a model is sampled in: of the network alone; times, coefficients and the sampler's state stay in float64."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from ..errors import ConfigError, nearest

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def check_precision(precision: str | None) -> str | None:
    """Raises ConfigError for an unknown word."""
    if precision not in (None, *PRECISIONS):
        raise ConfigError(f"unknown precision {precision!r}: {nearest(precision, PRECISIONS)}")
    return precision


@contextlib.contextmanager
def computed_in(precision: str | None, network: nn.Module) -> Iterator[None]:
    """The network computes in this precision, by autocast where it is a half one. Raises ConfigError.

    None: as torch is set; a network whose weights are half computes in half.
    """
    weights = next(network.parameters())
    if precision == "fp16" and weights.device.type == "cpu":
        raise ConfigError("precision fp16 needs a GPU: take fp32 on a CPU")
    half = _HALF.get(precision, weights.dtype)
    autocast = contextlib.nullcontext()
    if half in _HALF.values():
        autocast = torch.autocast(weights.device.type, half)
    with autocast, float32_products(precision):
        yield


@contextlib.contextmanager
def float32_products(precision: str | None) -> Iterator[None]:
    """Products and convolutions of float32 in full (fp32), or with the tensor cores of a GPU (any other). None: as torch is set."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    if precision is not None:
        torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
        torch.backends.cudnn.allow_tf32 = precision != "fp32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
