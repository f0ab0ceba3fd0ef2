"""How networks are computed in training: the precision of matrix products."""

from __future__ import annotations

import torch


def set_precision(precision: str) -> None:
    """Whether float32 matrix products and convolutions on a GPU may use TF32. Half-precision sums are never reduced."""
    tf32 = precision != "fp32"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = True  # the passes of a training have one shape: the fastest convolution is found once
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
