"""What a person looks at while a model trains: sample grids and curves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..report.charts import Panel, line_chart
from ..data import Dataset
from ..data.latents import LatentDataset
from ..errors import MmgenError
from ..report.images import labelled_rows
from ..models.model import AnyModel, ModelConfig
from ..sampling.drawing import SampleSettings, draw
from ..encoders.vae import decoder, normalise
from .collapse import spread_of
from .task import Reporter, Work

SHOWN = 30  # images per number of steps in a picture
_OF_EVERY_LINE = ("images", "step", "seconds", "images_per_second", "learning_rate")
_TOLD_OTHERWISE = ("loss_max", "skipped_steps")  # ends of names of numbers for the log alone


def can_show(config: ModelConfig, device: torch.device, note: Callable[[str], None]) -> bool:
    """Whether pictures can be made: of pixels always, of latents where their VAE can be had. Says so where it cannot."""
    if config.latents is None:
        return True
    try:
        decoder(config.latents, device)
        return True
    except MmgenError as error:
        note(f"no pictures while training: {error}")
        return False


def picture(
    model: AnyModel, dataset: Dataset | LatentDataset, steps: Sequence[int], seed: int, work: Work = Reporter().work
) -> tuple[Image.Image, dict[str, float]]:
    """Samples of each number of steps, from the same noise, above real images; and by number of steps the samples' variance,
    divided by that of the real images: see `collapse`."""
    classes = "balanced" if model.config.num_classes else "random"
    rows: list[tuple[str, Tensor | np.ndarray]] = []
    for count in steps:
        name = f"{count} step{'s' * (count > 1)}"
        with work(f"picture, {name}", SHOWN) as update:
            settings = SampleSettings(steps=count, seed=seed, classes=classes)
            rows.append((name, draw(model, settings, range(SHOWN), update)[0]))
    chosen = np.sort(np.random.default_rng(seed).choice(len(dataset), min(SHOWN, len(dataset)), replace=False))
    real = real_images(model, dataset, chosen)
    of_data = spread_of(real[1])
    variance = {str(count): spread_of(images) / of_data for count, (_, images) in zip(steps, rows, strict=True) if of_data}
    return labelled_rows([*rows, real], columns=15, padding=4), variance


def real_images(model: AnyModel, dataset: Dataset | LatentDataset, chosen: np.ndarray) -> tuple[str, Tensor | np.ndarray]:
    """Images of the data set and their caption. Of latents, what the VAE gives back: the best that a model can reach."""
    if not isinstance(dataset, LatentDataset):
        return "real", dataset.images[chosen]
    latents = model.config.latents
    means = torch.from_numpy(dataset.moments[chosen][:, : dataset.channels]).to(model.device)
    return "real, decoded", decoder(latents, model.device)(normalise(means, latents)).cpu()


def curves(log: Sequence[dict[str, Any]], halves: float | None = None) -> Image.Image:
    """Losses, other numbers and figures over the images seen, from the lines of the log.

    `halves`: what two halves of the data are apart. Losses that can be negative have an axis of their own.
    """
    panels = _numbers(log)
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


def _numbers(log: Sequence[dict[str, Any]]) -> list[Panel]:
    """Panels of what training logs: losses, the numbers that a method adds, and those of them that are lists."""
    lines = [line for line in log if "learning_rate" in line]
    names = dict.fromkeys(name for line in lines for name in line if name not in _OF_EVERY_LINE)
    losses, others, norms, panels = {}, {}, {}, []
    for name in names:
        points = [(line["images"], line[name]) for line in lines if line.get(name) is not None]
        title = name.replace("_", " ")
        if points and isinstance(points[0][1], list):
            levels = {
                f"level {i + 1}": _split([(x, values[i]) for x, values in points if values[i] is not None])
                for i in range(len(points[0][1]))
            }
            panels.append(Panel(title, "images", levels, log_y=_positive(levels)))
        elif points:
            series = _split(points)
            if name.endswith("loss") and not _positive({name: series}):
                panels.append(Panel(f"{title}: of either sign, no measure of progress", "images", {name: series}))
            elif name.endswith("gradient_norm"):
                norms[title] = series
            elif not name.endswith(_TOLD_OTHERWISE):
                (losses if name.endswith("loss") else others)[title] = series
    first = [Panel("loss", "images", losses, log_y=True)] if losses or not panels else []
    panels += [Panel("gradient norm", "images", norms, log_y=_positive(norms))] if norms else []
    return first + ([Panel("measures", "images", others, log_y=_positive(others))] if others else []) + panels


def _positive(series: dict[str, tuple[list[float], list[float]]]) -> bool:
    return all(value > 0 for _, values in series.values() for value in values)


def _split(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
