"""What a person looks at while a model trains: sample grids and curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ..charts import Panel, line_chart
from ..data import Dataset
from ..images import labelled_rows
from ..models import Model
from ..sampling import SampleSettings, draw

SHOWN = 30  # images per number of steps in a picture


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


def curves(log: Sequence[dict[str, Any]], halves: float | None = None) -> Image.Image:
    """Loss and figure over the images seen, from the lines of the log. `halves`: what two halves of the data are apart."""
    losses = [(line["images"], line["loss"]) for line in log if "loss" in line]
    panels = [Panel("loss", "images", {"loss": _split(losses)}, log_y=True)]
    measured = [line for line in log if "values" in line]
    for name in dict.fromkeys(line["figure"] for line in measured):
        lines = [line for line in measured if line["figure"] == name]
        series = {
            f"{count} step{'s' * (count != '1')}": _split(
                [(line["images"], line["values"][count]) for line in lines if count in line["values"]]
            )
            for count in lines[-1]["values"]
        }
        if halves is not None and name == measured[-1]["figure"]:
            series["two halves of the data"] = ([lines[0]["images"], lines[-1]["images"]], [halves] * 2)
        panels.append(Panel(name, "images", series, log_y=True))
    return line_chart(panels, width=600 * len(panels), height=400)


def _split(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
