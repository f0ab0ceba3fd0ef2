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
from ..metrics.evaluate import SMALLEST_FOR_INCEPTION
from ..metrics.features import Extractor, build_extractor
from ..metrics.image_sets import dataset_images, drawn_images
from ..metrics.reference_sets import ReferenceSet, collect_reference
from ..metrics.score import ScoreSettings, figure_name, score
from ..models.model import AnyModel
from ..sampling.drawing import SampleSettings, plan
from ..system.processes import Team
from .collapse import Spread, spread_of_data, watched
from .task import Reporter, Work

LARGEST_PIXELS = 4096  # C H W up to which FD-pixels is measured: its covariance has the square of that


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
        note(
            "no figures while training on latents; of the finished run: "
            f"mmgen fid RUN --ref {dataset.source} --resolution {dataset.latents.resolution}"
        )
        return None
    word, small = run.eval_features, math.prod(dataset.images.shape[1:]) <= LARGEST_PIXELS
    if word == "auto":
        try:
            word = "inception" if dataset.resolution >= SMALLEST_FOR_INCEPTION else "pixels"
            extractor = build_extractor(word, device=device)
        except MmgenError as error:  # no network, or a cache that cannot be written
            instead = "FD-pixels is measured instead" if small else "nothing is measured"
            note(f"no FID while training, {instead}: {error}")
            word, extractor = "pixels", build_extractor("pixels", device=device)
    else:
        extractor = build_extractor(word, device=device)
    if word == "pixels" and not small:
        return None
    return Scorer(extractor, dataset, run, device, team, work)
