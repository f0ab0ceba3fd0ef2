"""What stays in half precision where the network computes in it: autocast would have it float32, three times the memory traffic.

EDM's own code does the same with its group norms (Karras et al., arXiv:2206.00364).
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class GroupNorm(nn.GroupNorm):
    """torch's group norm, whose kernels on a GPU sum in float32 anyway."""

    def forward(self, x: Tensor) -> Tensor:
        if not _is_half(x):
            return super().forward(x)
        with torch.autocast("cuda", enabled=False):
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def doubled(x: Tensor) -> Tensor:
    """Each pixel of x [N, C, H, W] four times: [N, C, 2H, 2W]."""
    with torch.autocast("cuda", enabled=False) if _is_half(x) else contextlib.nullcontext():
        return F.interpolate(x, scale_factor=2.0, mode="nearest")


def _is_half(x: Tensor) -> bool:
    return x.device.type in ("cuda", "meta") and x.dtype in (torch.bfloat16, torch.float16)
