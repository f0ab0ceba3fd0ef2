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


def _option(group: str, kind: Any, *names: str, default: Any = None, **more: Any) -> tuple[Any, Any]:
    return Annotated[kind, typer.Option(*names, rich_help_panel=group, **more)], default


_images = partial(_option, "Images")
_training = partial(_option, "Training (defaults: the preset's)")
_saving = partial(_option, "Saving and scoring (defaults: the preset's)")
_running = partial(_option, "Running")

# The options of every training command, in the order of the help, with their defaults
SHARED: dict[str, tuple[Any, Any]] = {
    "data": _images(
        str | None, metavar="DATA",
        help="digits, cifar10, a folder of images, a zip or parquet file, a hub dataset user/name, or a folder "
        "made by `mmgen cache-latents`. Default: digits.",
    ),
    "resolution": _images(int | None, **COUNT, help="Crop and resize to N x N. Default: the preset's or the images' own."),
    "channels": _images(int | None, **COUNT, help="1 for grey, 3 for colour. Default: what the images are."),
    "conditional": _images(
        bool | None, "--conditional/--unconditional",
        help="Train with or without class labels. Default: the preset's.",
    ),
    "split": _images(str | None, metavar="NAME", help="Split of the dataset. Default: train."),
    "subset": _images(str | None, metavar="NAME", help="One of several data sets in a repository. Default: its own."),
    "revision": _images(str | None, metavar="NAME", help="Branch, tag or commit of a hub dataset. Default: main."),
    "image_column": _images(str | None, metavar="NAME", help="Column of the images. Default: the first one."),
    "label_column": _images(str | None, metavar="NAME", help="Column of the labels. Default: the first one."),
    "text": _images(bool | None, "--text/--no-text", help="Train on captions."),
    "caption_column": _images(str | None, metavar="NAME", help="Column of the captions."),
    "captions": _images(str | None, metavar="FILE", help="Captions: COCO's .json, .jsonl, .csv."),
    "follow_links": _images(bool | None, "--follow-links", help="Also follow links that lead out of the folder."),
    "on_corrupt": _images(str | None, metavar="NAME", help="Damaged images: stop or skip. Default: stop."),
    "preset": _training(str | None, metavar="NAME", help="The recipe; an unknown name lists them all. Default: by the data."),
    "config": _training(Path | None, metavar="FILE", help="A TOML file of settings, over the preset's."),
    "set_": _training(list[str] | None, "--set", metavar="KEY=VALUE", help="Any setting, such as loss.k=12. May be repeated."),
    "init": _training(str | None, metavar="MODEL", help="Begin with its weights: any model of the same network."),
    "batch_size": _training(int | None, **COUNT, help="Images per step, over all devices."),
    "lr": _training(float | None, **NUMBER, help="Learning rate."),
    "max_images": _training(int | None, **COUNT, help="Images to train on in total, such as 64k or 1M."),
    "max_time": _training(str | None, metavar="TIME", help="Finish after this long: 90s, 30m, 8h, 2d. Default: no limit."),
    "seed": _training(int | None, **COUNT, help="Seed of the weights, the order of the images and the noise."),
    "precision": _training(str | None, metavar="TYPE", help="fp32, tf32, bf16 or fp16."),
    "checkpoint_every": _saving(int | None, **COUNT, help="Images between checkpoints."),
    "preview_every": _saving(int | None, **COUNT, help="Images between sample grids."),
    "eval_every": _saving(int | None, **COUNT, help="Images between scores (FID, or FD-pixels for small images)."),
    "eval_num": _saving(int | None, **COUNT, help="Samples per score; 0 for no scores."),
    "log_with": _saving(str | None, metavar="NAMES", help="tensorboard, wandb or both, besides log.jsonl."),
    "out": _running(
        Path | None, metavar="DIR",
        help="Run folder; a run found there is resumed. Default: runs/PRESET, with a suffix if settings differ.",
    ),
    "device": _running(str, metavar="NAME", help="auto (a GPU if any), cpu or cuda.", default="auto"),
    "batch_per_device": _running(str | None, metavar="N", help="Images per pass: fewer need less memory. auto: as many as fit."),
    "compile": _running(bool | None, "--compile/--no-compile", help="Use torch.compile or not."),
    "dry_run": _running(bool, "--dry-run", help="Show settings, memory and cost; train nothing.", default=False),
    "verbose": _running(bool, "--verbose", help="Show all settings before training.", default=False),
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
