"""Teachers of distillation: any denoiser that mmgen reads, and what of it a distillation needs to know."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ...data import Dataset
from ...data.latents import LatentDataset
from ...diffusion.preconditioning import DenoiserSettings, preconditioning
from ...diffusion.schedules import ScheduleSettings, make_schedule
from ...errors import ConfigError, ModelError
from ...formats.family import ConvertOptions
from ...formats.opening import open_model
from ...models.denoiser import Denoiser
from ...models.guidance import knows_null
from ...models.config import ModelConfig, is_conditional
from ...sampling.guidance import Guide

NEGLIGIBLE = 1e-3  # of a schedule's times: a part of it outside the trained range that is no longer is not worth a word
_OPTION = re.compile(r"--(type|preset|heads|num-classes)\b")  # of `mmgen convert`, which for a teacher is --teacher-...


@dataclass(frozen=True)
class Teacher:
    """A frozen denoiser, and where it is from."""

    model: Denoiser  # in evaluation mode: neither dropout nor label dropout; its parameters take no gradient
    name: str  # as it was given
    sha256: str  # of its weights
    run: Path | None = None  # the run folder that it lies in, where it is one of `mmgen train-teacher`
    notes: tuple[str, ...] = ()  # what is assumed of another project's file
    guide: Guide | None = None  # a worse version of it, which guidance leads away from

    @property
    def networks(self) -> list[nn.Module]:
        """Its own, and its guide's."""
        return [model.network for model in (self.model, self.guide and self.guide.model) if model is not None]

    @property
    def has_null_class(self) -> bool:
        """Whether it also learned images without a class, as guidance needs; taken to be so where nothing says."""
        return is_conditional(self.model.config) and knows_null(self.model.config) is not False


def load_teacher(
    path: str | os.PathLike,
    device: str | torch.device = "cpu",
    *,
    weights: str = "ema",
    options: ConvertOptions = ConvertOptions(),
) -> Teacher:
    """A teacher from a model file or run folder of mmgen's, any file or folder that `mmgen convert` reads, or a hub repository.

    `weights` and `options` are those of `convert_file`, for the files of other projects; of a file with averaged weights these
    are taken. Raises ModelError, with one sentence, for what cannot be read, or gives no conditional means (a flow map, a
    consistency model, a student), and ConfigError for an option that is missing, unknown or contradicts the file, by its name here.
    """
    try:
        opened = open_model(path, weights=weights, options=options)
    except ConfigError as error:
        raise ConfigError(_OPTION.sub(r"--teacher-\1", str(error))) from error
    _check(opened.config, path)
    folder = opened.file if opened.file.is_dir() else opened.file.parent
    run = folder if (folder / "checkpoints").is_dir() and (folder / "log.jsonl").is_file() else None
    return Teacher(opened.build(device), str(path), opened.sha256, run, opened.notes)


def _check(config: ModelConfig, path: str | os.PathLike) -> None:
    """Raises ModelError for a model that does not give the mean of the images behind a noisy one."""
    steps = config.sampling.student_steps
    if config.denoiser is None:
        raise ModelError(
            f"{path} is a flow map of IMM, a few-step generator already: a teacher must be a denoiser, by `mmgen train-teacher`"
        )
    if preconditioning(config.denoiser).is_consistency:
        raise ModelError(f"{path} is a consistency model, which gives no means of noisy images: a teacher must be a denoiser")
    if steps is not None:
        raise ModelError(
            f"{path} is a student of {steps} step{'s' * (steps > 1)}, which gives no means of noisy images: a teacher must be a "
            "denoiser, such as its own teacher"
        )


