"""`mmgen distill`: a diffusion or flow-matching teacher into a student of few steps."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError, MmgenError, nearest
from . import training
from . import training_options as option
from .options import COUNT, NUMBER, check_device, home

if TYPE_CHECKING:
    from ..config.distill import DistillConfig

# The recipe that a data set has of its own; GENERAL for all others.
DATA_PRESETS = {"digits": "digits-distill", "cifar10": "cifar10-distill", "uoft-cs/cifar10": "cifar10-distill"}
SIZE_PRESETS = {128: "imagenet128-distill"}
GENERAL = "imagenet64-distill"

METHODS = ("alternating", "instant")
POSTERIORS = ("conditional", "unconditional")
SCHEDULES = ("fm", "vp_cosine", "ddpm_linear", "edm", "discrete")


_student = partial(typer.Option, rich_help_panel="Teacher and student (defaults: the preset's)")


def distill(
    teacher: Annotated[
        str | None,
        _student(metavar="MODEL", help="A run folder, a model file, what `mmgen convert` reads, or a hub repository. Required."),
    ] = None,
    steps: Annotated[int | None, _student(**COUNT, help="Number of steps of the student, 1 to 8.")] = None,
    method: Annotated[
        str | None,
        _student(
            metavar="NAME",
            help="alternating (algorithm 2: with an auxiliary denoiser) or instant (algorithm 3: with the teacher's Jacobian).",
        ),
    ] = None,
    guidance: Annotated[
        float | None, _student(**NUMBER, help="Guidance weight of the teacher, baked into the student; 1 is none.")
    ] = None,
    posterior: Annotated[
        str | None,
        _student(metavar="NAME", help="How samples are noised again: conditional (given z_t) or unconditional (ablation)."),
    ] = None,
    schedule: Annotated[
        str | None,
        _student(metavar="NAME", help="Noise schedule: fm, vp_cosine, ddpm_linear, edm or discrete. Default: the teacher's."),
    ] = None,
    shift: Annotated[float | None, _student(**NUMBER, help="Above 1: more of the steps at high noise, for 1 or 2 steps.")] = None,
    dropout: Annotated[
        float | None, _student(**NUMBER, help="Dropout of the student, also while sampling, for 1 or 2 steps.")
    ] = None,
    noise_channels: Annotated[
        int | None, _student(**COUNT, help="Extra input channels of noise, for 1 or 2 steps.")
    ] = None,
    teacher_steps: Annotated[
        int | None,
        _student(**COUNT, help="Teacher evaluations in the final comparison; 0 for none. Default: 256."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            rich_help_panel="Images", metavar="DATA",
            help="As for `mmgen train-teacher`. Default: what the teacher was trained on.",
        ),
    ] = None,
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
    """Distil a diffusion or flow-matching teacher into a student of 1 to 8 steps (arXiv:2406.04103).

    The student starts as a copy of the teacher. At the end, a table compares the teacher at many and at few steps with the
    student. The same command resumes an interrupted run.

    Example: mmgen distill --teacher runs/digits-teacher --steps 8

    Another project's teacher:

        mmgen distill --teacher edm-cifar10-32x32-cond-vp.pkl --data cifar10
    """
    check_device(device)
    words = {"--method": (method, METHODS), "--posterior": (posterior, POSTERIORS), "--schedule": (schedule, SCHEDULES)}
    for name, (word, valid) in words.items():
        if word is not None and word not in valid:
            raise ConfigError(f"unknown {name} {word!r}: {nearest(word, valid)}")
    changes = option.shared_changes(locals())
    own = {
        "teacher.name": home(teacher), "student.steps": steps, "loss.method": method, "teacher.guidance": guidance,
        "loss.posterior": posterior, "student.schedule.name": schedule, "student.shift": shift, "student.dropout": dropout,
        "student.noise_channels": noise_channels, "run.teacher_steps": teacher_steps,
    }  # fmt: skip
    changes |= {key: value for key, value in own.items() if value is not None}
    seconds = training.seconds_of(max_time)

    from ..config.distill import DistillConfig, resolve

    if preset is None:
        preset = _preset(config, set_ or [], changes)
    chosen = training.choose(
        "distill", DistillConfig, resolve, {}, preset=preset, file=config, assignments=set_, changes=changes, out=out
    )
    if not chosen.config.teacher.name:
        raise ConfigError("a student needs a teacher: name a file, a run folder or a hub repository with --teacher")
    if training.is_main():
        training.show_config(chosen, verbose or dry_run)
    if dry_run:
        if training.is_main():
            _show_cost(chosen.config)
        return

    from ..methods.distill.method import distill as run

    folder = shlex.quote(str(chosen.folder))
    alternating = chosen.config.loss.method == "alternating"
    training.run(
        run, chosen, device=device, max_seconds=seconds, watch="moment_gap" if alternating else "loss", more=_show_comparison,
        next_commands=[f"mmgen sample {folder} --num 64 --out samples/"],
    )  # fmt: skip


def _preset(file: Path | None, assignments: list[str], changes: dict[str, Any]) -> str:
    """The recipe for the data, which the teacher's file names unless an option does; else that for the size of its images."""
    from ..config.sections import merge, nest, parse_assignment, read_toml
    from ..config.distill import DistillConfig
    from ..models.files import find_model, read_config

    given = merge(read_toml(file, "distill") if file else {}, nest(dict(map(parse_assignment, assignments)), DistillConfig))
    given = merge(given, nest(changes, DistillConfig))
    try:  # another project's file does not name its data: its size is not worth reading it twice
        model = read_config(find_model(str(given.get("teacher", {}).get("name", ""))))
    except MmgenError:
        model = None
    word = given.get("data", {}).get("name") or (model.data if model is not None else "")
    if isinstance(word, str) and word in DATA_PRESETS:
        return DATA_PRESETS[word]
    return GENERAL if model is None else SIZE_PRESETS.get(model.resolution, GENERAL)


def _show_cost(config: DistillConfig) -> None:
    from ..training.cost import ALTERNATING, INSTANT
    from ..methods.distill.method import find_teacher, student_model_config
    from ..methods.distill.instant import GROUP

    teacher, config = find_teacher(config)
    alternating = config.loss.method == "alternating"
    training.show_cost(
        config, lambda shape: student_model_config(config, teacher), ALTERNATING if alternating else INSTANT,
        1 if alternating else GROUP,
    )  # fmt: skip


def _show_comparison(results: dict[str, Any]) -> None:
    """The table of teacher and student."""
    comparison = results.get("comparison")
    if comparison is None:
        return
    table = training.table_of("", "sampler", "steps", "evaluations", comparison["figure"])
    for i, row in enumerate(comparison["rows"]):
        best = " at its best" if i == comparison["best"] else ""
        table.add_row(
            row["who"] + best, row["sampler"], str(row["steps"]), str(row["evaluations"]), f"{row['value']:.3f}",
            end_section=i + 1 < len(comparison["rows"]) and comparison["rows"][i + 1]["who"] != row["who"],
        )  # fmt: skip
    training.show(table)
