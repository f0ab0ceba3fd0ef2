"""What the training commands share: from options to settings, the tables that a person reads, the run itself."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..errors import ConfigError, shortened
from .progress import progress_bar
from .training_report import TrainingReport

if TYPE_CHECKING:
    from ..config.sections import RunSettings
    from ..data import DataShape
    from ..models.config import ModelConfig
    from ..training.cost import Work
    from ..training.task import Outcome


_PLACES = {"data.name", "teacher.name", "train.init"}  # settings that can be a path


@dataclass(frozen=True)
class Chosen:
    """What a command line means."""

    preset: str
    config: Any  # all settings
    base: Any  # the preset's own
    folder: Path  # of the run
    note: str = ""  # why this preset was chosen


def is_main() -> bool:
    """Whether this process speaks: one of those that `accelerate launch` starts does."""
    return int(os.environ.get("RANK", "0")) == 0


def choose(
    command: str,
    config_class: type,
    resolve: Callable[..., Any],
    data_presets: dict[str, str],
    *,
    preset: str | None,
    file: Path | None,
    assignments: Sequence[str] | None,
    changes: dict[str, Any],
    out: Path | None,
    own_presets: dict[int, str] | None = None,
) -> Chosen:
    """The settings and the folder. Precedence: preset, --config, --set, other options. Raises ConfigError.

    Args:
        command: as typed, such as "train-imm".
        config_class, resolve: of the command's config module.
        data_presets: the preset of each data word that has one of its own; without --data it is that of digits.
        preset, file, assignments, out: --preset, --config, --set, --out.
        changes: what other options set, by dotted key.
        own_presets: by resolution, those for data that have none of their own.
    """
    from ..config.sections import merge, nest, parse_assignment, preset_names, read_preset, read_toml

    over = read_toml(file, command) if file else {}
    over = merge(over, nest(dict(parse_assignment(text) for text in assignments or []), config_class))
    over = merge(over, nest(changes, config_class))
    note = ""
    if preset is None:
        word = over.get("data", {}).get("name", "digits")
        if isinstance(word, str) and word in data_presets:
            preset = data_presets[word]
        elif isinstance(word, str) and own_presets and not is_latents(word):
            preset, over, note = _for_own_images(over, own_presets)
        else:
            names = ", ".join(preset_names(command))
            raise ConfigError(f"no preset belongs to the data {shortened(word)}: choose one with --preset, of {names}")
    table = read_preset(preset, command)
    config, base = resolve(table, over), resolve(table)
    return Chosen(preset, config, base, out or Path("runs") / default_name(preset, config, base), note)


def is_latents(word: str) -> bool:
    from ..data.resolve import find_latents

    return find_latents(word) is not None


def _for_own_images(over: dict[str, Any], own_presets: dict[int, str]) -> tuple[str, dict[str, Any], str]:
    """The preset for images that have none of their own, the settings with class labels where there are some, and a note."""
    from ..config.sections import READING, DataSettings, merge
    from ..data.survey import survey
    from ..system.schema import from_dict

    data = from_dict(DataSettings, over["data"], "data")
    found = survey(data.name, **{key: getattr(data, key) for key in READING if key != "on_corrupt"})
    small, large = sorted(own_presets)
    size = small if (data.resolution or found.side) < (small + large) / 2 else large
    labels = found.classes > 1 and over["data"].get("conditional", True)
    over = merge({"data": {"conditional": labels}}, over)
    classes = f"{found.classes:,} classes" if found.classes > 1 else "no classes"
    note = (
        f"{data.name}: {found.images:,} images, {classes}, about {found.side:,} pixels: preset {own_presets[size]}, for "
        f"{data.resolution or size}x{data.resolution or size} pixels{' and with class labels' if labels else ''}; another with --preset"
    )
    return own_presets[size], over, note


def default_name(preset: str, config: Any, base: Any) -> str:
    """PRESET, or PRESET-XXXXXX where settings that matter to the weights differ from the preset's."""
    free = ("run.",) if config.optimizer.decay != "none" else ("run.", "train.max_images")
    different = {key: value for key, value in differences(config, base).items() if not key.startswith(free)}
    if not different:
        return preset
    for key in _PLACES & different.keys():
        different[key] = _one_spelling(different[key])
    return f"{preset}-{hashlib.sha256(json.dumps(different, sort_keys=True).encode()).hexdigest()[:6]}"


