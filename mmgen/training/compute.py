"""How networks are computed: the precision of matrix products, and compilation."""

from __future__ import annotations

import torch
from torch import nn


def set_precision(precision: str) -> None:
    """Whether float32 matrix products and convolutions on a GPU may use TF32. Half-precision sums are never reduced."""
    tf32 = precision != "fp32"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def compile_network(network: nn.Module) -> None:
    """torch.compile in place: the state dict keeps its names.

    Compiled random numbers are drawn as in eager mode: the pass with gradient and the target's are compiled apart, and their
    dropout masks must be the same.
    """
    import torch._inductor.config as inductor

    inductor.fallback_random = True
    network.compile(dynamic=False)
