"""One pass over images: everything that the metrics need of their features, and nothing that grows with their number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from ..system.random import keys, uniform
from ..system.processes import ProcessGroup
from .features import Extractor
from .frechet import GaussianStatistics, StatisticsError
from .image_sets import ImageSet
from .inception_score import InceptionScore
from .agreement import Agreement, different, embedded_images, embedded_texts
from .stream import features_of
from .towers import Towers

MOST_KEPT = 10_000  # features kept for the metrics that compare images one by one, as in ADM's evaluation
_HALF, _BOOTSTRAP = 300, 301  # purposes of random numbers
_BLOCK = 1024  # features that join the statistics at a time

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Wanted:
    """What is to be collected beside the mean and covariance."""

    keep: bool = False  # up to MOST_KEPT features: for KID, precision, recall, density, coverage
    splits: int = 0  # of the Inception Score; 0: none
    halves: bool = False  # statistics of two random halves: for an estimate of the bias
    bootstrap: int = 0  # statistics of so many resampled sets
    towers: Towers | None = None  # for the agreement of images and captions
    captions: list[str] | None = None  # one an image, for `towers`


@dataclass
class Collected:
    """What a pass over images left."""

    num: int
    statistics: GaussianStatistics
    halves: tuple[GaussianStatistics, GaussianStatistics] | None = None
    replicates: list[GaussianStatistics] = field(default_factory=list)
    kept: Tensor | None = None  # float32 [min(num, MOST_KEPT), D], on the CPU, in the order of the images
    inception: InceptionScore | None = None
    agreement: Agreement | None = None


def collect(
    images: ImageSet,
    extractor: Extractor,
    wanted: Wanted = Wanted(),
    *,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    process_group: ProcessGroup = ProcessGroup(),
    progress: Progress | None = None,
) -> Collected:
    """Extracts the features of all images and sums them up; each process takes its share of the batches.

    Every process returns the same. Raises StatisticsError where features are not finite, DataError and MmgenError as
    `stream.features_of`, and DataError for an empty set.
    """
    if images.length == 0:
        raise DataError(f"{images.name} holds no images")
    starts = range(0, images.length, batch_size)[process_group.index :: process_group.size]
    ranges = (range(start, min(start + batch_size, images.length)) for start in starts)
    part = _Part(images, extractor, wanted)
    report = progress if progress and process_group.is_main else lambda done, total: None
    report(0, images.length)
    done = 0
    for numbers, features, pixels in features_of(images, ranges, extractor, device, pixels=wanted.towers is not None):
        part.add(numbers, features, pixels)
        done += len(numbers)
        report(min(images.length, done * process_group.size), images.length)
    part.flush()
    return _merged(process_group.gather(part.result(process_group)), images.length, wanted.captions)


class _Part:
    """What one process has seen."""

    def __init__(self, images: ImageSet, extractor: Extractor, wanted: Wanted) -> None:
        self.images, self.extractor, self.wanted = images, extractor, wanted
        count = 2 if wanted.halves else 1
        self.sums = [GaussianStatistics() for _ in range(count)]
        self.replicates = [GaussianStatistics() for _ in range(wanted.bootstrap)]
        self.inception = None
        if wanted.splits:
            self.inception = InceptionScore(images.length, wanted.splits)
        self.chosen = _chosen(images.length) if wanted.keep else None
        self.kept: list[tuple[np.ndarray, np.ndarray]] = []  # image numbers [n], their features [n, D]
        self.embedded: list[tuple[np.ndarray, Tensor]] = []  # image numbers [n], their embeddings [n, E]
        self.waiting: list[tuple[range, Tensor]] = []

    def add(self, numbers: range, features: Tensor, pixels: list[np.ndarray]) -> None:
        self.waiting.append((numbers, features))
        if self.wanted.towers is not None:
            self.embedded.append((np.array(numbers), embedded_images(self.wanted.towers, pixels)))
        if sum(len(n) for n, _ in self.waiting) >= _BLOCK:
            self.flush()

    def flush(self) -> None:
        """The waiting features join all sums: in blocks, as a covariance is large and each look at them stops a GPU."""
        if not self.waiting:
            return
        features = torch.cat([f for _, f in self.waiting])
        index = torch.cat([torch.arange(n.start, n.stop) for n, _ in self.waiting])
        try:
            if len(self.sums) == 1:
                self.sums[0].update(features)
            else:
                first = (uniform(keys(0, index, _HALF)) < 0.5).to(features.device)
                self.sums[0].update(features[first])
                self.sums[1].update(features[~first])
        except StatisticsError as error:
            broken = ~torch.isfinite(features).all(1).cpu()
            if not broken.any():
                raise
            names = ", ".join(self.images.names(int(i)) for i in index[broken][:3])
            raise StatisticsError(
                f"{int(broken.sum())} images have features that are not finite, the first {names}: "
                "is the network damaged, or in half precision?"
            ) from error
        for number, replicate in enumerate(self.replicates):
            replicate.update(features, weights=_poisson(index, number).to(features.device))
        if self.inception is not None:
            self.inception.update(index, self.extractor.probabilities(features))
        if self.chosen is not None:
            here = np.flatnonzero(self.chosen[index.numpy()])
            rows = features[torch.from_numpy(here).to(features.device)].float().cpu().numpy()
            self.kept.append((index.numpy()[here], rows))
        self.waiting.clear()

    def result(self, process_group: ProcessGroup) -> dict[str, Any]:
        """For `_merged`. The different captions are embedded by all processes, each its share."""
        texts = None
        if self.wanted.towers is not None:
            mine = different(self.wanted.captions)[process_group.index :: process_group.size]
            texts = embedded_texts(self.wanted.towers, mine)
        return {
            "sums": self.sums,
            "replicates": self.replicates,
            "inception": self.inception,
            "kept": self.kept,
            "embedded": self.embedded,
            "texts": texts,
        }


def _merged(parts: list[dict[str, Any]], num: int, captions: list[str] | None) -> Collected:
    """The parts of all processes as one."""
    first = parts[0]
    for other in parts[1:]:
        for mine, theirs in zip(first["sums"] + first["replicates"], other["sums"] + other["replicates"], strict=True):
            mine.merge(theirs)
        if first["inception"] is not None:
            first["inception"].merge(other["inception"])
    statistics = GaussianStatistics()
    for half in first["sums"]:
        statistics.merge(half)
    kept = [entry for part in parts for entry in part["kept"]]
    order = np.argsort(np.concatenate([numbers for numbers, _ in kept])) if kept else None
    embedded = [entry for part in parts for entry in part["embedded"]]
    return Collected(
        num=num,
        statistics=statistics,
        halves=tuple(first["sums"]) if len(first["sums"]) == 2 else None,
        replicates=first["replicates"],
        kept=torch.from_numpy(np.concatenate([rows for _, rows in kept])[order]) if kept else None,
        inception=first["inception"],
        agreement=Agreement.of(embedded, [part["texts"] for part in parts], captions) if embedded else None,
    )


def _chosen(length: int) -> np.ndarray:
    """Which images' features are kept, bool [length]: all, or MOST_KEPT at random, the same in every process."""
    chosen = np.zeros(length, dtype=bool)
    if length <= MOST_KEPT:
        chosen[:] = True
    else:
        chosen[np.random.default_rng(0).choice(length, MOST_KEPT, replace=False)] = True
    return chosen


def _poisson(index: Tensor, number: int) -> Tensor:
    """How often replicate `number` of the bootstrap has each image, int64 [n]: Poisson(1), which needs no second pass."""
    draw = uniform(keys(number, index, _BOOTSTRAP))
    counts, term, below = torch.zeros_like(index), torch.exp(torch.tensor(-1.0, dtype=torch.float64)), 0.0
    for k in range(1, 16):  # the chance of more is 1e-14
        below = below + term
        counts += draw >= below
        term = term / k
    return counts
