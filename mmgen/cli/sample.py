"""`mmgen sample`: images from a model."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ConfigError, nearest
from .options import check_device, choose_device, class_list, numbers
from .progress import progress_bar

if TYPE_CHECKING:
    from ..sampling.folder import Written

FORMATS = {"png": "", "npz": ".npz", "grid": ".png"}  # and the suffix of the file, if it is one


def sample(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A model file, a run folder such as runs/digits-imm, or a hub repository user/name."
        ),
    ],
    steps: Annotated[
        str | None,
        typer.Option(
            help="Steps of the sampler; several, such as 1,2,4, draw the same images with each. A step costs an evaluation of "
            "the network, of heun two. Default: the model's, else 1 of a flow map or consistency model, and of a diffusion model "
            "18 with heun, 50 with ddim, 250 with ancestral. Of a distilled student other numbers may give worse images."
        ),
    ] = None,
    num: Annotated[int, typer.Option(help="How many images. A larger number later adds to those that are there.")] = 64,
    out: Annotated[
        Path,
        typer.Option(
            help="Where they go: a folder, or a file .npz or .png (a grid). With several steps, steps-1/ ... in the "
            "folder, or NAME-steps-1.npz ..."
        ),
    ] = Path("samples"),
    format: Annotated[
        str | None,
        typer.Option(
            metavar="png|npz|grid",
            help="png: a PNG file per image. npz: one file, arr_0 the images (N, H, W, C), arr_1 the labels; fast for "
            "many. grid: one picture of all. Default: what --out ends in, else png.",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Image i has the random numbers of (seed, i), whatever the batch size and devices.")
    ] = 0,
    classes: Annotated[
        str,
        typer.Option(
            metavar="random|balanced|3,5",
            help="random: as often as in the training data. balanced: all in turn. Or a list of class names or numbers, in turn.",
        ),
    ] = "random",
    guidance: Annotated[
        float | None,
        typer.Option(help="w of classifier-free guidance; 1 is none, others cost twice the evaluations. Default: the model's."),
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option(
            metavar="pushforward|restart|ddim|ancestral|heun",
            help="Of a flow map (IMM), pushforward: from each time to the next; restart: to the end, then back with fresh noise, "
            "also of a consistency model. Of a diffusion model, ddim: deterministic, first order; heun: EDM's, second order; "
            "ancestral: DDPM's, random, and a student's. Default: the model's, else pushforward, heun where EDM trained it, "
            "otherwise ddim.",
        ),
    ] = None,
    grid: Annotated[
        str | None,
        typer.Option(
            metavar="default|uniform|edm|eta|schedule",
            help="Times of the steps. default: of a flow map the paper's, uniform but for two steps, which meet at eta 1.4; of "
            "a diffusion model edm with heun or where EDM trained it, otherwise uniform. uniform: evenly spaced in the model's "
            "own time or timesteps, from the last one on. edm: equation 5 of Karras et al. eta: those of --eta. schedule: of a "
            "distilled student (its default), evenly spaced in the time that it was distilled on. "
            "Default: the model's.",
        ),
    ] = None,
    eta: Annotated[
        str | None,
        typer.Option(
            metavar="1.4",
            help="Intermediate times as eta = sigma/alpha, one fewer than steps, descending. Default: none.",
        ),
    ] = None,
    churn: Annotated[
        float | None, typer.Option(help="S_churn of heun: noise added before each step; 0 is none. Default: the model's, else 0.")
    ] = None,
    s_tmin: Annotated[
        float | None, typer.Option(help="With --churn: sigma below which nothing is churned. Default: the model's, else 0.")
    ] = None,
    s_tmax: Annotated[
        float | None, typer.Option(help="With --churn: sigma above which nothing is churned. Default: the model's, else none.")
    ] = None,
    s_noise: Annotated[
        float | None, typer.Option(help="With --churn: standard deviation of the noise added. Default: the model's, else 1.")
    ] = None,
    stochasticity: Annotated[
        float | None,
        typer.Option(
            help="Of ancestral, the part of DDPM's noise that is drawn, from 0 (ddim) to 1. Default: the model's, else 1."
        ),
    ] = None,
    ema: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Another of the run's weight averages, such as 0.9999. Default: the first."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images at a time: more need more memory. No influence on the images.")] = 256,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="auto: the GPU if there is one.")] = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace samples of other settings in --out. Default: refuse.")
    ] = False,
) -> None:
    """Draw images from a model.

    Example: mmgen sample runs/digits-imm --steps 1,2,4 --num 64 --out samples/

    A diffusion model: mmgen sample teacher.safetensors --sampler heun --steps 18

    An interrupted run continues with the images still missing when the same command is typed again.

    How the samples were made is recorded in samples.json, or NAME.npz.json.

    With several GPUs: accelerate launch -m mmgen sample MODEL ...
    """
    with _interruptible():
        step_counts = [None] if steps is None else numbers(steps, int, "--steps", "1,2,4")
        layout, places = _places(out, format, step_counts)
        check_device(device)
        etas = tuple(numbers(eta, float, "--eta", "1.4")) if eta is not None else ()
        if num < 1:
            raise ConfigError(f"--num must be at least 1, not {num}")

        from ..sampling import drawing as sampling, file as sample_file, folder as sample_folder
        from ..models.model import load_model, read_config
        from ..sampling.record import Origin
        from ..system.processes import find_team

        origin = Origin.of(model, ema)
        config = read_config(origin.file)
        common = {"seed": seed, "classes": class_list(classes, config), "guidance": guidance, "sampler": sampler}
        common |= {"grid": grid, "etas": etas, "batch_size": batch_size}
        common |= {"churn": churn, "s_tmin": s_tmin, "s_tmax": s_tmax, "s_noise": s_noise, "stochasticity": stochasticity}
        settings = [sampling.SampleSettings(steps=count, **common) for count in step_counts]
        plans = [sampling.plan(config, one) for one in settings]  # all are checked before the first is drawn
        team = find_team(cpu=device == "cpu")
        for note in dict.fromkeys(note for chosen in plans for note in chosen.notes):
            if team.is_main:
                typer.echo(f"note: {note}", err=True)
        loaded = load_model(origin.file, choose_device(device))
        write = {"png": sample_folder.write_png, "npz": sample_file.write_npz, "grid": sample_file.write_grid}[layout]

        written = []
        for one, chosen, place in zip(settings, plans, places, strict=True):
            description = f"{chosen.steps} step{'s' * (chosen.steps > 1)}"
            with progress_bar(description, num) if team.is_main else contextlib.nullcontext() as update:
                written.append(write(loaded, place, num, one, origin, overwrite=overwrite, progress=update, team=team))
        if team.is_main:
            _show(written)


def _places(out: Path, format: str | None, steps: list[int] | list[None]) -> tuple[str, list[Path]]:
    """The format, and a folder or file for each number of steps. Raises ConfigError."""
    if format is not None and format not in FORMATS:
        raise ConfigError(f"unknown format {format!r}: {nearest(format, FORMATS)}")
    suffix = out.suffix.lower()
    inferred = {".npz": "npz", ".png": "grid"}.get(suffix)
    if inferred and format not in (None, inferred):
        kind = "one npz file" if inferred == "npz" else "one picture (grid)"
        raise ConfigError(f"--out {out} means {kind}, but --format is {format}: change one of them")
    if suffix in (".jpg", ".jpeg", ".webp", ".gif", ".npy", ".zip") and not out.is_dir():
        raise ConfigError(f"--out {out} is nothing that can be written: give a folder, a file .npz or a file .png (a grid)")
    layout = inferred or format or "png"
    if layout == "png":
        if len(steps) == 1:
            return layout, [out]
        if (out / "samples.json").is_file():
            raise ConfigError(
                f"{out} holds the samples of one run, and folders of others beside them confuse: choose another --out"
            )
        return layout, [out / f"steps-{count}" for count in steps]
    file = out if inferred else out / {"npz": "samples.npz", "grid": "grid.png"}[layout]
    if len(steps) == 1:
        return layout, [file]
    return layout, [file.with_name(f"{file.stem}-steps-{count}{file.suffix}") for count in steps]


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C ends with status 130 and SIGTERM with 143, after temporary files are gone."""

    def terminate(signum: int, frame: object) -> None:
        raise SystemExit(128 + signum)

    try:
        before = signal.signal(signal.SIGTERM, terminate)
    except ValueError:  # not in the main thread: whoever runs this there handles signals
        before = None
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        typer.echo("interrupted: the same command continues with the images still missing", err=True)
        raise typer.Exit(130 if isinstance(stop, KeyboardInterrupt) else stop.code) from None
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _show(written: list[Written]) -> None:
    import sys

    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in ("steps", "NFE", "images", "drawn now"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("where", overflow="fold")
    for one in written:
        where = str(one.place) + "/" * one.place.is_dir()
        table.add_row(str(one.record["steps"]), str(one.record["nfe"]), f"{one.num:,}", f"{one.drawn:,}", where)
    # Where the output goes to a file, paths are not broken
    Console(width=None if sys.stdout.isatty() else 1000).print(table, highlight=False, markup=False)
