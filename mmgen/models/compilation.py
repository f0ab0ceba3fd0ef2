"""Compilation of a network, for training and for sampling."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..networks import blocks


def compile_network(network: nn.Module, backend: Any = "inductor") -> None:
    """torch.compile in place: the state dict keeps its names.

    Of a network with a transformer each block is compiled: blocks of the same shapes share one compilation. A whole DiT-XL/2 takes
    minutes before its first step. A U-Net, whose blocks differ, is compiled whole: the 33 blocks of cifar10-imm are
    14 graphs, which together take as long.

    Compiled random numbers are drawn as in eager mode: the pass with gradient and the target's are compiled apart, and their
    dropout masks must be the same.
    """
    import torch._inductor.config as inductor

    inductor.fallback_random = True
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)  # of one class of block in all its shapes
    transformer = any(isinstance(child, nn.ModuleList) for child in network.children())
    for part in blocks(network) if transformer else [network]:
        part.compile(backend=backend, dynamic=False)
