"""Models as they are used from Python: loaded by name, and able to draw."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from ..formats.family import ConvertOptions
from ..formats.opening import open_model
from ..models import denoiser, flow_model
from .drawing import SampleSettings, draw


class Draws:
    """What sampling adds to a model."""

    def sample(self, num: int, **options: Any) -> Tensor:
        """Images, uint8 [num, C, H, W] on the CPU. Options: those of `SampleSettings` (steps, seed, classes, guidance, sampler,
        grid, batch_size ...)."""
        return draw(self, SampleSettings(**options), range(num))[0]


class FlowModel(Draws, flow_model.FlowModel):
    """A flow map that draws."""


class Denoiser(Draws, denoiser.Denoiser):
    """A denoiser that draws."""


def load(
    place: str | os.PathLike, *, ema: str | None = None, device: str | torch.device = "cpu", weights: str = "ema", **options: Any
) -> FlowModel | Denoiser:
    """Loads a model from a file, a run folder or a hub repository: a `FlowModel` or a `Denoiser`.

    Other projects' checkpoints are converted in memory; `options` are those of `mmgen convert`: type, preset, heads, classes ...

    >>> model = mmgen.load("runs/digits-imm")
    >>> images = model.sample(64, steps=2)  # uint8 [64, 1, 8, 8]
    >>> teacher = mmgen.load("edm-cifar10-32x32-cond-vp.pkl")
    >>> x = teacher.denoise(y, sigma, Labels(torch.tensor([3, 4]), num_classes=10))  # x_hat of y = x + sigma e
    """
    opened = open_model(place, ema, weights=weights, options=ConvertOptions(**options))
    return opened.build(device, FlowModel, Denoiser)
