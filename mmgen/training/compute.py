"""How networks are computed: the precision of matrix products, and compilation."""

from __future__ import annotations

import torch
from torch import nn


def set_precision(precision: str) -> None:
    """Whether float32 matrix products and convolutions on a GPU may use TF32. Half-precision sums are never reduced."""
    tf32 = precision != "fp32"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = True  # the passes of a training have one shape: the fastest convolution is found once
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def lay_out(network: nn.Module) -> None:
    """Convolutions as a GPU's kernels want them, channels last; on a CPU nothing changes. Values and state dict are the same."""
    for weight in network.parameters():  # strides of sides that are 1 say nothing, and optimisers compare them
        if weight.device.type == "cuda" and weight.ndim == 4 and min(weight.shape) > 1:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)


def compile_network(network: nn.Module) -> None:
    """torch.compile in place: the state dict keeps its names.

    Compiled random numbers are drawn as in eager mode: the pass with gradient and the target's are compiled apart, and their
    dropout masks must be the same.
    """
    import torch._inductor.config as inductor

    inductor.fallback_random = True
    network.compile(dynamic=False)
