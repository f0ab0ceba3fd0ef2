"""`mmgen fid`: scores that can be compared with the papers'."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import COUNT, DEVICE, FLAGS, GUIDE_ALL, HEADS, NUM_CLASSES, NUMBER, PRECISION, TYPE, home, numbers, sigma_interval
from ..system.devices import check_device, find_device
from .progress import progress_bar

if TYPE_CHECKING:
    from rich.console import Console

    from ..metrics.results import Report, Row

_SHORTEST_NAME = 12  # characters a line of a table leaves to the name of the samples


_scores = partial(typer.Option, rich_help_panel="Scores")
_reference = partial(typer.Option, rich_help_panel="Reference")
_model = partial(typer.Option, rich_help_panel="If SAMPLES is a model (as for `mmgen sample`; defaults: the model's)")
_facts = partial(typer.Option, rich_help_panel="If SAMPLES is another project's checkpoint")
_images = partial(typer.Option, rich_help_panel="If SAMPLES is a data set")
_running = partial(typer.Option, rich_help_panel="Running")


def fid(
    samples: Annotated[
        list[str],
        typer.Argument(
            metavar="SAMPLES...",
            help="A folder of images, an npz (arr_0), zip or parquet file, a hub dataset, or a model, whose samples are drawn "
            "in memory.",
        ),
    ],
    metrics: Annotated[
        str,
        _scores(metavar="LIST", help="fid, kid, is, pr (precision, recall), dc (density, coverage), clip, retrieval, or all."),
    ] = "fid",
    protocol: Annotated[
        str | None,
        _scores(metavar="NAME", help="coco30k: FID30k and CLIP as papers have them."),
    ] = None,
    num: Annotated[int | None, _scores(**COUNT, help="Number of samples. Default: all; 50,000 from a model.")] = None,
    repeat: Annotated[
        int, _scores(**COUNT, help="Repeat for a spread: new draws (the best counts, as in papers), or bootstraps of images.")
    ] = 1,
    features: Annotated[
        str,
        _scores(
            metavar="NAME",
            help="inception, pixels, dinov2, a path (a TorchScript, or a folder of DINOv2), or auto: inception, and pixels for "
            "images below 32 x 32.",
        ),
    ] = "auto",
    mode: Annotated[
        str | None,
        _scores(metavar="NAME", help="Inception's protocol: tf (EDM, ADM, IMM), clean (clean-fid) or torch (pytorch-fid). Default: tf."),
    ] = None,
    inception: Annotated[
        Path | None,
        _scores(metavar="FILE", help="Inception's weights. Default: $MMGEN_INCEPTION, a cache, else downloaded once."),
    ] = None,
    clip: Annotated[
        str | None,
        _scores(
            metavar="PATH", help="For clip and retrieval: a CLIP (folder or hub id); for retrieval also towers of your own.",
        ),
    ] = None,
    captions: Annotated[
        Path | None,
        _scores(metavar="FILE", help="For clip and retrieval: .txt, .jsonl or .csv. Default: those beside the images."),
    ] = None,
    save_stats: Annotated[
        Path | None, _scores(metavar="FILE", help="Save the samples' statistics as a later --ref (.safetensors or .npz).")
    ] = None,
    out: Annotated[
        Path | None, _scores(metavar="FILE", help="JSON file the scores are added to. Default: scores.json beside SAMPLES.")
    ] = None,
    ref: Annotated[
        str | None,
        _reference(
            metavar="DATA", help="A data set, images, or a statistics file (EDM, EDM2, ADM, clean-fid, pytorch-fid, mmgen). "
            "Default: the training set named in the samples' record.",
        ),
    ] = None,
    ref_num: Annotated[int | None, _reference(**COUNT, help="Only the first N images.")] = None,
    ref_split: Annotated[str | None, _reference(metavar="NAME", help="Split. Default: train.")] = None,
    ref_mode: Annotated[
        str | None, _reference(metavar="NAME", help="Protocol of a statistics file that does not say. Default: --mode.")
    ] = None,
    resolution: Annotated[
        int | None, _reference(**COUNT, help="Crop and resize to N x N, as for training. Default: as they are.")
    ] = None,
    channels: Annotated[int | None, _reference(**COUNT, help="1 for grey, 3 for colour. Default: as they are.")] = None,
    steps: Annotated[str | None, _model(metavar="LIST", help="Steps, such as 1,2,4,8: a row each.")] = None,
    seed: Annotated[int | None, _model(**COUNT, help="Seed. Default: 0.")] = None,
    classes: Annotated[str | None, _model(metavar="LIST", help="Class names or numbers, random or balanced. Default: random.")] = None,
    guidance: Annotated[
        str | None, _model(metavar="LIST", help="Weights of classifier-free guidance, such as 1,1.5,3: a row each.")
    ] = None,
    guidance_interval: Annotated[
        str | None, _model(metavar="LOW,HIGH", help="Guide between these sigma/alpha only.")
    ] = None,
    guide: Annotated[str | None, _model(metavar="MODEL", help="Guide away from this worse version of it.")] = None,
    sampler: Annotated[str | None, _model(metavar="NAME", help="pushforward, restart, ddim, ancestral or heun.")] = None,
    grid: Annotated[str | None, _model(metavar="NAME", help="Times of the steps: uniform, edm, schedule or eta.")] = None,
    eta: Annotated[str | None, _model(metavar="LIST", help="Intermediate times as sigma/alpha.")] = None,
    churn: Annotated[float | None, _model(**NUMBER, help="heun only: S_churn.")] = None,
    s_tmin: Annotated[float | None, _model(**NUMBER, help="heun only: S_tmin.")] = None,
    s_tmax: Annotated[float | None, _model(**NUMBER, help="heun only: S_tmax.")] = None,
    s_noise: Annotated[float | None, _model(**NUMBER, help="heun only: S_noise.")] = None,
    stochasticity: Annotated[float | None, _model(**NUMBER, help="ancestral only: from 0 (as ddim) to 1.")] = None,
    ema: Annotated[str | None, _model(metavar="NAME", help="Another weight average of the run.")] = None,
    ema_lengths: Annotated[
        str | None, _model(metavar="LIST", help="Averages of these lengths, as `mmgen ema` makes them: a row each.")
    ] = None,
    precision: Annotated[str | None, _model(**PRECISION)] = None,
    type: Annotated[str | None, _facts(**TYPE)] = None,
    preset: Annotated[str | None, _facts(**FLAGS)] = None,
    heads: Annotated[int | None, _facts(**HEADS)] = None,
    num_classes: Annotated[int | None, _facts(**NUM_CLASSES)] = None,
    guide_all: Annotated[bool, _facts("--guide-all", **GUIDE_ALL)] = False,
    split: Annotated[str | None, _images(metavar="NAME", help="Split. Default: train.")] = None,
    image_column: Annotated[str | None, _images(metavar="NAME", help="Column of the images. Default: the first one.")] = None,
    follow_links: Annotated[
        bool, _running("--follow-links", help="Also follow links that lead out of a folder of images.")
    ] = False,
    batch_size: Annotated[int, _running(**COUNT, help="Images at a time: fewer need less memory; same scores.")] = 64,
    device: Annotated[str, _running(**DEVICE)] = "auto",
) -> None:
    """Compute FID, KID, IS, precision and recall.

    On several GPUs: accelerate launch -m mmgen fid ...

    Example: mmgen fid samples/

    Example: mmgen fid runs/cifar10-imm --steps 1,2,4,8 --metrics fid,is

    Example: mmgen fid runs/student --protocol coco30k --captions captions.txt --ref val2014/ --clip CLIP

    Statistics for later: mmgen fid imagenet/ --save-stats imagenet.safetensors
    """
    check_device(device)
    samples, (ref, features, clip) = [home(name) for name in samples], (home(name) for name in (ref, features, clip))
    drawing: dict[str, Any] = {"seed": seed, "sampler": sampler, "grid": grid, "ema": ema}
    drawing |= {"churn": churn, "s_tmin": s_tmin, "s_tmax": s_tmax, "s_noise": s_noise, "stochasticity": stochasticity}
    drawing["steps"] = None if steps is None else numbers(steps, int, "--steps", "1,2,4,8")
    drawing["guidance"] = None if guidance is None else numbers(guidance, float, "--guidance", "1,1.5,3")
    drawing["guidance_interval"] = sigma_interval(guidance_interval, "--guidance-interval")
    drawing["guide"] = home(guide)
    drawing["etas"] = None if eta is None else tuple(numbers(eta, float, "--eta", "1.4"))
    drawing["ema_lengths"] = None if ema_lengths is None else numbers(ema_lengths, float, "--ema-lengths", "0.05,0.1")
    drawing["classes"], drawing["precision"] = classes, precision
    drawing |= {"type": type, "preset": preset, "heads": heads, "num_classes": num_classes, "guide_all": guide_all or None}
    wanted = None if metrics == "all" else tuple(dict.fromkeys(name.strip() for name in metrics.split(",")))

    from ..metrics.evaluate import FidSettings, evaluate
    from ..system.processes import find_process_group

    process_group = find_process_group(cpu=device == "cpu")
    settings = FidSettings(
        protocol=protocol, ref=ref, ref_num=ref_num, ref_split=ref_split, ref_mode=ref_mode, resolution=resolution, channels=channels, mode=mode,
        features=features, inception=home(inception), metrics=wanted, num=num, repeat=repeat, split=split,
        image_column=image_column, follow_links=follow_links, drawing=drawing, clip=clip, captions=home(captions),
        save_stats=home(save_stats), out=home(out), batch_size=batch_size, device=find_device(device),
    )  # fmt: skip
    report = evaluate(samples, settings, process_group=process_group, bar=progress_bar)  # the process that downloads or decodes shows it
    if process_group.is_main:
        _show(report, settings.save_stats)  # first: a full disk must not cost the scores
        _keep(report, settings.out)


def _keep(report: Report, out: Path | None) -> None:
    """Adds the scores to the files beside the samples, and says where, or that there is no place for them."""
    from ..metrics.results import append, entry
    from ..metrics.sweep import sweep_chart
    from ..system.files import replacing

    files: dict[Path | None, list[dict[str, Any]]] = {}
    for row in report.rows:
        if row.score.metrics:
            files.setdefault(out or row.subject.draws[0].beside, []).append(entry(row, report))
    for file, entries in files.items():
        if file is None:
            print("note: samples of the hub have no place beside them: the scores are kept with --out FILE.json", file=sys.stderr)
        else:
            append(file, entries)
            print(f"kept in: {file}")
    chart = sweep_chart(report)
    path = next((file for file in files if file is not None), None)
    if chart is not None and path is not None:
        picture = path.with_suffix(".png")
        with replacing(picture) as temporary:
            chart.save(temporary, format="PNG")
        print(f"chart: {picture}")


def _show(report: Report, save_stats: Path | None) -> None:
    from rich.console import Console

    from ..metrics.results import explanation

    # Where the output goes to a file, lines are not broken
    console = Console(width=None if sys.stdout.isatty() else 1000)
    if any(row.score.metrics for row in report.rows):
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
    """A line for each row; on a terminal too narrow for that, a column for each: names are folded, numbers never cut."""
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
    names = list(dict.fromkeys(name for row in rows for name in row.score.metrics))
    header = ["samples", *(["steps", "NFE", "guidance"] if drawn else []), "images", *names, *(["excess"] if excess else [])]
    lines = [header]
    for row in rows:
        record = row.subject.record
        how = [f"{record[key]:g}" if key in record else "" for key in ("steps", "nfe", "guidance")] if drawn else []
        more = [f"about {row.score.excess:.2g}" if row.score.excess is not None else ""] if excess else []
        lines.append([row.subject.name, *how, f"{row.score.num:,}", *(_metric(row, name) for name in names), *more])
    return lines


def _metric(row: Row, name: str) -> str:
    if name not in row.score.metrics:
        return ""
    spread = row.score.spreads.get(name)
    return f"{row.score.metrics[name]:.4g}" + ("" if spread is None else f" ± {spread:.2g}")
