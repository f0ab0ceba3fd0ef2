"""`mmgen distill`: a diffusion or flow-matching teacher into a student of few steps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError, MmgenError, nearest
from . import training
from . import training_options as option
from .options import home

if TYPE_CHECKING:
    from ..config.distill import DistillConfig

# The recipe that a data set has of its own; GENERAL for all others.
DATA_PRESETS = {"digits": "digits-distill", "cifar10": "cifar10-distill", "uoft-cs/cifar10": "cifar10-distill"}
SIZE_PRESETS = {128: "imagenet128-distill"}
GENERAL = "imagenet64-distill"

METHODS = ("alternating", "instant")
POSTERIORS = ("conditional", "unconditional")
SCHEDULES = ("fm", "vp_cosine", "ddpm_linear", "edm")


def distill(
    teacher: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="A run folder of `mmgen train-teacher`, a model file, anything that `mmgen convert` reads, or a hub repository "
            "user/name. Required, here or as teacher.name in --config.",
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="k, the student's number of steps, 1 to 8. Default: the preset's, 8.")] = None,
    method: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(METHODS),
            help="alternating: with an auxiliary denoiser, trained in turn (algorithm 2). instant: without one, by products with "
            "the teacher's Jacobian; each batch is two minibatches (algorithm 3). Default: the preset's, alternating.",
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(help="w of the teacher's classifier-free guidance, baked into the student; 1 is none. Default: 1."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="As of `mmgen train-teacher`. Default: what the teacher was trained on, if its file names it."),
    ] = None,
    posterior: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(POSTERIORS),
            help="How the student's image is noised before it is compared: given z_t too, or the image alone (the paper's "
            "ablation). Default: the preset's, conditional.",
        ),
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(metavar="|".join(SCHEDULES), help="The student's noise schedule. Default: the teacher's own."),
    ] = None,
    shift: Annotated[
        float | None,
        typer.Option(help="Above 1, more of the student's steps are at high noise: for 1 or 2 steps. Default: the preset's, 1."),
    ] = None,
    dropout: Annotated[
        float | None,
        typer.Option(
            help="Of the student, also when it samples, as randomness of its own, for 1 or 2 steps: 0.1, say. "
            "Default: the preset's, 0."
        ),
    ] = None,
    noise_channels: Annotated[
        int | None,
        typer.Option(help="Likewise: channels of noise that the student is given beside the image. Default: the preset's, 0."),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"A recipe; an unknown name lists them. Default: that of the data set, else that of the size, {GENERAL}.",
        ),
    ] = None,
    config: option.ConfigFile = None,
    set_: option.Set = None,
    out: option.Out = None,
    image_column: option.ImageColumn = None,
    label_column: option.LabelColumn = None,
    split: option.Split = None,
    on_corrupt: option.OnCorrupt = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Images per step, over all devices; of the instant method in both minibatches. Default: the preset's."),
    ] = None,
    batch_per_device: option.BatchPerDevice = None,
    lr: option.LearningRate = None,
    max_images: option.MaxImages = None,
    max_time: option.MaxTime = None,
    seed: option.Seed = None,
    precision: option.Precision = None,
    compile: option.Compile = None,
    device: option.Device = "auto",
    checkpoint_every: option.CheckpointEvery = None,
    preview_every: option.PreviewEvery = None,
    eval_every: option.EvalEvery = None,
    eval_num: option.EvalNum = None,
    teacher_steps: Annotated[
        int | None,
        typer.Option(help="Evaluations of the teacher in the comparison at the end; 0: no comparison. Default: 256."),
    ] = None,
    log_with: option.LogWith = None,
    dry_run: option.DryRun = False,
) -> None:
    """Distil a diffusion or flow-matching teacher into a student of 1 to 8 steps by moment matching (arXiv:2406.04103).

    Example: mmgen distill --teacher runs/digits-teacher --steps 8

    Another project's teacher: mmgen distill --teacher edm-cifar10-32x32-cond-vp.pkl --data cifar10 --steps 4

    The student begins as a copy of its teacher. The same command resumes an interrupted run. It ends with a table: the teacher
    in many steps and in as few, and the student.
    """
    training.check_device(device)
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
        training.show_config(chosen)
    if dry_run:
        if training.is_main():
            _show_cost(chosen.config)
        return

    from ..methods.distill.method import distill as run

    folder, count = chosen.folder, chosen.config.student.steps
    alternating = chosen.config.loss.method == "alternating"
    training.run(
        run, chosen, device=device, max_seconds=seconds, watch="moment_gap" if alternating else "loss", more=_show_comparison,
        next_commands=[f"mmgen sample {folder} --num 64 --out samples/", f"mmgen fid {folder} --steps {count}"],
    )  # fmt: skip


def _preset(file: Path | None, assignments: list[str], changes: dict[str, Any]) -> str:
    """The recipe for the data, which the teacher's file names unless an option does; else that for the size of its images."""
    from ..config.sections import merge, nest, parse_assignment, read_toml
    from ..config.distill import DistillConfig
    from ..models.model import find_model, read_config

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
