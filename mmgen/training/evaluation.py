"""What a person looks at while a model trains: sample grids, FD-pixels, curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ..charts import Panel, line_chart
from ..data import Dataset
from ..images import labelled_rows
from ..metrics.frechet import GaussianStatistics, frechet_distance, pixel_statistics
from ..models import Model
from ..sampling import SampleSettings, draw

LARGEST_PIXELS = 4096  # C H W up to which FD-pixels is measured: an eigendecomposition of that size takes half a minute
SHOWN = 30  # images per number of steps in a picture


def can_measure(dataset: Dataset) -> bool:
    return math.prod(dataset.images.shape[1:]) <= LARGEST_PIXELS


def measure(
    model: Model, reference: GaussianStatistics, num: int, steps: Sequence[int], seed: int, batch_size: int
) -> dict[int, float]:
    """FD-pixels of `num` samples against the reference for each number of steps, from the same noise."""
    return {
        count: frechet_distance(
            pixel_statistics(draw(model, SampleSettings(steps=count, seed=seed, batch_size=batch_size), range(num))[0]),
            reference,
        )
        for count in steps
    }


def picture(model: Model, dataset: Dataset, steps: Sequence[int], seed: int) -> Image.Image:
    """Samples of each number of steps, from the same noise, above real images."""
    rows: list[tuple[str, Tensor | np.ndarray]] = [
        (
            f"{count} step{'s' * (count > 1)}",
            draw(model, SampleSettings(steps=count, seed=seed, classes="balanced"), range(SHOWN))[0],
        )
        for count in steps
    ]
    chosen = np.sort(np.random.default_rng(seed).choice(len(dataset), min(SHOWN, len(dataset)), replace=False))
    return labelled_rows([*rows, ("real", dataset.images[chosen])], columns=15, padding=4)


def curves(log: Sequence[dict[str, Any]], fd_halves: float | None) -> Image.Image:
    """Loss and FD-pixels over the images seen, from the lines of the log."""
    losses = [(line["images"], line["loss"]) for line in log if "loss" in line]
    panels = [Panel("loss", "images", {"loss": _split(losses)}, log_y=True)]
    measured = [line for line in log if "fd_pixels" in line]
    if measured:
        steps = list(measured[-1]["fd_pixels"])
        series = {
            f"{count} step{'s' * (count != '1')}": _split(
                [(line["images"], line["fd_pixels"][count]) for line in measured if count in line["fd_pixels"]]
            )
            for count in steps
        }
        if fd_halves is not None:
            ends = [measured[0]["images"], measured[-1]["images"]]
            series["two halves of the data"] = (ends, [fd_halves] * 2)
        panels.append(Panel("FD-pixels", "images", series, log_y=True))
    return line_chart(panels, width=600 * len(panels), height=400)


def _split(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