def check_data(teacher: Teacher, dataset: Dataset | LatentDataset, note: Callable[[str], None]) -> None:
    """Raises ConfigError where the data are not of the teacher's kind: pixels or latents of its autoencoder, its classes."""
    own, latents = teacher.model.config, getattr(dataset, "latents", None)
    if (own.latents is None) != (latents is None):
        kinds = ("latents", "images") if latents is None else ("images", "latents")
        raise ConfigError(f"the teacher {teacher.name} was trained on {kinds[0]}, and {dataset.name} holds {kinds[1]}")
    if latents is not None:
        digests = {own.latents.vae_sha256, latents.vae_sha256}
        if own.latents.kind != latents.kind or ("" not in digests and len(digests) > 1):
            raise ConfigError(
                f"the teacher {teacher.name} knows latents of {own.latents.vae}, and {dataset.name} holds those of {latents.vae}"
            )
        if "" in digests:
            note(f"the teacher does not say which autoencoder its latents are of: {dataset.name} holds those of {latents.vae}")
    if own.num_classes not in (0, dataset.num_classes):
        raise ConfigError(
            f"the teacher {teacher.name} knows {own.num_classes} classes, and {dataset.name} has "
            f"{dataset.num_classes or 'none'}: a student is distilled on data with the teacher's classes"
        )
    if own.num_classes and own.class_names and dataset.class_names and own.class_names != dataset.class_names:
        note(
            f"the classes of {dataset.name} have other names than the teacher's: they are taken to be the same, number by number"
        )


# ---------------------------------------------------------------------- coordinates


def range_note(settings: DenoiserSettings, schedule: ScheduleSettings) -> str | None:
    """One sentence on the part of a student's schedule that its teacher was not trained at; None where there is none.

    `Denoiser.x_hat` takes the nearest sigma inside. Parts of less than a thousandth of the times are passed over.
    """
    low, high = preconditioning(settings).range
    made = make_schedule(schedule)
    first, last = made.eta_inverse(torch.tensor([low, high], dtype=torch.float64)).tolist()
    outside = [f"below sigma {low:.4g}, at t < {first:.4f}"] if first > NEGLIGIBLE else []
    outside += [f"above sigma {high:.4g}, at t > {last:.4f}"] if last < 1 - NEGLIGIBLE else []
    if not outside:
        return None
    return (
        f"the schedule {schedule.name} goes further than the teacher was trained: {' and '.join(outside)}, both networks are "
        "asked at the nearest sigma that it knows"
    )


# ---------------------------------------------------------------------- Adam's second moments


def adam_second_moments(teacher: Teacher) -> dict[str, Tensor] | None:
    """Adam's second moments of the teacher's training, name of the parameter -> tensor, from its newest checkpoint.

    None where the teacher is not in a run folder, or the run has none. They are of the weights that were trained, of which the
    teacher's are an average. What the optimiser never moved has an infinite one, so that a preconditioner leaves it alone.
    Raises ModelError where they cannot be read, or are not of this network.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from ...training.checkpoint import list_checkpoints
    from ...training.checkpoint_sums import damage

    found = list_checkpoints(teacher.run / "checkpoints") if teacher.run is not None else []
    if not found:
        return None
    newest = next((path for path in reversed(found) if damage(path, {"optimizer.safetensors"}) is None), None)
    if newest is None:
        raise ModelError(f"every checkpoint in {found[-1].parent} is damaged: give loss.preconditioner=identity")
    file = newest / "optimizer.safetensors"
    try:
        saved = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from error
    moments = {int(key.split(".")[0]): value for key, value in saved.items() if key.endswith(".exp_avg_sq")}
    if not moments:
        return None
    parameters = list(teacher.model.network.named_parameters())
    differing = next((i for i, value in moments.items() if i >= len(parameters) or value.shape != parameters[i][1].shape), None)
    if differing is not None:
        name = parameters[differing][0] if differing < len(parameters) else f"parameter {differing}"
        raise ModelError(f"{file} is not of the network in {teacher.run}: {name} differs in shape")
    return {
        name: moments[i].to(parameter) if i in moments else torch.full_like(parameter, torch.inf)
        for i, (name, parameter) in enumerate(parameters)
    }