def _one_spelling(place: str) -> str:
    """The same for `data/x`, `data/x/` and their absolute path, so that a run is found again however its files are named."""
    if not os.path.exists(os.path.expanduser(place)):
        return place  # a name
    path = os.path.abspath(os.path.expanduser(place))
    inside = os.path.relpath(path)
    return path if inside.startswith(os.pardir) else inside


def differences(config: Any, base: Any) -> dict[str, Any]:
    """The settings of `config` that are not those of `base`, by dotted key."""
    from ..system.schema import flatten

    old = dict(flatten(base.to_dict()))
    return {key: value for key, value in flatten(config.to_dict()) if key not in old or old[key] != value}


def seconds_of(text: str | None) -> float:
    """--max-time in seconds; without one, infinitely many. Raises ConfigError."""
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


def run(
    train: Callable[..., Outcome],
    chosen: Chosen,
    *,
    device: str,
    max_seconds: float,
    watch: str = "loss",
    next_commands: Sequence[str],
    more: Callable[[dict[str, Any]], None] | None = None,
) -> None:
    """Trains with a bar or JSON lines, shows the outcome, and ends with the status of the signal that stopped it, if one did.

    Args:
        train: of a method, such as `methods.imm.train_imm`.
        watch: the logged number that the bar shows.
        next_commands, more: see `show_outcome`.
    """
    report = TrainingReport(visible=is_main(), watch=watch)
    try:
        outcome = train(
            chosen.config, chosen.folder, report, device=device, max_seconds=max_seconds,
            data_progress=lambda: progress_bar("decoding", 1),
        )  # fmt: skip
    finally:
        report.stop()
    if is_main():
        show_outcome(outcome, chosen, next_commands, more)
    if outcome.signal is not None:
        raise typer.Exit(128 + outcome.signal)


def table_of(*columns: str) -> Any:
    """An empty table, its first column to the left, the others to the right."""
    from rich.table import Table

    table = Table()
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    return table


def show(content: Any, stderr: bool = False) -> None:
    """Prints a table or a text; where the output goes to a file, lines are not broken."""
    import sys

    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    Console(stderr=stderr, width=None if stream.isatty() else 200).print(content, highlight=False, markup=False, soft_wrap=isinstance(content, str))


def show_config(chosen: Chosen, whole: bool = False) -> None:
    """What will be trained, in a few lines; `whole`: all settings, a row per section, those that differ from the preset marked."""
    changed = differences(chosen.config, chosen.base)
    if chosen.note:
        show(chosen.note, stderr=True)
    if not whole:
        for line in _summary(chosen, changed):
            show(line, stderr=True)
        return
    from rich.table import Table

    table = Table(title=f"preset {chosen.preset} -> {chosen.folder}", show_header=False, title_justify="left")
    for section, values in chosen.config.to_dict().items():
        shown = (
            f"{key}={_plain(value)}{'*' if any(f'{section}.{key}' in (k, k.rpartition('.')[0]) for k in changed) else ''}"
            for key, value in values.items()
            if value is not None
        )
        table.add_row(section, "  ".join(shown))
    show(table, stderr=True)
    if changed:
        show("* differs from the preset", stderr=True)


def _summary(chosen: Chosen, changed: dict[str, Any]) -> list[str]:
    config, train = chosen.config, chosen.config.train
    data = config.data.name or "the teacher's data"
    lines = [
        f"{chosen.preset}: {data}{' with class labels' if config.data.conditional else ''}, saved in {chosen.folder}",
        f"{train.max_images:,} images, {train.batch_size:,} per step, learning rate {config.optimizer.lr:g}, {train.precision}",
    ]
    if changed:
        shown = [f"{key}={_plain(value)}" for key, value in changed.items() if key != "data.name"][:8]
        lines.append(f"changed: {' '.join(shown)}{' ...' if len(changed) > 8 else ''}")
    return [*lines, "--verbose shows all settings, --dry-run also memory and cost"]


