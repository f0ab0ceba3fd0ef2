"""`mmgen train-imm`: a one- to eight-step generator from images, in one stage."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from .progress import progress_bar
from .training_report import TrainingReport

if TYPE_CHECKING:
    from ..config import ImmConfig
    from ..training.loop import Outcome

# The recipe that a data set has of its own.
DATA_PRESETS = {"digits": "digits-imm", "cifar10": "cifar10-imm", "uoft-cs/cifar10": "cifar10-imm"}


def train_imm(
    data: Annotated[
        str | None,
        typer.Option(
            help="digits, cifar10, a hub id user/name, a folder (parquet, class folders, images, save_to_disk), an EDM zip, "
            "a parquet file, or latents by `mmgen cache-latents`. Default: the preset's; with no preset either, digits."
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="A recipe; an unknown name lists them. Default: that of the data set."),
    ] = None,
    config: Annotated[Path | None, typer.Option(metavar="FILE.toml", help="Settings over the preset's. Default: none.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any single setting, such as loss.k=12; may be repeated. Default: none."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The run's folder; a run that is there is resumed. Default: runs/PRESET, or with changed settings "
            "runs/PRESET-XXXXXX, the same for the same settings."
        ),
    ] = None,
    resolution: Annotated[
        int | None, typer.Option(help="Side to crop and resize to. Default: the preset's, or the images' own.")
    ] = None,
    channels: Annotated[
        int | None, typer.Option(help="1 grey or 3 colour. Default: the preset's, or grey if the images are.")
    ] = None,
    conditional: Annotated[
        bool | None,
        typer.Option("--conditional/--unconditional", help="Train on class labels or without. Default: the preset's."),
    ] = None,
    image_column: Annotated[str | None, typer.Option(help="Column of the images. Default: the first that holds images.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of the labels. Default: the first that holds classes.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of the data set. Default: the preset's, train.")] = None,
    on_corrupt: Annotated[
        str | None,
        typer.Option(
            metavar="stop|skip",
            help="An image that cannot be decoded stops the run before training, or is left out. Default: the preset's, stop.",
        ),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per step, over all devices. Default: the preset's.")] = None,
    batch_per_device: Annotated[
        int | None,
        typer.Option(help="At most so many images in one pass; smaller needs less memory. Default: the preset's."),
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate. Default: the preset's.")] = None,
    max_images: Annotated[int | None, typer.Option(help="Images to train on, in all. Default: the preset's.")] = None,
    max_time: Annotated[
        str | None,
        typer.Option(metavar="30m", help="End after this long (s, m, h, d), as if finished. Default: no limit."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights, order and noise. Default: the preset's, 0.")] = None,
    precision: Annotated[
        str | None,
        typer.Option(metavar="fp32|tf32|bf16|fp16", help="Arithmetic of the network. Default: the preset's."),
    ] = None,
    compile: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="torch.compile the network. Default: the preset's, off."),
    ] = None,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="auto: the GPU if there is one.")] = "auto",
    checkpoint_every: Annotated[int | None, typer.Option(help="Images between checkpoints. Default: the preset's.")] = None,
    preview_every: Annotated[int | None, typer.Option(help="Images between sample grids. Default: the preset's.")] = None,
    eval_every: Annotated[
        int | None,
        typer.Option(
            help="Images between measurements: FID if Inception's weights are at hand, else FD-pixels. Default: the preset's."
        ),
    ] = None,
    eval_num: Annotated[
        int | None, typer.Option(help="Samples per measurement, 0 for none. Default: the preset's, or 10,000.")
    ] = None,
    log_with: Annotated[
        str | None,
        typer.Option(metavar="tensorboard|wandb", help="Also log there; both: tensorboard,wandb. Default: log.jsonl only."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show settings, data, memory and cost per step; train nothing. Default: off."),
    ] = False,
) -> None:
    """Train a one- to eight-step generator from images by Inductive Moment Matching (arXiv:2503.07565).

    Example: mmgen train-imm --data cifar10 --max-time 30m

    With nothing else it trains on 1,797 handwritten digits that come with mmgen and ends within five minutes. The same
    command resumes an interrupted run. With several GPUs: accelerate launch -m mmgen train-imm ...
    """
    changes = {
        "data.name": data, "data.resolution": resolution, "data.channels": channels,
        "data.split": split, "data.on_corrupt": on_corrupt, "data.conditional": conditional, "data.image_column": image_column,
        "data.label_column": label_column, "train.batch_size": batch_size, "run.batch_per_device": batch_per_device,
        "optimizer.lr": lr, "train.max_images": max_images, "train.seed": seed, "train.precision": precision,
        "run.compile": compile, "run.checkpoint_every": checkpoint_every, "run.preview_every": preview_every,
        "run.eval_every": eval_every, "run.eval_num": eval_num, "run.log_with": log_with.split(",") if log_with else None,
    }  # fmt: skip
    seconds = _seconds(max_time)
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"unknown device {device!r}: auto, cpu or cuda")
    name, resolved, base = _resolve(preset, config, set_ or [], {k: v for k, v in changes.items() if v is not None})
    folder = out or Path("runs") / _default_name(name, resolved, base)
    main = int(os.environ.get("RANK", "0")) == 0
    if main:
        _show_config(name, resolved, base, folder)
    if dry_run:
        if main:
            _show_cost(resolved)
        return

    from ..training.start import train_imm as run

    report = TrainingReport(visible=main)
    try:
        outcome = run(
            resolved, folder, report, device=device, max_seconds=seconds, data_progress=lambda: progress_bar("decoding", 1)
        )
    finally:
        report.stop()
    if main:
        _show_outcome(outcome, folder, resolved)
    if outcome.signal is not None:
        raise typer.Exit(128 + outcome.signal)


def _resolve(
    preset: str | None, file: Path | None, assignments: list[str], changes: dict[str, Any]
) -> tuple[str, ImmConfig, ImmConfig]:
    """The preset's name, the config, and the preset's own config. Precedence: preset, --config, --set, other options."""
    from ..config import merge, nest, parse_assignment, preset_names, read_preset, read_toml, resolve

    over = read_toml(file) if file else {}
    over = merge(over, nest(dict(parse_assignment(text) for text in assignments)))
    over = merge(over, nest(changes))
    if preset is None:
        word = over.get("data", {}).get("name", "digits")
        if word not in DATA_PRESETS:
            raise ConfigError(f"no preset belongs to the data {word!r}: choose one with --preset, of {', '.join(preset_names())}")
        preset = DATA_PRESETS[word]
    table = read_preset(preset)
    return preset, resolve(table, over), resolve(table)


def _default_name(preset: str, config: ImmConfig, base: ImmConfig) -> str:
    """PRESET, or PRESET-XXXXXX where settings that matter to the weights differ from the preset's."""
    different = {k: v for k, v in _differences(config, base).items() if not k.startswith("run.") and k != "train.max_images"}
    if not different:
        return preset
    return f"{preset}-{hashlib.sha256(json.dumps(different, sort_keys=True).encode()).hexdigest()[:6]}"


