"""Denoisers of known distributions, for tests."""

from __future__ import annotations

import torch
from test_denoiser import TINY
from torch import nn

from mmgen.diffusion.preconditioning import DenoiserSettings
from mmgen.models.denoiser import Denoiser
from mmgen.models.config import ModelConfig

MEAN, STD = 0.3, 0.4
SHAPE = (3, 4, 4)


# Plans and images
class Counting(nn.Module):
    """A cheap network that depends on all it is given and counts the images that it sees."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes, self.images, self.weight = num_classes, 0, nn.Parameter(torch.tensor(0.5))

    def forward(self, x, t, s=None, condition=None, augment=None):
        self.images += len(x)
        label = self.num_classes if condition is None else condition.classes
        return torch.tanh(x * self.weight + (torch.sin(t if s is None else t - s) + 0.1 * label).reshape(-1, 1, 1, 1).float())


def model(num_classes: int = 0, given: DenoiserSettings = DenoiserSettings(), **options) -> Denoiser:
    return Denoiser(ModelConfig(TINY, None, 4, 3, num_classes, denoiser=given, **options), Counting(num_classes))
