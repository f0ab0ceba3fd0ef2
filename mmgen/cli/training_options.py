"""The options that the training commands share: their types and help texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

Data = Annotated[
    str | None,
    typer.Option(
        help="digits, cifar10, a hub id user/name, a folder (parquet, class folders, images, save_to_disk), an EDM zip, "
        "a parquet file, or latents by `mmgen cache-latents`. Default: the preset's; with no preset either, digits."
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="A recipe; an unknown name lists them. Default: that of the data set."),
]
ConfigFile = Annotated[Path | None, typer.Option(metavar="FILE.toml", help="Settings over the preset's. Default: none.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any single setting, such as loss.k=12; may be repeated. Default: none."),
]
Out = Annotated[
    Path | None,
    typer.Option(
        help="The run's folder; a run that is there is resumed. Default: runs/PRESET, or with changed settings "
        "runs/PRESET-XXXXXX, the same for the same settings."
    ),
]
Resolution = Annotated[int | None, typer.Option(help="Side to crop and resize to. Default: the preset's, or the images' own.")]
Channels = Annotated[int | None, typer.Option(help="1 grey or 3 colour. Default: the preset's, or grey if the images are.")]
Conditional = Annotated[
    bool | None,
    typer.Option("--conditional/--unconditional", help="Train on class labels or without. Default: the preset's."),
]
ImageColumn = Annotated[str | None, typer.Option(help="Column of the images. Default: the first that holds images.")]
LabelColumn = Annotated[str | None, typer.Option(help="Column of the labels. Default: the first that holds classes.")]
Split = Annotated[str | None, typer.Option(help="Split of the data set. Default: the preset's, train.")]
OnCorrupt = Annotated[
    str | None,
    typer.Option(
        metavar="stop|skip",
        help="An image that cannot be decoded stops the run before training, or is left out. Default: the preset's, stop.",
    ),
]
BatchSize = Annotated[int | None, typer.Option(help="Images per step, over all devices. Default: the preset's.")]
BatchPerDevice = Annotated[
    str | None,
    typer.Option(
        metavar="N|auto",
        help="At most so many images in one pass; smaller needs less memory. auto: as many as fit, found when the run begins. "
        "Default: the preset's.",
    ),
]
LearningRate = Annotated[float | None, typer.Option(help="Learning rate. Default: the preset's.")]
MaxImages = Annotated[int | None, typer.Option(help="Images to train on, in all. Default: the preset's.")]
MaxTime = Annotated[
    str | None,
    typer.Option(metavar="30m", help="End after this long (s, m, h, d), as if finished. Default: no limit."),
]
Seed = Annotated[int | None, typer.Option(help="Seed of weights, order and noise. Default: the preset's, 0.")]
Precision = Annotated[
    str | None,
    typer.Option(metavar="fp32|tf32|bf16|fp16", help="Arithmetic of the network. Default: the preset's."),
]
Compile = Annotated[
    bool | None,
    typer.Option("--compile/--no-compile", help="torch.compile the network. Default: the preset's, off."),
]
Device = Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="auto: the GPU if there is one.")]
CheckpointEvery = Annotated[int | None, typer.Option(help="Images between checkpoints. Default: the preset's.")]
PreviewEvery = Annotated[int | None, typer.Option(help="Images between sample grids. Default: the preset's.")]
EvalEvery = Annotated[
    int | None,
    typer.Option(
        help="Images between measurements: FID if Inception's weights are at hand, else FD-pixels. Default: the preset's."
    ),
]
EvalNum = Annotated[int | None, typer.Option(help="Samples per measurement, 0 for none. Default: the preset's, or 10,000.")]
LogWith = Annotated[
    str | None,
    typer.Option(metavar="tensorboard|wandb", help="Also log there; both: tensorboard,wandb. Default: log.jsonl only."),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Show settings, data, memory and cost per step; train nothing. Default: off."),
]

# The options that are single settings. Commands call them alike.
_SETTINGS = {
    "data": "data.name", "resolution": "data.resolution", "channels": "data.channels", "split": "data.split",
    "on_corrupt": "data.on_corrupt", "conditional": "data.conditional", "image_column": "data.image_column",
    "label_column": "data.label_column", "batch_size": "train.batch_size", "batch_per_device": "run.batch_per_device",
    "lr": "optimizer.lr", "max_images": "train.max_images", "seed": "train.seed", "precision": "train.precision",
    "compile": "run.compile", "checkpoint_every": "run.checkpoint_every", "preview_every": "run.preview_every",
    "eval_every": "run.eval_every", "eval_num": "run.eval_num",
}  # fmt: skip


def shared_changes(given: dict[str, Any]) -> dict[str, Any]:
    """The shared options among a command's arguments, name -> value, as settings by dotted key; those not given are left out."""
    changes = {key: given[name] for name, key in _SETTINGS.items() if given.get(name) is not None}
    if (count := changes.get("run.batch_per_device", "")).isdecimal():
        changes["run.batch_per_device"] = int(count)
    if given.get("log_with") is not None:
        changes["run.log_with"] = given["log_with"].split(",")
    return changes