def _differences(config: ImmConfig, base: ImmConfig) -> dict[str, Any]:
    from ..settings import flatten

    old = dict(flatten(base.to_dict()))
    return {key: value for key, value in flatten(config.to_dict()) if key not in old or old[key] != value}


def _seconds(text: str | None) -> float:
    if text is None:
        return float("inf")
    unit = {"s": 1, "m": 60, "h": 3600, "d": 86400}.get(text[-1:])
    try:
        seconds = float(text[:-1]) * unit if unit else -1.0
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"--max-time {text!r} must be a number with a unit, such as 90s, 30m or 2h")
    return seconds


def _table(*columns: str):
    from rich.table import Table

    table = Table()
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    return table


def _print(content: Any, stderr: bool = False) -> None:
    """Prints a table or a text; where the output goes to a file, lines are not broken."""
    import sys

    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    Console(stderr=stderr, width=None if stream.isatty() else 200).print(content, highlight=False, markup=False)


def _show_config(preset: str, config: ImmConfig, base: ImmConfig, folder: Path) -> None:
    """The resolved settings, a line per section, and what differs from the preset."""
    from rich.table import Table

    table = Table(title=f"preset {preset} -> {folder}", show_header=False, title_justify="left")
    changed = _differences(config, base)
    for section, values in config.to_dict().items():
        shown = (
            f"{key}={_plain(value)}{'*' if f'{section}.{key}' in changed else ''}"
            for key, value in values.items()
            if value is not None
        )
        table.add_row(section, "  ".join(shown))
    _print(table, stderr=True)
    if changed:
        _print("* differs from the preset", stderr=True)
    if config.train.precision == "fp16" and (config.loss.min_gap < 1e-4 or config.flow.second_time != "t-s"):
        _print(
            "note: the paper trains fp16 with loss.min_gap=1e-4, flow.second_time=t-s and loss.a=2 (appendix I.6)",
            stderr=True,
        )


