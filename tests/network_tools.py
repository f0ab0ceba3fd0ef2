"""What tests of several networks share."""

from __future__ import annotations

import torch
from torch import nn


def randomised(network: nn.Module, seed: int = 0) -> nn.Module:
    """Weights of an ordinary size everywhere, as layers that start as zero would hide what is behind them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / max(p[0].numel(), 16) ** 0.5)
    return network


def masks_are_the_seeds(network: nn.Module, given: tuple) -> None:
    """What the loss relies on: the same torch seed before two passes gives the same dropout masks; none in eval mode."""
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(network(*given))
    assert torch.equal(outputs[0], outputs[1]) and not torch.allclose(outputs[0], outputs[2], rtol=1e-3)
    assert torch.equal(network.eval()(*given), network(*given))
