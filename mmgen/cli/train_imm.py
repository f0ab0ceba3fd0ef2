"""`mmgen train-imm`: a one- to eight-step generator from images, in one stage."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from . import training
from . import training_options as option
from .options import check_device

if TYPE_CHECKING:
    from ..config.imm import ImmConfig

# The recipe that a data set has of its own.
DATA_PRESETS = {"digits": "digits-imm", "cifar10": "cifar10-imm", "uoft-cs/cifar10": "cifar10-imm"}
OWN_PRESETS = {32: "own32-imm", 64: "own64-imm"}  # for images of any other


def train_imm(
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
    """Train a one- to eight-step generator with Inductive Moment Matching (arXiv:2503.07565).

    Without --data it trains on the 1,797 handwritten digits that come with mmgen, in minutes. The same command resumes an
    interrupted run. On several GPUs: accelerate launch -m mmgen train-imm ...

    Example: mmgen train-imm --data cifar10 --max-time 30m
    """
    changes = option.shared_changes(locals())
    seconds = training.seconds_of(max_time)
    check_device(device)

    from ..config.imm import ImmConfig, resolve

    chosen = training.choose(
        "train-imm", ImmConfig, resolve, DATA_PRESETS, preset=preset, file=config, assignments=set_, changes=changes, out=out,
        own_presets=OWN_PRESETS,
    )  # fmt: skip
    if training.is_main():
        training.show_config(chosen, verbose or dry_run)
        _warn(chosen.config)
    if dry_run:
        if training.is_main():
            _show_cost(chosen.config)
        return

    from ..methods.imm import train_imm as train

    training.run(
        train, chosen, device=device, max_seconds=seconds,
        next_commands=[f"mmgen sample {shlex.quote(str(chosen.folder))} --steps 1,2,4 --num 64 --out samples/"],
    )  # fmt: skip


def _warn(config: ImmConfig) -> None:
    if config.train.precision == "fp16" and (config.loss.min_gap < 1e-4 or config.flow.second_time != "t-s"):
        training.show(
            "note: the paper trains fp16 with loss.min_gap=1e-4, flow.second_time=t-s and loss.a=2 (appendix I.6)",
            stderr=True,
        )


def _show_cost(config: ImmConfig) -> None:
    from ..training.cost import IMM
    from ..methods.imm import imm_model_config

    training.show_cost(config, lambda shape: imm_model_config(config, shape), IMM, config.loss.group_size)
