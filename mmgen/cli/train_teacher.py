"""`mmgen train-teacher`: a diffusion or flow-matching model from images, to be sampled in many steps, or distilled."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from . import training
from . import training_options as option
from .options import check_device

if TYPE_CHECKING:
    from ..config.teacher import TeacherConfig

# The recipe that a data set has of its own.
DATA_PRESETS = {"digits": "digits-teacher", "cifar10": "cifar10-teacher", "uoft-cs/cifar10": "cifar10-teacher"}
OWN_PRESETS = {32: "own32-teacher", 64: "own64-teacher"}  # for images of any other


def train_teacher(
    data: option.Data = None,
    resolution: option.Resolution = None,
    channels: option.Channels = None,
    conditional: option.Conditional = None,
    split: option.Split = None,
    subset: option.Subset = None,
    revision: option.Revision = None,
    image_column: option.ImageColumn = None,
    label_column: option.LabelColumn = None,
    follow_links: option.FollowLinks = None,
    on_corrupt: option.OnCorrupt = None,
    preset: option.Preset = None,
    config: option.ConfigFile = None,
    set_: option.Set = None,
    init: option.Init = None,
    batch_size: option.BatchSize = None,
    lr: option.LearningRate = None,
    max_images: option.MaxImages = None,
    max_time: option.MaxTime = None,
    seed: option.Seed = None,
    precision: option.Precision = None,
    checkpoint_every: option.CheckpointEvery = None,
    preview_every: option.PreviewEvery = None,
    eval_every: option.EvalEvery = None,
    eval_num: option.EvalNum = None,
    log_with: option.LogWith = None,
    out: option.Out = None,
    device: option.Device = "auto",
    batch_per_device: option.BatchPerDevice = None,
    compile: option.Compile = None,
    dry_run: option.DryRun = False,
    verbose: option.Verbose = False,
) -> None:
    """Train a diffusion or flow-matching model: a teacher for `mmgen distill`.

    Without --data it trains on the 1,797 handwritten digits that come with mmgen, in minutes. The same command resumes an
    interrupted run. Prediction, schedule and weighting are settings: --set denoiser.prediction=eps --set
    denoiser.schedule.name=ddpm_linear --set loss.weighting=min_snr.

    Example: mmgen train-teacher --data cifar10 --max-time 8h
    """
    changes = option.shared_changes(locals())
    seconds = training.seconds_of(max_time)
    check_device(device)

    from ..config.teacher import TeacherConfig, resolve

    chosen = training.choose(
        "train-teacher", TeacherConfig, resolve, DATA_PRESETS, preset=preset, file=config, assignments=set_, changes=changes,
        out=out, own_presets=OWN_PRESETS,
    )  # fmt: skip
    if training.is_main():
        training.show_config(chosen, verbose or dry_run)
    if dry_run:
        if training.is_main():
            _show_cost(chosen.config)
        return

    from ..methods.teacher import train_teacher as train

    folder = shlex.quote(str(chosen.folder))
    training.run(
        train, chosen, device=device, max_seconds=seconds,
        next_commands=[f"mmgen sample {folder} --num 64 --out samples/", f"mmgen distill --teacher {folder} --steps 8"],
    )  # fmt: skip


def _show_cost(config: TeacherConfig) -> None:
    from ..training.cost import DENOISING
    from ..methods.teacher import teacher_model_config

    training.show_cost(config, lambda shape: teacher_model_config(config, shape), DENOISING)
