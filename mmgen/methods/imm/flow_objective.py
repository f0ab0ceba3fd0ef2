"""What passes over a part of the batch have in common where a flow map is trained."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ...config.imm import ImmConfig
from ...diffusion.flow_map import FlowMapSettings
from ...models.latents import LatentSettings
from ...training.inputs import Inputs

LEVELS = 8  # noise levels that numbers are logged for
_WIDEST = 0.002, 80.0  # the levels lie between these
NOISE, TIME = 103, 104  # purposes of random numbers, drawn with the seed and the number of the image: see `inputs`


def level_edges(flow: FlowMapSettings) -> list[float]:
    """sigma/alpha [LEVELS + 1], evenly spaced in the logarithm; what lies outside counts to the first or the last level."""
    ends = flow.get_schedule().eta(torch.tensor([flow.t_min, flow.t_max], dtype=torch.float64)).clamp(*_WIDEST).log()
    return torch.linspace(*ends.tolist(), LEVELS + 1, dtype=torch.float64).exp().tolist()


class FlowObjective(nn.Module):
    """What passes of flow maps have in common: the network, the images, noise levels for the log."""

    def __init__(self, network: nn.Module, config: ImmConfig, latents: LatentSettings | None = None) -> None:
        super().__init__()
        self.network, self.config = network, config
        self.inputs = Inputs(config.data, config.train.seed, latents)
        self.levels = level_edges(config.flow)
        self.has_dropout = getattr(config.network, "dropout", 0) > 0

    def by_level(self, values: Tensor, t: Tensor) -> Tensor:
        """Sums and counts of values [N], float64 [2, LEVELS], by the noise at t."""
        low, high = self.levels[0], self.levels[-1]
        position = (self.config.flow.get_schedule().eta(t).log() - math.log(low)) / math.log(high / low)
        level = (LEVELS * position).floor().clamp(0, LEVELS - 1).long()
        both = torch.stack([values.double(), torch.ones_like(values, dtype=torch.float64)])
        return both.new_zeros(2, LEVELS).index_add_(1, level, both)
