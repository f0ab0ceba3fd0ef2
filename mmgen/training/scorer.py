"""Scores while a model trains: those of `mmgen fid`, of the averaged weights, for each number of steps."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import __version__
from ..config.sections import RunSettings
from ..data import Dataset
from ..data.cache import cache_root
from ..data.latents import LatentDataset
from ..encoders.vae import decoder
from ..errors import ConfigError, DataError, MmgenError
from ..metrics.features import LARGEST_PIXELS, Extractor, auto_extractor, build_extractor
from ..metrics.image_sets import ImageSet, dataset_images, drawn_images
from ..metrics.reference_sets import ReferenceSet, collect_reference, file_reference
from ..metrics.references import is_statistics
from ..metrics.subjects import TrainingSet, training_images
from ..metrics.score import ScoreSettings, metric_name, score
from ..models.build import AnyModel
from ..sampling.drawing import SampleSettings, plan
from ..sampling.guidance import Guide
from ..system.files import at_home, read_json, sha256_of, write_json
from ..system.processes import ProcessGroup
from .collapse import Spread, spread_of, spread_of_data, watched
from .task import Reporter, Work

MOST_DECODED = 200_000  # images behind latents that are decoded for a score while training
_OF_DATA = 500  # of them tell the data's variance


class Scorer:
    """Scores models against the training set. Every process of `accelerate launch` has one, and they share the work.

    Attributes:
        name: what the score may be called, with its number of samples: fid10k, FD-pixels-1797.
        variance: by number of steps, the variance of the samples last measured, divided by the data's: see `collapse`.
    """

    def __init__(
        self, extractor: Extractor, images: ImageSet | Path, run: RunSettings, device: torch.device, process_group: ProcessGroup, work: Work,
        of_data: float,
    ) -> None:  # fmt: skip
        """images: what samples are compared with, or a file of its statistics. of_data: the variance of the data; 0: not known."""
        self.work = work
        self.extractor, self.images, self.run, self.device, self.process_group = extractor, images, run, device, process_group
        self.name = metric_name(extractor.title, run.eval_num)
        self._reference: ReferenceSet | None = None
        self._of_data = of_data
        self.variance: dict[str, float] = {}

    def measure(
        self, model: AnyModel, steps: Sequence[int], seed: int, what: str | None = None, **sampling: Any
    ) -> dict[int, float]:
        """The score for each number of steps, of the same `run.eval_num` images. To be called in all processes.

        what: shown on the bar.
        sampling: more of `SampleSettings` (sampler, grid, guidance, churn ...); without, what the model says of itself.
        """
        batch = self.run.batch_per_device
        if self._reference is None:
            self._reference = self._collect(batch)
        values, self.variance = {}, {}
        for count in steps:
            chosen = plan(model.config, SampleSettings(steps=count, seed=seed, batch_size=batch, **sampling))
            spread = Spread()
            images = drawn_images(model, chosen, self.run.eval_num, name="the model")
            with self.work(what or f"scoring, {count} step{'s' * (count > 1)}", self.run.eval_num) as update:
                found = score(
                    watched(images.telling(update), spread), self._reference, self.extractor,
                    ScoreSettings(batch_size=batch, bias=False), device=self.device, process_group=self.process_group,
                )  # fmt: skip
            values[count] = found.metrics[self.name]
            if self._of_data:
                self.variance[str(count)] = spread.result(self.process_group) / self._of_data
        return values


    @property
    def compared(self) -> int | None:
        """How many images samples are compared with; None where a file of statistics does not say."""
        if isinstance(self.images, Path):
            return None if self._reference is None else self._reference.num
        return self.images.length

    def _identity(self) -> str:
        return sha256_of(self.images) if isinstance(self.images, Path) else self.images.fingerprint()

    def _collect(self, batch: int) -> ReferenceSet:
        options = {"batch_size": batch, "device": self.device, "process_group": self.process_group}
        if isinstance(self.images, Path):
            return file_reference(self.images, self.extractor, **options)
        with self.work("reference", self.images.length) as update:
            return collect_reference(self.images, self.extractor, progress=update, **options)

    def measure_once(
        self, model: AnyModel, steps: int, seed: int, sha256: str, what: str | None = None, guide: Guide | None = None
    ) -> float:
        """`measure` of a model whose weights have this hash, remembered in the cache: the many steps of a teacher are drawn and
        scored for its first student, and not again for the next one."""
        config = {**asdict(model.config), "training": None, "data": None}  # how it is sampled; not what it is called
        how = [__version__, config, steps, seed, self.run.eval_num, self.extractor.protocol, self._identity()]
        how += [guide.sha256] if guide is not None else []
        key = hashlib.sha256(json.dumps([sha256, self.device.type, *how], sort_keys=True).encode()).hexdigest()
        file, found = cache_root() / "scores" / f"{key}.json", None
        if self.process_group.is_main:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # not known yet, or damaged
                found = float(read_json(file)["value"])
        found = self.process_group.gather(found)[0]
        if found is None:
            found = self.measure(model, [steps], seed, what, guide=guide)[steps]
            if self.process_group.is_main:
                with contextlib.suppress(MmgenError):  # a cache that cannot be written costs time only
                    write_json(file, {"value": found, "score": self.name, "model": sha256, "steps": steps})
        return found


def make_scorer(
    run: RunSettings, dataset: Dataset | LatentDataset, device: torch.device, process_group: ProcessGroup, note: Callable[[str], None],
    work: Work = Reporter().work,
) -> Scorer | None:  # fmt: skip
    """What `run.eval_features` asks for, checked before training begins; None where nothing can or need be measured.

    Raises ModelError where features that were named cannot be had. `auto` then falls back to pixels, and says so.
    """
    if run.eval_num < 2:
        return None
    try:
        images, shape, of_data = _compared(run, dataset, device)
    except MmgenError as error:
        note(f"no scores while training: {error}; `mmgen fid` scores the finished run")
        return None
    if run.eval_features != "auto":
        extractor = build_extractor(run.eval_features, device=device)
        if extractor.metric == "fd-pixels" and math.prod(shape) > LARGEST_PIXELS:
            note(f"nothing is measured while training: images of {math.prod(shape):,} numbers are too large for their pixels' covariance")
            return None
        return Scorer(extractor, images, run, device, process_group, work, of_data)
    try:
        extractor, why = auto_extractor(shape, device=device)
    except MmgenError as error:
        note(f"nothing is measured while training, as there is no FID: {error}")
        return None
    if why is not None:
        note(why)
    return Scorer(extractor, images, run, device, process_group, work, of_data)


def _compared(
    run: RunSettings, dataset: Dataset | LatentDataset, device: torch.device
) -> tuple[ImageSet | Path, tuple[int, ...], float]:
    """What samples are compared with, the shape of an image [C, H, W], and the variance of the data, 0 where it is not known.

    Of latents it is the images that they were made of. Raises MmgenError where these, or the autoencoder, cannot be had.
    """
    reference = at_home(run.eval_ref) if run.eval_ref else None
    if reference is not None and not (reference.is_file() and is_statistics(reference)):
        raise ConfigError(f"run.eval_ref {run.eval_ref} is no file of statistics, such as `mmgen fid images/ --save-stats FILE` writes")
    if not isinstance(dataset, LatentDataset):
        return reference or dataset_images(dataset), dataset.images.shape[1:], spread_of_data(dataset.images)
    decoder(dataset.latents, device)
    shape = (3, dataset.latents.resolution, dataset.latents.resolution)
    if reference is not None:
        return reference, shape, 0.0
    if len(dataset) > MOST_DECODED:
        raise DataError(f"the images of {len(dataset):,} latents are too many to decode for it: give statistics of them as run.eval_ref")
    own = TrainingSet(dataset.images["word"], dataset.images["options"], dataset.images["place"], content=dataset.images["content"])
    images, _ = training_images(own)
    some = np.linspace(0, images.length - 1, min(_OF_DATA, images.length)).astype(int)
    return images, shape, spread_of(np.concatenate([images.read(i, i + 1, False) for i in some.tolist()]))
