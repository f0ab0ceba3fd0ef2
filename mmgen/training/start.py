"""From settings to a run: the data, the devices, the folder, then the loop."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .. import data
from ..config.sections import CAPTIONS, READING, DataSettings, RunSettings, TrainSettings
from ..data import Dataset, DataShape
from ..data.labels import check_there
from ..data.latents import LatentDataset, load_latents
from ..data.resolve import find_latents
from ..data.texts import encode_captions, encoded_on_the_fly, without
from ..encoders.pipeline_text import CLIP_ONLY, WITH_SIZES
from ..errors import ConfigError, DataError
from ..networks.text import TextSettings
from ..system.lock import only_run_in
from ..system.processes import COLLECTIVE_TIMEOUT, process_group_of
from .initial import Initial, begin_with
from .loop import Trainer
from .run_folder import RunFolder
from .sharding import asks_for_shards
from .task import Outcome, Reporter, Task


def load_data(settings: DataSettings, progress: Callable[[int, int], None] | None = None) -> Dataset | LatentDataset:
    """The data set of a config. Raises DataError, or ConfigError where it contradicts the settings."""
    path = find_latents(settings.name)
    if path is not None:
        dataset = load_latents(path, settings.name)
        _check_latents(settings, dataset)
        if not settings.text:
            dataset = replace(dataset, captions=None, kept=None)
    elif settings.channels not in (None, 1, 3):
        raise DataError(
            f"the recipe trains on latents of {settings.channels} channels, and {settings.name} is no folder of them: make one "
            "with `mmgen cache-latents --data IMAGES --resolution 256 --out FOLDER`, then give --data FOLDER"
        )
    else:
        dataset = data.load(
            settings.name,
            resolution=settings.resolution,
            channels=settings.channels,
            progress=progress,
            with_captions=settings.text,
            with_labels=settings.conditional,
            **{key: getattr(settings, key) for key in (*READING, *(CAPTIONS if settings.text else ()))},
        )
    if settings.leave_out:
        dataset = replace(dataset, captions=without(dataset.captions, settings.leave_out))
    if settings.conditional:
        check_there(dataset.labels, dataset.description)
    if settings.conditional and settings.num_classes not in (None, dataset.num_classes):
        raise ConfigError(f"data.num_classes is {settings.num_classes}, but {settings.name} has {dataset.num_classes} classes")
    return dataset


def _check_latents(settings: DataSettings, dataset: LatentDataset) -> None:
    """Raises ConfigError where settings and latents contradict each other, or a setting is one of images."""
    size, channels, pixels = dataset.resolution, dataset.channels, dataset.latents.resolution
    if settings.resolution not in (None, size):
        raise ConfigError(
            f"data.resolution is {settings.resolution}, but {settings.name} holds latents of {size}x{size} (of images of "
            f"{pixels}x{pixels}): set data.resolution={size}, or take the latents that the recipe is for"
        )
    if settings.channels not in (None, channels):
        raise ConfigError(f"data.channels is {settings.channels}, but {settings.name} holds latents of {channels} channels")
    if settings.text and dataset.captions is None:
        raise ConfigError(
            f"data.text needs captions, and {settings.name} is a folder of latents without: make one with `mmgen cache-latents --text`, "
            "or with --pipeline for a teacher that is a pipeline"
        )
    for name in (name for name in (*READING, *CAPTIONS) if getattr(settings, name) != getattr(DataSettings(), name)):
        raise ConfigError(f"data.{name} is a choice of `mmgen cache-latents`, and {settings.name} is made already: leave it out")
    if settings.xflip or settings.augment > 0:
        name = "data.xflip" if settings.xflip else "data.augment"
        raise ConfigError(f"{name} is for images, not for latents: leave it out; `mmgen cache-latents --xflip` mirrors")


def expected_shape(settings: DataSettings) -> DataShape | None:
    """What the settings alone say of the data; None if not enough."""
    if settings.resolution is None or settings.channels is None or (settings.conditional and settings.num_classes is None):
        return None
    return DataShape(settings.resolution, settings.channels, settings.num_classes or 0)


def make_accelerator(train: TrainSettings, run: RunSettings, out: Path, device: str) -> Any:
    """accelerate's Accelerator: devices, processes, mixed precision, trackers. device: auto, cpu or cuda."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, is_tensorboard_available, is_wandb_available

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no GPU; use --device cpu, or install a torch that supports yours")
    cpu = device == "cpu" or not torch.cuda.is_available()  # Apple's GPUs have no float64, which the times need
    precision = train.precision
    if precision == "fp16" and cpu:
        raise ConfigError("train.precision fp16 needs a GPU: use fp32 on a CPU")
    asks_for_shards(precision)  # before accelerate complains of it at length
    for tracker, there in (("tensorboard", is_tensorboard_available), ("wandb", is_wandb_available)):
        if tracker in run.log_with and not there():
            raise ConfigError(f"run.log_with {tracker}: the package {tracker} is not installed; pip install {tracker}")
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=precision if precision in ("bf16", "fp16") else "no",
        log_with=list(run.log_with) or None,
        project_dir=str(out),
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False),  # no buffer changes in training
        ],
    )
    process_group_of(accelerator)  # while all processes are at the same place
    return accelerator


