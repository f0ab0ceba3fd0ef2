"""Models as they are used from Python: loaded by name, and able to draw."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..errors import ConfigError, in_python, shortened
from ..formats.family import ConvertOptions
from ..formats.opening import open_model
from ..models import denoiser, flow_model
from ..report.bars import bar
from ..system.devices import find_device
from ..system.schema import from_keywords
from .drawing import SampleSettings, draw, plan
from .samples import Samples, as_output, check_output


class Draws:
    """What sampling adds to a model."""

    @in_python()
    def sample(
        self,
        num: int,
        *,
        output: str = "tensor",
        progress: bool = False,
        callback: Callable[[float, int], None] | None = None,
        **settings: Any,
    ) -> Samples:
        """Draws images number 0 to num - 1. Image i depends on (seed, i) alone.

        Args:
            output: `tensor`, uint8 [num, C, H, W] on the CPU; `pil`, a list of pictures; `numpy`, uint8 [num, H, W, C].
            progress: show a bar.
            callback: called with (images drawn, images in all); a fraction of an image while a batch is under way.
            settings: those of `SampleSettings` (steps, seed, classes, guidance, sampler, grid, precision, batch_size ...).

        Raises ConfigError for what does not suit the model.

        >>> samples = model.sample(8, classes=["cat", "dog"], steps=2, output="pil")
        >>> samples.images[0], samples.names[0]
        """
        check_output(output)
        if isinstance(num, bool) or not isinstance(num, int) or num < 0:
            raise ConfigError(f"the number of images must be a whole number of at least 0, not {shortened(num)}")
        chosen = plan(self.config, from_keywords(SampleSettings, settings, "setting of sampling"))
        chosen = replace(chosen, batch_size=max(1, min(chosen.batch_size, num)))
        with (bar("sampling", num) if progress else contextlib.nullcontext(lambda done: None)) as update:

            def tell(done: float) -> None:
                update(done)
                if callback is not None:
                    callback(done, num)

            images, labels = draw(self, chosen, range(num), tell)
        known = self.config.class_names if labels is not None else None
        names = None if not known else [known[i] if i < len(known) else str(i) for i in labels.tolist()]
        return Samples(as_output(images, output), labels, names, chosen.notes)


class FlowModel(Draws, flow_model.FlowModel):
    """A flow map that draws."""


class Denoiser(Draws, denoiser.Denoiser):
    """A denoiser that draws."""


@in_python()
def load(
    path: str | os.PathLike, *, ema: str | None = None, device: str | torch.device = "cpu", weights: str = "ema", **options: Any
) -> FlowModel | Denoiser:
    """Loads a model from a file, a run folder or a hub repository: a `FlowModel` or a `Denoiser`.

    device: auto (a GPU if any), cpu, cuda or cuda:N. Other projects' checkpoints are converted in memory; `options` are those of
    `mmgen convert`: type, preset, precision, heads, num_classes, guide_all.

    >>> model = mmgen.load("runs/digits-imm")
    >>> images = model.sample(64, steps=2).images  # uint8 [64, 1, 8, 8]
    >>> teacher = mmgen.load("edm-cifar10-32x32-cond-vp.pkl")
    >>> x = teacher.denoise(y, sigma, Labels(torch.tensor([3, 4]), num_classes=10))  # x_hat of y = x + sigma e
    """
    opened = open_model(path, ema, weights=weights, options=from_keywords(ConvertOptions, options, "option"))
    return opened.build(find_device(str(device)), FlowModel, Denoiser)