def _plain(value: Any) -> str:
    """A value in short: lists without brackets, true and false as TOML writes them."""
    if isinstance(value, tuple | list):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _show_cost(config: ImmConfig) -> None:
    from ..errors import DataError
    from ..training.batches import split_batch
    from ..training.cost import estimate
    from ..training.imm import imm_model_config
    from ..training.start import expected_shape, load_data

    try:
        with progress_bar("decoding", 1) as progress:
            dataset = load_data(config.data, progress)
        shape, description = dataset.shape, dataset.description
    except DataError as error:
        shape, description = expected_shape(config.data), f"not here ({error})"
        if shape is None:
            raise
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    parts = split_batch(config.train.batch_size, config.loss.group_size, processes, config.run.batch_per_device)
    if parts is None:
        raise ConfigError(f"train.batch_size {config.train.batch_size} cannot be shared by {processes} devices")
    model_config = imm_model_config(config, shape)
    cost = estimate(config, model_config, parts)
    gib = 1024**3
    table = _table("dry run", "")
    for name, value in (
        ("data", description),
        ("images", f"{shape.resolution} x {shape.resolution} x {shape.channels}, {model_config.num_classes or 'no'} classes used"),
        ("parameters", f"{cost.parameters:,}"),
        ("one pass of the network", f"{cost.macs_per_image / 1e9:.3f} G multiply-adds per image"),
        ("one step", f"{cost.flops_per_step / 1e12:,.3f} TFLOP: 2 passes forward, 1 back, {config.train.batch_size} images"),
        ("the whole run", f"{config.train.max_images // config.train.batch_size:,} steps, {config.train.max_images:,} images, "
                          f"{cost.flops_per_step * config.train.max_images / config.train.batch_size:.3g} FLOP"),
        ("passes per step", f"{parts.processes} device(s) x {parts.rounds} round(s) x {parts.size} images"),
        ("memory per device", f"about {cost.total / gib:.2f} GiB: weights and gradients {cost.weights / gib:.2f}, optimiser "
                              f"{cost.optimizer / gib:.2f}, averages {cost.averages / gib:.2f}, activations {cost.activations / gib:.2f}"),
    ):  # fmt: skip
        table.add_row(name, value)
    _print(table)


def _show_outcome(outcome: Outcome, folder: Path, config: ImmConfig) -> None:
    """The table of figures, where things are, and what to type next."""
    if outcome.signal is not None:
        _print(f"stopped at {outcome.images:,} images and saved: the same command resumes", stderr=True)
        return
    results = outcome.results or {}
    if results.get("values"):
        title = results["figure"]
        table = _table("steps", title)
        for count, value in results["values"].items():
            table.add_row(count, f"{value:.3f}")
        if results["between_halves"] is not None:
            table.add_section()
            table.add_row("two halves of the data", f"{results['between_halves']:.3f}")
        _print(table)
        halves = f"; the halves have {results['reference'] // 2:,} each" if results["between_halves"] is not None else ""
        _print(f"{results['num']:,} samples against {results['reference']:,} images{halves}.")
        if title.startswith("FD-pixels"):
            _print("FD-pixels is the Fréchet distance of raw pixels, not FID.")
    total = config.train.max_images
    _print(f"trained on {outcome.images:,} of {total:,} images in {results.get('seconds', 0) / 60:.1f} minutes")
    pictures = [folder / name for name in ("samples.png", "curves.png") if (folder / name).is_file()]
    _print(f"pictures:  {'  '.join(map(str, pictures))}")
    _print(f"model:     {folder / 'model.safetensors'}")
    _print(f"next:      mmgen sample {folder} --steps 1,2,4 --num 64 --out samples/")
