"""`mmgen sample`: images from a model."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ConfigError, nearest
from .options import COUNT, DEVICE, FLAGS, GUIDE_ALL, HEADS, NUM_CLASSES, NUMBER, PRECISION, TYPE, numbers, sigma_interval
from ..system.devices import check_device, find_device
from .progress import progress_bar

if TYPE_CHECKING:
    from ..sampling.folder import Written

FORMATS = {"png": "", "npz": ".npz", "grid": ".png"}  # and the suffix of the file, if it is one


_images = partial(typer.Option, rich_help_panel="Images")
_sampler = partial(typer.Option, rich_help_panel="Sampler (defaults: the model's)")
_running = partial(typer.Option, rich_help_panel="Running")
_facts = partial(typer.Option, rich_help_panel="What another project's checkpoint does not say")


def sample(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A run folder such as runs/digits-imm, a model file, or a hub repository user/name."
        ),
    ],
    num: Annotated[
        int | None, _images(**COUNT, help="How many; a larger number later adds to those there. Default: 64, or one per prompt.")
    ] = None,
    prompt: Annotated[list[str] | None, _images("--prompt", metavar="TEXT", help="What to draw. May be repeated.")] = None,
    prompts: Annotated[Path | None, _images(metavar="FILE", help="A prompt a line; image i has prompt i modulo their number.")] = None,
    per_prompt: Annotated[int | None, _images(**COUNT, help="Images of each prompt, in place of --num.")] = None,
    negative_prompt: Annotated[
        str | None, _images(metavar="TEXT", help="What guidance leads away from. Teachers only.")
    ] = None,
    classes: Annotated[
        str,
        _images(metavar="LIST", help="Class names or numbers, used in turn; or random (as in the data), or balanced."),
    ] = "random",
    seed: Annotated[int, _images(**COUNT, help="Image i depends on (seed, i) only, not on batches or devices.")] = 0,
    out: Annotated[
        Path,
        _images(metavar="PATH", help="A folder, an .npz file or a .png file (a grid). One per number of steps."),
    ] = Path("samples"),
    format: Annotated[
        str | None,
        _images(metavar="NAME", help="png (one file per image), npz (arr_0 images, arr_1 labels) or grid. Default: by --out."),
    ] = None,
    overwrite: Annotated[bool, _images("--overwrite", help="Replace samples made with other settings.")] = False,
    steps: Annotated[
        str | None,
        _sampler(
            metavar="LIST",
            help="Steps; 1,2,4 draws the same images with each. Default: the model's, or 1 (IMM), 18 (heun), 50 (ddim), "
            "250 (ancestral).",
        ),
    ] = None,
    guidance: Annotated[
        float | None, _sampler(**NUMBER, help="Weight w of classifier-free guidance; 1 is none, others double the cost.")
    ] = None,
    guidance_interval: Annotated[
        str | None, _sampler(metavar="LOW,HIGH", help="Guide between these sigma/alpha only.")
    ] = None,
    guide: Annotated[
        str | None,
        _sampler("--guide", metavar="MODEL", help="Guide away from this worse version of it."),
    ] = None,
    sampler: Annotated[
        str | None,
        _sampler(
            metavar="NAME",
            help="IMM: pushforward (time to time) or restart (to the end, then back with new noise; also consistency models). "
            "Diffusion: ddim, heun (EDM, second order) or ancestral (DDPM, random; students).",
        ),
    ] = None,
    grid: Annotated[
        str | None,
        _sampler(
            metavar="NAME",
            help="Times of the steps: uniform, edm (Karras et al., eq. 5), schedule (students: even in the time of the "
            "distillation), linspace or leading (other projects' timesteps), or eta (those of --eta).",
        ),
    ] = None,
    eta: Annotated[str | None, _sampler(metavar="LIST", help="Intermediate times as sigma/alpha, descending: 1.4 for two steps.")] = None,
    churn: Annotated[float | None, _sampler(**NUMBER, help="heun only: S_churn, noise added before each step.")] = None,
    s_tmin: Annotated[float | None, _sampler(**NUMBER, help="With --churn: only above this sigma.")] = None,
    s_tmax: Annotated[float | None, _sampler(**NUMBER, help="With --churn: only below this sigma.")] = None,
    s_noise: Annotated[float | None, _sampler(**NUMBER, help="With --churn: standard deviation of the added noise.")] = None,
    stochasticity: Annotated[
        float | None, _sampler(**NUMBER, help="ancestral only: share of DDPM's noise, from 0 (as ddim) to 1.")
    ] = None,
    ema: Annotated[str | None, _sampler(metavar="NAME", help="Another weight average of the run, such as 0.9999.")] = None,
    type: Annotated[str | None, _facts(**TYPE)] = None,
    preset: Annotated[str | None, _facts(**FLAGS)] = None,
    heads: Annotated[int | None, _facts(**HEADS)] = None,
    num_classes: Annotated[int | None, _facts(**NUM_CLASSES)] = None,
    guide_all: Annotated[bool, _facts("--guide-all", **GUIDE_ALL)] = False,
    batch_size: Annotated[int, _running(**COUNT, help="Fewer images at a time need less memory.")] = 256,
    precision: Annotated[str | None, _running(**PRECISION)] = None,
    compile: Annotated[bool, _running("--compile", help="Use torch.compile: faster on a GPU, after a minute.")] = False,
    device: Annotated[str, _running(**DEVICE)] = "auto",
) -> None:
    """Draw images from a model.

    How they were made is recorded in samples.json (or NAME.npz.json). The same command continues an interrupted one. On
    several GPUs: accelerate launch -m mmgen sample MODEL ...

    Example: mmgen sample runs/digits-imm --steps 1,2,4 --out samples/

    By text: mmgen sample runs/digits-text --prompt "a bold three" --num 16 --out grid.png

    A diffusion model: mmgen sample teacher.safetensors --sampler heun
    """
    with _interruptible():
        step_counts = [None] if steps is None else numbers(steps, int, "--steps", "1,2,4")
        layout, paths = _paths(out, format, step_counts)
        check_device(device)
        etas = tuple(numbers(eta, float, "--eta", "1.4")) if eta is not None else ()
        for option, value in (("--num", num), ("--per-prompt", per_prompt)):
            if value is not None and value < 1:
                raise ConfigError(f"{option} must be at least 1, not {value}")

        from ..formats.family import ConvertOptions
        from ..sampling import drawing as sampling, file as sample_file, folder as sample_folder
        from ..sampling.guidance import Guide
        from ..sampling.record import Origin
        from ..system.processes import find_process_group

        texts, num = _texts(prompt, prompts, num, per_prompt)
        origin = Origin.of(model, ema, ConvertOptions(type, preset, None, heads, num_classes, guide_all))
        config = origin.config
        common = {"prompts": texts, "negative": (negative_prompt or "").strip()}
        common |= {"guidance_interval": sigma_interval(guidance_interval, "--guidance-interval")}
        common |= {"guide": guide and Guide.of(guide)}
        common |= {"seed": seed, "classes": classes, "guidance": guidance, "sampler": sampler}
        common |= {"precision": precision, "grid": grid, "etas": etas, "batch_size": batch_size, "compile": compile}
        common |= {"churn": churn, "s_tmin": s_tmin, "s_tmax": s_tmax, "s_noise": s_noise, "stochasticity": stochasticity}
        settings = [sampling.SampleSettings(steps=count, **common) for count in step_counts]
        plans = [sampling.plan(config, one) for one in settings]  # all are checked before the first is drawn
        process_group = find_process_group(cpu=device == "cpu")
        for note in dict.fromkeys([*origin.notes, *(note for chosen in plans for note in chosen.notes)]):
            if process_group.is_main:
                typer.echo(f"note: {note}", err=True)
        loaded = origin.load(find_device(device))
        write = {"png": sample_folder.write_png, "npz": sample_file.write_npz, "grid": sample_file.write_grid}[layout]

        written = []
        for one, chosen, path in zip(settings, plans, paths, strict=True):
            description = f"{chosen.steps} step{'s' * (chosen.steps > 1)}"
            with progress_bar(description, num) if process_group.is_main else contextlib.nullcontext() as update:
                written.append(write(loaded, path, num, one, origin, overwrite=overwrite, progress=update, process_group=process_group))
        if process_group.is_main:
            _show(written)


def _texts(
    prompt: list[str] | None, file: Path | None, num: int | None, per_prompt: int | None
) -> tuple[tuple[str, ...], int]:
    """The prompts, none where no option has any, and the number of images. Raises ConfigError."""
    from ..sampling.prompts import checked, read_prompts

    if prompt and file is not None:
        raise ConfigError("--prompt and --prompts are both given: put all prompts in the file")
    texts = checked(prompt, "--prompt") if prompt else () if file is None else read_prompts(file)
    if per_prompt is None:
        return texts, num or (len(texts) if file is not None else 64)
    if num is not None or not texts:
        raise ConfigError("--per-prompt needs prompts, and says how many images there are: leave --num out, and give --prompt or --prompts")
    return texts, per_prompt * len(texts)


def _paths(out: Path, format: str | None, steps: list[int] | list[None]) -> tuple[str, list[Path]]:
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
    """Ctrl-C ends with status 130, SIGTERM with 143 and a hang-up with 129, after temporary files are gone."""
    got: list[int] = []

    def terminate(number: int, frame: object) -> None:
        if not got:  # a closed terminal hangs up several times
            got.append(number)
            raise KeyboardInterrupt

    before = {}
    if threading.current_thread() is threading.main_thread():  # elsewhere whoever runs this handles signals
        for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as by nohup
                before[number] = signal.signal(number, terminate)
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("interrupted: the same command continues with the images still missing", err=True)
        raise typer.Exit(128 + (got[0] if got else signal.SIGINT)) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _show(written: list[Written]) -> None:
    import sys

    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in ("steps", "NFE", "images", "drawn now"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("where", overflow="fold")
    for one in written:
        where = str(one.path) + "/" * one.path.is_dir()
        table.add_row(str(one.record["steps"]), str(one.record["nfe"]), f"{one.num:,}", f"{one.drawn:,}", where)
    # Where the output goes to a file, paths are not broken
    Console(width=None if sys.stdout.isatty() else 1000).print(table, highlight=False, markup=False)
