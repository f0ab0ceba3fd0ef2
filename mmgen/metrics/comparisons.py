"""Metrics that compare generated images with real ones by the features of single images.

A further one is a function `Pair -> scores` and a line in COMPARISONS. Those that need more of the pass over the images (the
Fréchet distance, the Inception Score, the CLIP score) are in `score`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from .kid import kid
from .neighbours import NeighbourMetrics, neighbour_metrics

Scores = dict[str, tuple[float, float | None]]  # name -> value and its standard error, None where there is none


@dataclass(frozen=True)
class Pair:
    """Features of real and generated images, float32 [N, D] and [M, D], by an extractor of this title: see `features.Extractor`."""

    real: Tensor
    fake: Tensor
    title: str

    @cached_property
    def neighbours(self) -> NeighbourMetrics:
        """Computed once for all metrics that are made of it."""
        return neighbour_metrics(self.real, self.fake)


class Comparison(NamedTuple):
    title: str  # in messages
    scores: Callable[[Pair], Scores]


def named(name: str, short: str, title: str) -> str:
    """A score's name: Inception's own if the published network gave the features, else with theirs.

    >>> named("KID", "KD", "FID"), named("KID", "KD", "FD-pixels")
    ('KID', 'KD-pixels')
    """
    return name if title == "FID" else short + title.removeprefix("FD")


def _kid(pair: Pair) -> Scores:
    found = kid(pair.real, pair.fake)
    return {named("KID", "KD", pair.title): (found.mean, found.standard_error)}


def _precision_recall(pair: Pair) -> Scores:
    return {"precision": (pair.neighbours.precision, None), "recall": (pair.neighbours.recall, None)}


def _density_coverage(pair: Pair) -> Scores:
    return {"density": (pair.neighbours.density, None), "coverage": (pair.neighbours.coverage, None)}


COMPARISONS = {  # by the name of --metrics
    "kid": Comparison("KID", _kid),
    "pr": Comparison("precision and recall", _precision_recall),
    "dc": Comparison("density and coverage", _density_coverage),
}