DataProgress = Callable[[], AbstractContextManager]  # entered while data are decoded; yields update(images decoded, in all)


def load_shared(
    settings: DataSettings, reporter: Reporter, data_progress: DataProgress = contextlib.nullcontext
) -> Dataset | LatentDataset:
    """The data set, in every process: one decodes and shows it, the others wait at the lock of the cache."""
    with data_progress() as progress:
        dataset = load_data(settings, progress)
    reporter.note(f"data: {dataset.description}")
    return dataset


def with_texts(dataset: Dataset | LatentDataset, text: TextSettings | None, device: Any, reporter: Reporter) -> Dataset | LatentDataset:
    """The data set with its captions encoded for a model of these settings; as it is where the model takes none."""
    if text is None:
        return dataset
    kept = getattr(dataset, "kept", None)
    if text.pipeline and kept is not None and kept.tokens is not None:
        texts = kept.encoded(dataset.captions, text)
    elif text.pipeline in CLIP_ONLY:
        texts = encoded_on_the_fly(dataset.captions, text, device)
    else:
        with reporter.work("encoding captions", 1, "captions") as update:
            texts = encode_captions(dataset.captions, text, device, update)
    if text.pipeline in WITH_SIZES and kept is not None:
        texts = replace(texts, sizes=kept.sizes)
    if texts.cut:
        reporter.note(f"{texts.cut:,} captions are longer than the {text.length} tokens of the text encoder: their ends are cut off")
    return replace(dataset, texts=texts)


def run_training(
    command: str,
    config: Any,
    dataset: Dataset | LatentDataset,
    make_task: Callable[[Any], Task],
    *,
    accelerator: Any,
    out: Path,
    reporter: Reporter,
    max_seconds: float = math.inf,
    initial: Initial | None = None,
) -> Outcome:
    """Trains, or resumes, the run in the folder `out` (`run_folder` says what is in it).

    Args:
        command: as on the command line, such as "train-imm"; a folder of another command's run is refused.
        config: all settings: with `train`, `optimizer`, `run` and `to_dict()`.
        dataset: what is trained on.
        make_task: make_task(accelerator) -> the method's Task, with freshly initialised networks where it has any.
        accelerator: of `make_accelerator`.
        initial: the weights of `train.init`, where there is one.

    Raises ConfigError, DataError, TrainingError and MmgenError, each with one sentence.
    """
    if initial is not None:
        make_plain = make_task
        config = replace(config, train=replace(config.train, init_sha256=initial.sha256))
        side = initial.config.resolution
        reporter.note(f"the training begins with the weights of {initial.path} ({side} x {side}, sha256 {initial.sha256[:12]})")

        def make_task(accelerator: Any) -> Task:
            return begin_with(make_plain(accelerator), initial)

    folder = RunFolder(out)
    with only_run_in(out, reporter.note) if accelerator.is_main_process else contextlib.nullcontext():
        if accelerator.is_main_process:
            folder.open(command, config.to_dict(), dataset)
        process_group_of(accelerator).wait()
        accelerator.init_trackers("mmgen")
        trainer = Trainer(
            make_task, dataset, folder, reporter, accelerator, train=config.train, optimizer=config.optimizer, run=config.run,
            config=config.to_dict(), max_seconds=max_seconds,
        )  # fmt: skip
        counts = {name: sum(p.numel() for p in network.parameters()) / 1e6 for name, network in trainer.networks.items()}
        reporter.note(
            f"{', '.join(f'{name}: {count:.2f}M parameters' for name, count in counts.items())}; batch {config.train.batch_size} = "
            f"{trainer.split} on {accelerator.device}, {config.train.precision}"
        )
        try:
            return trainer.run()
        finally:
            accelerator.end_training()