def _plain(value: Any) -> str:
    """A value in short: lists without brackets, true and false as TOML writes them, tables as TOML writes them in a line."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}={_plain(inner)}' for key, inner in value.items() if inner is not None)}}}"
    if isinstance(value, tuple | list):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def show_cost(config: Any, model_config_of: Callable[[DataShape], ModelConfig], work: Work, group_size: int = 1) -> None:
    """The table of a dry run: the data, what a step costs, the memory of a device.

    Args:
        config: with data, train and run.
        model_config_of: what is trained on data of this shape.
        work: what a step does.
        group_size: as the method's Task has it.
    """
    from rich.table import Column, Table

    from ..errors import DataError
    from ..training.batches import share_batch
    from ..training.cost import estimate
    from ..training.sharding import asks_for_shards
    from ..training.start import expected_shape, load_data

    try:
        with progress_bar("decoding", 1) as progress:
            dataset = load_data(config.data, progress)
        shape, description = dataset.shape, dataset.description
    except DataError as error:
        shape, description = expected_shape(config.data), f"not here ({error})"
        if shape is None:
            raise
    processes, train = int(os.environ.get("WORLD_SIZE", "1")), config.train
    auto, checkpointing = config.run.batch_per_device == "auto", config.run.gradient_checkpointing
    # auto is found on the devices when the run begins; here it is shown for one group in a pass, which is the least
    parts = share_batch(train.batch_size, group_size, processes, group_size if auto else config.run.batch_per_device)
    model_config = model_config_of(shape)
    sharded = processes > 1 and asks_for_shards()
    cost = estimate(train, model_config, parts, work, sharded, checkpointing)
    gib, size, networks = 1024**3, shape.resolution, work.trained + work.frozen + work.whole
    table = Table("dry run", Column(overflow="fold"), title_justify="left")
    for name, value in (
        ("data", description),
        ("images", f"{size} x {size} x {shape.channels}, {model_config.num_classes or 'no'} classes used"),
        ("parameters", f"{cost.parameters:,}"),
        *([("sets of parameters", f"{work.trained} trained, {work.frozen + work.whole} frozen")] if networks > 1 else []),
        ("one pass of the network", f"{cost.macs_per_image / 1e9:.3f} G multiply-adds per image"),
        ("one step", f"{cost.flops_per_step / 1e12:,.3f} TFLOP: {work}, {train.batch_size} images"),
        ("the whole run", f"{train.max_images // train.batch_size:,} steps, {train.max_images:,} images, "
                          f"{cost.flops_per_step * train.max_images / train.batch_size:.3g} FLOP"),
        ("passes per step", f"{parts} images" + ", the least: auto finds more when the run begins" * auto),
        ("memory per device" + ", sharded" * sharded,
                              f"about {cost.total / gib:.2f} GiB: weights and gradients {cost.weights / gib:.2f}, "
                              f"optimiser {cost.optimizer / gib:.2f}, averages {cost.averages / gib:.2f}, "
                              f"activations {cost.activations / gib:.2f}"),
    ):  # fmt: skip
        table.add_row(name, value)
    show(table)


def show_outcome(
    outcome: Outcome, chosen: Chosen, next_commands: Sequence[str], more: Callable[[dict[str, Any]], None] | None = None
) -> None:
    """The table of figures, where things are, and what to type next.

    more: shows what else a method has in its results, behind the table.
    """
    folder = chosen.folder
    if outcome.signal is not None:
        show(f"stopped at {outcome.images:,} images and saved: the same command resumes", stderr=True)
        return
    results = outcome.results or {}
    if results.get("values"):
        _show_figures(results)
    if more is not None:
        more(results)
    show(f"trained on {outcome.images:,} images in {results.get('seconds', 0) / 60:.1f} minutes")
    pictures = [folder / name for name in ("samples.png", "curves.png") if (folder / name).is_file()]
    show(f"pictures:  {'  '.join(map(str, pictures))}")
    show(f"model:     {folder / 'model.safetensors'}")
    for i, line in enumerate([*next_commands, fid_command(folder, results, chosen.config.run)]):
        show(f"{'next:' if i == 0 else '':11}{line}")


def fid_command(folder: Path, results: dict[str, Any], run: RunSettings) -> str:
    """What measures the run again: the same numbers of steps and, where the metric is none of the papers', as many samples."""
    options = [f"--steps {','.join(results['values'])}"] if results.get("values") else []
    options += [f"--features {shlex.quote(run.eval_features)}"] if run.eval_features != "auto" else []
    options += [f"--num {results['num']}"] if str(results.get("figure")).startswith("FD-") else []
    return " ".join(["mmgen fid", shlex.quote(str(folder)), *options])


def _show_figures(results: dict[str, Any]) -> None:
    title = results["figure"]
    table = table_of("steps", title)
    for count, value in results["values"].items():
        table.add_row(count, f"{value:.3f}")
    if results["between_halves"] is not None:
        table.add_section()
        table.add_row("real against real (noise floor)", f"{results['between_halves']:.3f}")
    show(table)
    show(f"{results['num']:,} samples against {results['reference']:,} real images.")
    if results["between_halves"] is not None:
        show(f"Real against real: two halves of the data, {results['reference'] // 2:,} images each.")
    if title.startswith("FD-pixels"):
        show("FD-pixels is the Fréchet distance of raw pixels, not FID.")
