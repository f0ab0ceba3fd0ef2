"""The options that the training commands share: their types and help texts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError, nearest
from ..methods.method import SHARED_SETTINGS, Option
from .options import COUNT, NUMBER, home

_images = partial(typer.Option, rich_help_panel="Images")
_training = partial(typer.Option, rich_help_panel="Training (defaults: the preset's)")
_saving = partial(typer.Option, rich_help_panel="Saving and scoring (defaults: the preset's)")
_running = partial(typer.Option, rich_help_panel="Running")

Data = Annotated[
    str | None,
    _images(
        metavar="DATA",
        help="digits, cifar10, a folder of images, a zip or parquet file, a hub dataset user/name, or a folder made by "
        "`mmgen cache-latents`. Default: digits.",
    ),
]
Resolution = Annotated[int | None, _images(**COUNT, help="Crop and resize to N x N. Default: the preset's or the images' own.")]
Channels = Annotated[int | None, _images(**COUNT, help="1 for grey, 3 for colour. Default: what the images are.")]
Conditional = Annotated[
    bool | None, _images("--conditional/--unconditional", help="Train with or without class labels. Default: the preset's.")
]
Split = Annotated[str | None, _images(metavar="NAME", help="Split of the dataset. Default: train.")]
Subset = Annotated[str | None, _images(metavar="NAME", help="One of several data sets in a repository. Default: its own.")]
Revision = Annotated[str | None, _images(metavar="NAME", help="Branch, tag or commit of a hub dataset. Default: main.")]
FollowLinks = Annotated[bool | None, _images("--follow-links", help="Also follow links that lead out of the folder.")]
ImageColumn = Annotated[str | None, _images(metavar="NAME", help="Column of the images. Default: the first one.")]
LabelColumn = Annotated[str | None, _images(metavar="NAME", help="Column of the labels. Default: the first one.")]
Text = Annotated[bool | None, _images("--text/--no-text", help="Train on captions.")]
CaptionColumn = Annotated[str | None, _images(metavar="NAME", help="Column of the captions.")]
Captions = Annotated[
    str | None, _images(metavar="FILE", help="Captions: COCO's .json, .jsonl, .csv.")
]
OnCorrupt = Annotated[str | None, _images(metavar="NAME", help="Damaged images: stop or skip. Default: stop.")]

Init = Annotated[str | None, _training(metavar="MODEL", help="Begin with its weights: any model of the same network.")]
Preset = Annotated[
    str | None, _training(metavar="NAME", help="The recipe; an unknown name lists them all. Default: by the data.")
]
ConfigFile = Annotated[Path | None, _training(metavar="FILE", help="A TOML file of settings, over the preset's.")]
Set = Annotated[
    list[str] | None, _training("--set", metavar="KEY=VALUE", help="Any setting, such as loss.k=12. May be repeated.")
]
BatchSize = Annotated[int | None, _training(**COUNT, help="Images per step, over all devices.")]
LearningRate = Annotated[float | None, _training(**NUMBER, help="Learning rate.")]
MaxImages = Annotated[int | None, _training(**COUNT, help="Images to train on in total, such as 64k or 1M.")]
MaxTime = Annotated[str | None, _training(metavar="TIME", help="Finish after this long: 90s, 30m, 8h, 2d. Default: no limit.")]
Seed = Annotated[int | None, _training(**COUNT, help="Seed of the weights, the order of the images and the noise.")]
Precision = Annotated[str | None, _training(metavar="TYPE", help="fp32, tf32, bf16 or fp16.")]

CheckpointEvery = Annotated[int | None, _saving(**COUNT, help="Images between checkpoints.")]
PreviewEvery = Annotated[int | None, _saving(**COUNT, help="Images between sample grids.")]
EvalEvery = Annotated[int | None, _saving(**COUNT, help="Images between scores (FID, or FD-pixels for small images).")]
EvalNum = Annotated[int | None, _saving(**COUNT, help="Samples per score; 0 for no scores.")]
LogWith = Annotated[str | None, _saving(metavar="NAMES", help="tensorboard, wandb or both, besides log.jsonl.")]

Out = Annotated[
    Path | None,
    _running(
        metavar="DIR",
        help="Run folder; a run found there is resumed. Default: runs/PRESET, with a suffix if settings differ.",
    ),
]
Device = Annotated[str, _running(metavar="NAME", help="auto (a GPU if any), cpu or cuda.")]
BatchPerDevice = Annotated[str | None, _running(metavar="N", help="Images per pass: fewer need less memory. auto: as many as fit.")]
Compile = Annotated[bool | None, _running("--compile/--no-compile", help="Use torch.compile or not.")]
DryRun = Annotated[bool, _running("--dry-run", help="Show settings, memory and cost; train nothing.")]
Verbose = Annotated[bool, _running("--verbose", help="Show all settings before training.")]

# The options of every training command, in the order of the help, with their defaults
SHARED: dict[str, tuple[Any, Any]] = {
    "data": (Data, None), "resolution": (Resolution, None), "channels": (Channels, None), "conditional": (Conditional, None),
    "split": (Split, None), "subset": (Subset, None), "revision": (Revision, None), "image_column": (ImageColumn, None),
    "label_column": (LabelColumn, None), "text": (Text, None), "caption_column": (CaptionColumn, None),
    "captions": (Captions, None), "follow_links": (FollowLinks, None), "on_corrupt": (OnCorrupt, None),
    "preset": (Preset, None), "config": (ConfigFile, None), "set_": (Set, None), "init": (Init, None), "batch_size": (BatchSize, None),
    "lr": (LearningRate, None), "max_images": (MaxImages, None), "max_time": (MaxTime, None), "seed": (Seed, None),
    "precision": (Precision, None), "checkpoint_every": (CheckpointEvery, None), "preview_every": (PreviewEvery, None),
    "eval_every": (EvalEvery, None), "eval_num": (EvalNum, None), "log_with": (LogWith, None), "out": (Out, None),
    "device": (Device, "auto"), "batch_per_device": (BatchPerDevice, None), "compile": (Compile, None),
    "dry_run": (DryRun, False), "verbose": (Verbose, False),
}  # fmt: skip


def shared_changes(given: dict[str, Any]) -> dict[str, Any]:
    """The shared options among a command's arguments, name -> value, as settings by dotted key; those not given are left out."""
    changes = {key: given[name] for name, key in SHARED_SETTINGS.items() if given.get(name) is not None}
    if changes.get("data.text"):  # in place of the classes that a preset may have
        changes.setdefault("data.conditional", False)
    if "train.init" in changes:
        changes["train.init"] = home(changes["train.init"])
    if (count := changes.get("run.batch_per_device", "")).isdecimal():
        changes["run.batch_per_device"] = int(count)
    if given.get("log_with") is not None:
        changes["run.log_with"] = given["log_with"].split(",")
    return changes


def own_option(option: Option, heading: str) -> Any:
    """The type of an option that a method has beside the shared ones."""
    extra = COUNT if option.kind is int else NUMBER if option.kind is float else {"metavar": option.metavar}
    return Annotated[option.kind | None, typer.Option(rich_help_panel=option.group or heading, help=option.help, **extra)]


def own_changes(options: Sequence[Option], given: dict[str, Any]) -> dict[str, Any]:
    """A method's own options among a command's arguments, as settings by dotted key. Raises ConfigError for an unknown name."""
    changes = {}
    for option in options:
        value = given.get(option.name)
        if value is None:
            continue
        if option.choices and value not in option.choices:
            raise ConfigError(f"unknown --{option.name.replace('_', '-')} {value!r}: {nearest(value, option.choices)}")
        changes[option.setting] = home(value) if option.is_path else value
    return changes
