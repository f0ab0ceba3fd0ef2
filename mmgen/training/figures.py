"""Figures while a model trains: those of `mmgen fid`, of the averaged weights, for each number of steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..config.sections import RunSettings
from ..data import Dataset
from ..data.latents import LatentDataset
from ..errors import MmgenError
from ..metrics.features import LARGEST_PIXELS, Extractor, auto_extractor, build_extractor
from ..metrics.image_sets import dataset_images, drawn_images
from ..metrics.reference_sets import ReferenceSet, collect_reference
from ..metrics.score import ScoreSettings, figure_name, score
from ..models.model import AnyModel
from ..sampling.drawing import SampleSettings, plan
from ..system.processes import Team
from .collapse import Spread, spread_of_data, watched
from .task import Reporter, Work


class Scorer:
    """Scores models against the training set. Every process of `accelerate launch` has one, and they share the work.

    Attributes:
        name: what the figure may be called, with its number of samples: fid10k, FD-pixels-1797.
        variance: by number of steps, the variance of the samples last measured, divided by the data's: see `collapse`.
    """

    def __init__(
        self, extractor: Extractor, dataset: Dataset, run: RunSettings, device: torch.device, team: Team, work: Work
    ) -> None:
        self.work = work
        self.extractor, self.images, self.run, self.device, self.team = extractor, dataset_images(dataset), run, device, team
        self.name = figure_name(extractor.title, run.eval_num)
        self._reference: ReferenceSet | None = None
        self._of_data = spread_of_data(dataset.images)
        self.variance: dict[str, float] = {}

    def measure(
        self, model: AnyModel, steps: Sequence[int], seed: int, what: str | None = None, **sampling: Any
    ) -> dict[int, float]:
        """The figure for each number of steps, of the same `run.eval_num` images. To be called in all processes.

        what: shown on the bar.
        sampling: more of `SampleSettings` (sampler, grid, guidance, churn ...); without, what the model says of itself.
        """
        batch = self.run.batch_per_device
        if self._reference is None:
            with self.work("reference", self.images.length) as update:
                self._reference = collect_reference(
                    self.images, self.extractor, batch_size=batch, device=self.device, team=self.team, progress=update
                )
        values, self.variance = {}, {}
        for count in steps:
            chosen = plan(model.config, SampleSettings(steps=count, seed=seed, batch_size=batch, **sampling))
            spread = Spread()
            images = drawn_images(model, chosen, self.run.eval_num, name="the model")
            with self.work(what or f"scoring, {count} step{'s' * (count > 1)}", self.run.eval_num) as update:
                found = score(
                    watched(images.telling(update), spread), self._reference, self.extractor,
                    ScoreSettings(batch_size=batch, bias=False), device=self.device, team=self.team,
                )  # fmt: skip
            values[count] = found.figures[self.name]
            if self._of_data:
                self.variance[str(count)] = spread.result(self.team) / self._of_data
        return values


def make_scorer(
    run: RunSettings, dataset: Dataset | LatentDataset, device: torch.device, team: Team, note: Callable[[str], None],
    work: Work = Reporter().work,
) -> Scorer | None:  # fmt: skip
    """What `run.eval_features` asks for, checked before training begins; None where nothing can or need be measured.

    Raises ModelError where features that were named cannot be had. `auto` then falls back to pixels, and says so.
    """
    if run.eval_num < 2:
        return None
    if isinstance(dataset, LatentDataset):
        note("no figures while training on latents: `mmgen fid` scores the finished run")
        return None
    shape = dataset.images.shape[1:]
    if run.eval_features != "auto":
        extractor = build_extractor(run.eval_features, device=device)
        if extractor.metric == "fd-pixels" and math.prod(shape) > LARGEST_PIXELS:
            note(f"nothing is measured while training: images of {math.prod(shape):,} numbers are too large for their pixels' covariance")
            return None
        return Scorer(extractor, dataset, run, device, team, work)
    try:
        extractor, why = auto_extractor(shape, device=device)
    except MmgenError as error:
        note(f"nothing is measured while training, as there is no FID: {error}")
        return None
    if why is not None:
        note(why)
    return Scorer(extractor, dataset, run, device, team, work)
