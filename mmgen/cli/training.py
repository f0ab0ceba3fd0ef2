"""The training commands, made of the methods' records by one factory; the tables that a person reads, the run itself."""

from __future__ import annotations

import functools
import inspect
import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..methods.method import Method
from ..methods.times import seconds_of
from . import training_options as option
from ..system.devices import check_device
from .dry_run import show_cost
from .tables import show, table_of
from .training_report import TrainingReport

if TYPE_CHECKING:
    from ..config.sections import RunSettings
    from ..methods.choosing import Chosen
    from ..training.task import Outcome


def training_command(method: Method) -> Callable[..., None]:
    """The command of a method, for typer: its own options, then those that all methods share."""

    def command(**given: Any) -> None:
        changes = {**option.shared_changes(given), **option.own_changes(method.options, given)}
        seconds = float("inf") if given["max_time"] is None else seconds_of(given["max_time"])
        check_device(given["device"], numbered=False)

        from ..config.sections import parse_assignment
        from ..methods.choosing import choose

        assignments = dict(parse_assignment(text) for text in given["set_"] or [])
        chosen = choose(method, assignments, changes, preset=given["preset"], file=given["config"], out=given["out"], device=given["device"])
        notes = method.training().notes(chosen.config)

        @functools.cache  # once, before the first other thing that is shown: an error that comes before stands alone
        def announce() -> None:
            show_config(chosen, given["verbose"] or given["dry_run"])
            for note in notes:
                show(f"note: {note}", stderr=True)

        if not given["dry_run"]:
            run(method, chosen, announce, device=given["device"], max_seconds=seconds)
        elif is_main():
            show_cost(method, chosen.config, given["device"], announce)

    own = {one.name: (option.own_option(one, method.heading), None) for one in method.options}
    shared = {name: option for name, option in option.SHARED.items() if name not in (*own, *method.without)}
    command.__name__ = method.name.replace("-", "_")
    command.__doc__ = inspect.cleandoc(method.help)
    command.__annotations__ = {name: kind for name, (kind, _) in (own | shared).items()}
    command.__signature__ = inspect.Signature([
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (kind, default) in (own | shared).items()
    ])  # fmt: skip
    return command


def is_main() -> bool:
    """Whether this process speaks: one of those that `accelerate launch` starts does."""
    return int(os.environ.get("RANK", "0")) == 0


def run(method: Method, chosen: Chosen, announce: Callable[[], None], *, device: str, max_seconds: float) -> None:
    """Trains with a bar or JSON lines, shows the outcome, and ends with the status of the signal that stopped it, if one did.

    announce: says what will be trained."""
    from ..methods.run import train

    report = TrainingReport(is_main(), method.training().watch(chosen.config), announce)
    try:
        outcome = train(
            method, chosen.config, chosen.folder, report, device=device, max_seconds=max_seconds,
            data_progress=lambda: report.work("decoding", 1),
        )  # fmt: skip
    finally:
        report.stop()
    if is_main():
        show_outcome(outcome, chosen, method)
    if outcome.signal is not None:
        raise typer.Exit(128 + outcome.signal)


def show_config(chosen: Chosen, whole: bool = False) -> None:
    """What will be trained, in a few lines; `whole`: all settings, a row per section, those that differ from the preset marked."""
    from ..methods.choosing import differences

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
        f"{chosen.preset}: {data}{' with class labels' if config.data.conditional else ' with captions' if config.data.text else ''}, saved in {chosen.folder}",
        f"{train.max_images:,} images, {train.batch_size:,} per step, learning rate {config.optimizer.lr:g}, {train.precision}",
    ]
    if changed:
        shown = [f"{key}={_plain(value)}" for key, value in changed.items() if key != "data.name"][:8]
        lines.append(f"changed: {' '.join(shown)}{' ...' if len(changed) > 8 else ''}")
    return [*lines, "--verbose shows all settings, --dry-run also memory and cost"]


def _plain(value: Any) -> str:
    """A value as TOML writes it in a line, so that --set takes it; quotes around a word are left out."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key} = {_quoted(inner)}' for key, inner in value.items() if inner is not None)}}}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_quoted, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value) or '""'


def _quoted(value: Any) -> str:
    return json.dumps(value) if isinstance(value, str) else _plain(value)


def show_outcome(outcome: Outcome, chosen: Chosen, method: Method) -> None:
    """The tables of scores, where things are, and what to type next."""
    folder = chosen.folder
    if outcome.signal is not None:
        show(f"stopped at {outcome.images:,} images and saved: the same command resumes", stderr=True)
        return
    results = outcome.results or {}
    if results.get("values"):
        _show_scores(results)
    if results.get("comparison"):
        _show_comparison(results["comparison"])
    show(f"trained on {outcome.images:,} images in {results.get('seconds', 0) / 60:.1f} minutes")
    pictures = [folder / name for name in ("samples.png", "curves.png") if (folder / name).is_file()]
    show(f"pictures:  {'  '.join(map(str, pictures))}")
    show(f"model:     {folder / 'model.safetensors'}")
    next_commands = [line.format(folder=shlex.quote(str(folder))) for line in method.next_commands]
    for i, line in enumerate([*next_commands, fid_command(folder, results, chosen.config.run)]):
        show(f"{'next:' if i == 0 else '':11}{line}")


def fid_command(folder: Path, results: dict[str, Any], run: RunSettings) -> str:
    """What measures the run again: the same numbers of steps and, where the metric is none of the papers', as many samples."""
    options = [f"--steps {','.join(results['values'])}"] if results.get("values") else []
    options += [f"--features {shlex.quote(run.eval_features)}"] if run.eval_features != "auto" else []
    options += [f"--num {results['num']}"] if str(results.get("figure")).startswith("FD-") else []
    return " ".join(["mmgen fid", shlex.quote(str(folder)), *options])


def _show_scores(results: dict[str, Any]) -> None:
    title = results["figure"]
    table = table_of("steps", title)
    for count, value in results["values"].items():
        table.add_row(count, f"{value:.3f}")
    if results["between_halves"] is not None:
        table.add_section()
        table.add_row("real against real (noise floor)", f"{results['between_halves']:.3f}")
    show(table)
    real = "run.eval_ref" if results["reference"] is None else f"{results['reference']:,} real images"
    show(f"{results['num']:,} samples against {real}.")
    if results["between_halves"] is not None:
        show(f"Real against real: two halves of the data, {results['reference'] // 2:,} images each.")
    if title.startswith("FD-pixels"):
        show("FD-pixels is the Fréchet distance of raw pixels, not FID.")


def _show_comparison(comparison: dict[str, Any]) -> None:
    """The table of teacher and student."""
    table, rows = table_of("", "sampler", "steps", "evaluations", comparison["figure"]), comparison["rows"]
    for i, row in enumerate(rows):
        best = " at its best" if i == comparison["best"] else ""
        table.add_row(
            row["who"] + best, row["sampler"], str(row["steps"]), str(row["evaluations"]), f"{row['value']:.3f}",
            end_section=i + 1 < len(rows) and rows[i + 1]["who"] != row["who"],
        )  # fmt: skip
    show(table)
