"""A network in float64, for comparisons with a textbook: a float32 one sums in an order, and so to digits, of the processor's own."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Exact(nn.Module):
    """The network in float64, whatever comes in. What is left is the rounding of float32 inputs and outputs, 6e-8 each."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.num_classes = network.double(), network.num_classes
        for module in network.modules():
            if isinstance(module, nn.Linear):  # embeddings of times and labels come as float32
                module.register_forward_pre_hook(lambda module, inputs: (inputs[0].double(),))

    def forward(self, x: Tensor, *rest: Tensor | None) -> Tensor:
        return self.network(x.double(), *rest)


def exactly(objective: nn.Module) -> nn.Module:
    """The objective with its network in float64."""
    objective.network = Exact(objective.network)
    assert all(p.dtype == torch.float64 for p in objective.parameters())
    return objective
