"""`mmgen fid`: figures that can be compared with the papers'."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import check_device, choose_device, class_list, home, numbers
from .progress import progress_bar

if TYPE_CHECKING:
    from rich.console import Console

    from ..metrics.evaluate import Report, Row

_MODEL, _IMAGES, _REFERENCE, _FEATURES = (
    "If SAMPLES is a model",
    "If SAMPLES is a data set",
    "Reference",
    "Features",
)  # of the help
_SHORTEST_NAME = 12  # characters a line of a table leaves to the name of the samples


def fid(
    samples: Annotated[
        list[str],
        typer.Argument(
            metavar="SAMPLES...",
            help="What to score: a folder of images, an npz (arr_0), a zip, a parquet file or a hub data set; or a model (a "
            ".safetensors file, a run folder, hf://user/name), whose samples are drawn and scored in memory.",
        ),
    ],
    ref: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_REFERENCE,
            help="What to compare with: a data set (any --data word), a folder of images, an npz, or a statistics file (EDM, "
            "EDM2, ADM, clean-fid, pytorch-fid, mmgen's own ...). Default: the training set that the samples' record names.",
        ),
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_FEATURES,
            metavar="tf|clean|torch",
            help="Inception's resizing and weights. tf: TensorFlow's, the protocol of EDM, ADM and IMM. clean: clean-fid's. "
            "torch: pytorch-fid's. Default: tf.",
        ),
    ] = None,
    features: Annotated[
        str,
        typer.Option(
            rich_help_panel=_FEATURES,
            metavar="inception|pixels|dinov2|PATH",
            help="Of what network. pixels: none, for tiny images. PATH: a TorchScript or exported program from uint8 images to "
            "vectors, or a folder of DINOv2 weights; the figure is then called FD with its name.",
        ),
    ] = "inception",
    inception: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=_FEATURES,
            metavar="FILE",
            help="Inception's weights. Default: $MMGEN_INCEPTION, mmgen's cache, clean-fid's place, else downloaded once.",
        ),
    ] = None,
    metrics: Annotated[
        str,
        typer.Option(
            metavar="fid,kid,is,pr,dc,clip|all",
            help="Figures of the one pass: Fréchet distance, Kernel Inception Distance, Inception Score, precision and recall, "
            "density and coverage, CLIP score. all: those that are possible.",
        ),
    ] = "fid",
    num: Annotated[
        int | None, typer.Option(help="Samples: the first so many. Default: all there are; of a model 50,000.")
    ] = None,
    repeat: Annotated[
        int,
        typer.Option(
            help="For a spread: so many draws from a model (the least distance is shown, as papers do), or so many bootstrap "
            "resamplings of given images. 1: none."
        ),
    ] = 1,
    ref_num: Annotated[
        int | None, typer.Option(rich_help_panel=_REFERENCE, help="The first so many images of the reference. Default: all.")
    ] = None,
    ref_split: Annotated[
        str | None, typer.Option(rich_help_panel=_REFERENCE, help="Split of the reference. Default: train.")
    ] = None,
    ref_mode: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_REFERENCE,
            metavar="tf|clean|torch",
            help="By which protocol a statistics file was made that does not say so itself. Default: --mode, with a warning.",
        ),
    ] = None,
    resolution: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=_REFERENCE,
            help="Resize and crop the reference's images to this side, as training does. Default: as they are.",
        ),
    ] = None,
    channels: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=_REFERENCE, help="1 or 3: read the reference's images as grey or colour. Default: as they are."
        ),
    ] = None,
    split: Annotated[str | None, typer.Option(rich_help_panel=_IMAGES, help="Split. Default: train.")] = None,
    image_column: Annotated[
        str | None, typer.Option(rich_help_panel=_IMAGES, help="Column of the images. Default: the first that holds images.")
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_MODEL,
            help="Steps of its sampler; several, such as 1,2,4,8, give a table. Default: as in `mmgen sample`.",
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(rich_help_panel=_MODEL, help="Seed of its samples. Default: 0.")] = None,
    classes: Annotated[
        str | None,
        typer.Option(rich_help_panel=_MODEL, metavar="random|balanced|3,5", help="As in `mmgen sample`. Default: random."),
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(rich_help_panel=_MODEL, help="w of classifier-free guidance. Default: the model's.")
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_MODEL,
            metavar="pushforward|restart|ddim|ancestral|heun",
            help="As in `mmgen sample`. Default: the model's.",
        ),
    ] = None,
    grid: Annotated[
        str | None, typer.Option(rich_help_panel=_MODEL, help="Times of the steps, as in `mmgen sample`. Default: the model's.")
    ] = None,
    eta: Annotated[
        str | None, typer.Option(rich_help_panel=_MODEL, help="Intermediate times, as in `mmgen sample`. Default: none.")
    ] = None,
    churn: Annotated[
        float | None, typer.Option(rich_help_panel=_MODEL, help="S_churn of heun, as in `mmgen sample`. Default: the model's.")
    ] = None,
    s_tmin: Annotated[
        float | None, typer.Option(rich_help_panel=_MODEL, help="Of heun: as in `mmgen sample`. Default: the model's.")
    ] = None,
    s_tmax: Annotated[
        float | None, typer.Option(rich_help_panel=_MODEL, help="Of heun: as in `mmgen sample`. Default: the model's.")
    ] = None,
    s_noise: Annotated[
        float | None, typer.Option(rich_help_panel=_MODEL, help="Of heun: as in `mmgen sample`. Default: the model's.")
    ] = None,
    stochasticity: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=_MODEL, help="Of ancestral, as in `mmgen sample`: from 0 (ddim) to 1. Default: the model's."
        ),
    ] = None,
    ema: Annotated[
        str | None, typer.Option(rich_help_panel=_MODEL, metavar="NAME", help="Another of a run's averages. Default: the first.")
    ] = None,
    clip: Annotated[
        str | None,
        typer.Option(metavar="PLACE", help="For --metrics clip: a folder or hub id of transformers' CLIPModel. Default: none."),
    ] = None,
    captions: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help=".txt with a line an image, or .jsonl or .csv with file_name and text. Default: the folder's metadata.jsonl "
            "or metadata.csv, or NAME.txt beside NAME.png.",
        ),
    ] = None,
    save_stats: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write mean and covariance of the samples' features, .safetensors or .npz, for a later --ref. Default: none.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json", help="Where the scores are added. Default: scores.json in the folder, or FILE.scores.json."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images at a time: more need more memory. No influence on the figures.")] = 64,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="auto: the GPU if there is one.")] = "auto",
) -> None:
    """Score samples: FID and its company, by the papers' protocol, with every choice printed.

    Example: mmgen fid samples/

    Example: mmgen fid runs/cifar10-imm --steps 1,2,4,8 --metrics fid,is

    A reference for later: mmgen fid imagenet/ --save-stats imagenet.safetensors

    With several GPUs: accelerate launch -m mmgen fid ...
    """
    check_device(device)
    samples, (ref, features, clip) = [home(word) for word in samples], (home(word) for word in (ref, features, clip))
    drawing: dict[str, Any] = {"seed": seed, "guidance": guidance, "sampler": sampler, "grid": grid, "ema": ema}
    drawing |= {"churn": churn, "s_tmin": s_tmin, "s_tmax": s_tmax, "s_noise": s_noise, "stochasticity": stochasticity}
    drawing["steps"] = None if steps is None else numbers(steps, int, "--steps", "1,2,4,8")
    drawing["etas"] = None if eta is None else tuple(numbers(eta, float, "--eta", "1.4"))
    drawing["classes"] = None if classes is None else partial(class_list, classes)
    wanted = None if metrics == "all" else tuple(dict.fromkeys(word.strip() for word in metrics.split(",")))

    from ..metrics.evaluate import FidSettings, evaluate
    from ..system.processes import find_team

    team = find_team(cpu=device == "cpu")
    settings = FidSettings(
        ref=ref,
        ref_num=ref_num,
        ref_split=ref_split,
        ref_mode=ref_mode,
        resolution=resolution,
        channels=channels,
        mode=mode,
        features=features,
        inception=home(inception),
        metrics=wanted,
        num=num,
        repeat=repeat,
        split=split,
        image_column=image_column,
        drawing=drawing,
        clip=clip,
        captions=home(captions),
        save_stats=home(save_stats),
        out=home(out),
        batch_size=batch_size,
        device=choose_device(device),
    )
    if team.is_main:
        report = evaluate(samples, settings, team=team, bar=progress_bar)
        _show(report, settings.save_stats)  # first: a full disk must not cost the figures
        _keep(report, settings.out)
    else:
        evaluate(samples, settings, team=team)


def _keep(report: Report, out: Path | None) -> None:
    """Adds the scores to the files beside the samples, and says where, or that there is no place for them."""
    from ..metrics.results import append, entry

    files: dict[Path | None, list[dict[str, Any]]] = {}
    for row in report.rows:
        if row.score.figures:
            files.setdefault(out or row.subject.draws[0].beside, []).append(entry(row, report))
    for file, entries in files.items():
        if file is None:
            print("note: samples of the hub have no place beside them: the scores are kept with --out FILE.json", file=sys.stderr)
        else:
            append(file, entries)
            print(f"kept in: {file}")


def _show(report: Report, save_stats: Path | None) -> None:
    from rich.console import Console

    from ..metrics.results import explanation

    # Where the output goes to a file, lines are not broken
    console = Console(width=None if sys.stdout.isatty() else 1000)
    if any(row.score.figures for row in report.rows):
        _print_table(console, report.rows)
    for line in explanation(report):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if save_stats is not None:
        console.print(f"statistics: {save_stats}", highlight=False, markup=False, soft_wrap=True)
    notes = [note for row in report.rows for note in row.subject.record.get("notes", [])]  # of how a model was sampled
    notes += [warning for row in report.rows for warning in row.score.warnings] + report.notes
    for note in dict.fromkeys(notes):
        print(f"note: {note}", file=sys.stderr)


def _print_table(console: Console, rows: list[Row]) -> None:
    """A line for each row; on a terminal too narrow for that, a column for each: names are folded, figures never cut."""
    from rich.table import Table
    from rich.text import Text

    lines = _cells(rows)
    others = sum(max(map(len, column)) for column in list(zip(*lines, strict=True))[1:])
    room = console.width - others - 3 * len(lines[0]) - 1  # beside the lines and spaces of the table
    if room >= _SHORTEST_NAME:
        lines = [[_folded(line[0], room), *line[1:]] for line in lines]
    else:
        lines = [[_folded(line[0], _SHORTEST_NAME), *line[1:]] for line in lines]
        lines = [list(line) for line in zip(*lines, strict=True)]
    table = Table()
    for number, name in enumerate(lines[0]):
        table.add_column(Text(name), justify="left" if number == 0 else "right", no_wrap=True)
    for line in lines[1:]:
        table.add_row(*map(Text, line))
    console.print(table, width=max(console.width, 1000), crop=False, soft_wrap=True)


def _folded(text: str, width: int) -> str:
    return "\n".join(text[i : i + width] for i in range(0, len(text), width))


def _cells(rows: list[Row]) -> list[list[str]]:
    """The names of the columns, then the text of each row."""
    drawn = any("steps" in row.subject.record for row in rows)
    excess = any(row.score.excess is not None for row in rows)
    names = list(dict.fromkeys(name for row in rows for name in row.score.figures))
    header = ["samples", *(["steps", "NFE", "guidance"] if drawn else []), "images", *names, *(["excess"] if excess else [])]
    lines = [header]
    for row in rows:
        record = row.subject.record
        how = [f"{record[key]:g}" if key in record else "" for key in ("steps", "nfe", "guidance")] if drawn else []
        more = [f"about {row.score.excess:.2g}" if row.score.excess is not None else ""] if excess else []
        lines.append([row.subject.name, *how, f"{row.score.num:,}", *(_figure(row, name) for name in names), *more])
    return lines


def _figure(row: Row, name: str) -> str:
    if name not in row.score.figures:
        return ""
    spread = row.score.spreads.get(name)
    return f"{row.score.figures[name]:.4g}" + ("" if spread is None else f" ± {spread:.2g}")
