"""Group norm that stays in half precision where the network computes in it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class GroupNorm(nn.GroupNorm):
    """torch's group norm. Autocast would have it float32, three times the memory traffic; a GPU's kernel sums in float32 anyway.

    EDM's own code does the same (Karras et al., arXiv:2206.00364).
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cuda" and x.dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cuda", enabled=False):
                return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
        return super().forward(x)
