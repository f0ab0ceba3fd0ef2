"""What a person looks at while a model trains: sample grids and curves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from ..models.build import AnyModel
from ..models.config import ModelConfig
from ..sampling.drawing import SampleSettings, draw
from ..encoders.vae import decoder, normalise
from .collapse import spread_of
from .task import Reporter, Work

SHOWN = 30  # images per number of steps in a picture
COLUMNS = 10  # of a picture
ACROSS = 3  # panels in a row of the curves
_OF_EVERY_LINE = ("threads", "images", "step", "seconds", "images_per_second", "flops_per_second", "mfu", "learning_rate")
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


@dataclass(frozen=True)
class Layout:
    """Which images a picture shows: a column is a class, where the model knows classes, or a text."""

    classes: str | list[int]  # as `SampleSettings.classes`, for images 0 to SHOWN - 1, line by line
    names: list[str]  # of the columns
    real: np.ndarray  # numbers of as many real images, of the same classes or with the same captions
    prompts: tuple[str, ...] = ()  # of a model of text, one a column, as `SampleSettings.prompts`


def layout(config: ModelConfig, dataset: Dataset | LatentDataset, seed: int) -> Layout:
    """Up to COLUMNS classes, evenly spaced among those with images; real images are chosen by the seed."""
    rng = np.random.default_rng(seed)
    if config.text is not None:
        return _captioned(dataset, rng)
    if config.num_classes == 0 or dataset.labels is None:
        classes = "balanced" if config.num_classes else "random"
        return Layout(classes, [], np.sort(rng.choice(len(dataset), min(SHOWN, len(dataset)), replace=False)))
    there = np.unique(dataset.labels)
    chosen = there[np.unique(np.linspace(0, len(there) - 1, min(COLUMNS, len(there))).round().astype(int))].tolist()
    lines = -(-SHOWN // COLUMNS)
    own = [np.resize(rng.permutation(np.flatnonzero(dataset.labels == number)), lines) for number in chosen]
    names = [config.class_names[number] if config.class_names else str(number) for number in chosen]
    return Layout(chosen, names, np.stack(own, axis=1).reshape(-1))


def _captioned(dataset: Dataset, rng: np.random.Generator) -> Layout:
    """COLUMNS different captions, chosen at random, above images that have them."""
    columns: dict[str, list[int]] = {}
    for row in rng.permutation(len(dataset))[: 1000 * SHOWN].tolist():
        own = columns.get(dataset.captions[row][0].as_py())
        if own is None and len(columns) < COLUMNS:
            own = columns.setdefault(dataset.captions[row][0].as_py(), [])
        if own is not None:
            own.append(row)
    lines = -(-SHOWN // COLUMNS)
    names = sorted(columns)
    real = np.stack([np.resize(columns[name], lines) for name in names], axis=1).reshape(-1)
    return Layout("random", names, real, tuple(names))


def picture(
    model: AnyModel, dataset: Dataset | LatentDataset, steps: Sequence[int], seed: int, scores: Mapping[str, str] = {},
    work: Work = Reporter().work,
) -> tuple[Image.Image, dict[str, float]]:  # fmt: skip
    """Samples of each number of steps, from the same noise, above real images of the same classes; and by number of steps the
    samples' variance, divided by that of the real images: see `collapse`.

    scores: number of steps -> its score, for the caption.
    """
    shown = layout(model.config, dataset, seed)
    rows: list[tuple[str, Tensor | np.ndarray]] = []
    for count in steps:
        name = f"{count} step{'s' * (count > 1)}"
        with work(f"picture, {name}", len(shown.real)) as update:
            settings = SampleSettings(steps=count, seed=seed, classes=shown.classes, prompts=shown.prompts)
            images = draw(model, settings, range(len(shown.real)), update)[0]
        rows.append((with_score(name, scores.get(str(count))), images))
    real = real_images(model, dataset, shown.real)
    of_data = spread_of(real[1])
    variance = {str(count): spread_of(images) / of_data for count, (_, images) in zip(steps, rows, strict=True) if of_data}
    return labelled_rows([*rows, real], columns=len(shown.names) or COLUMNS, names=shown.names, padding=4), variance


def with_score(name: str, score: str | None) -> str:
    """A row's caption, with the score on a line of its own."""
    return name if score is None else f"{name}\n{score}"


def scores_of(line: Mapping[str, Any]) -> dict[str, str]:
    """From a line of the log that has scores: number of steps -> "FD-pixels-1797 0.24"."""
    return {count: f"{line['figure']} {value:.3g}" for count, value in line.get("values", {}).items()}


def real_images(model: AnyModel, dataset: Dataset | LatentDataset, chosen: np.ndarray) -> tuple[str, Tensor | np.ndarray]:
    """Images of the data set and their caption. Of latents, what the VAE gives back: the best that a model can reach."""
    if not isinstance(dataset, LatentDataset):
        return "real", dataset.images[chosen]
    latents = model.config.latents
    means = torch.from_numpy(dataset.moments[chosen][:, : dataset.channels]).to(model.device)
    return "real, decoded", decoder(latents, model.device)(normalise(means, latents)).cpu()


def curves(log: Sequence[dict[str, Any]], halves: float | None = None, levels: Sequence[float] = ()) -> Image.Image:
    """Losses, other numbers and scores over the images seen, from the lines of the log; at most three panels in a row.

    halves: the score of real against real (two halves), the noise floor. levels: the edges of the noise levels, in sigma.
    Losses that can be negative have an axis of their own.
    """
    panels = _numbers(log, levels)
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
            series["real against real"] = ([lines[0]["images"], lines[-1]["images"]], [halves] * 2)
        panels.append(Panel(name, "images", series, log_y=True))
    across = min(len(panels), ACROSS)
    return line_chart(panels, width=560 * across, height=400 * -(-len(panels) // across), across=across)


def level_names(levels: Sequence[float], count: int) -> list[str]:
    """"sigma 0.02 - 0.1" for each of `count` noise levels; numbers where their edges are not known."""
    if len(levels) != count + 1:
        return [f"level {i + 1}" for i in range(count)]
    return [f"sigma {low:.2g} - {high:.2g}" for low, high in zip(levels, levels[1:])]


def _numbers(log: Sequence[dict[str, Any]], noise_levels: Sequence[float]) -> list[Panel]:
    """Panels of what training logs: losses, the numbers that a method adds, and those of them that are lists."""
    lines = [line for line in log if "learning_rate" in line]
    names = dict.fromkeys(name for line in lines for name in line if name not in _OF_EVERY_LINE)
    losses, others, norms, panels = {}, {}, {}, []
    for name in names:
        points = [(line["images"], line[name]) for line in lines if line.get(name) is not None]
        title = name.replace("_", " ")
        if points and isinstance(points[0][1], list):
            names = level_names(noise_levels, len(points[0][1]))
            levels = {
                name: _split([(x, values[i]) for x, values in points if values[i] is not None]) for i, name in enumerate(names)
            }
            panels.append(Panel(title, "images", levels, log_y=_positive(levels), ordered=True))
        elif points:
            series = _split(points)
            if name.endswith("loss") and not _positive({name: series}):
                panels.append(Panel(f"{title} (no measure of progress)", "images", {title: series}))
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
