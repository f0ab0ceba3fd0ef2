"""`mmgen cache-latents`: a data set through a VAE, once, for training in its latent space."""

from __future__ import annotations

import contextlib
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from .options import COUNT, DEVICE
from ..system.devices import check_device, find_device
from .progress import progress_bar

DEFAULT_VAE = "stabilityai/sd-vae-ft-ema"


def cache_latents(
    data: Annotated[
        str,
        typer.Option(
            metavar="DATA",
            help="The images: a folder, a zip or parquet file, or a hub dataset such as ILSVRC/imagenet-1k. Required.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the latents; an unfinished one is continued. Required.")],
    vae: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help=f"AutoencoderKL, -Tiny or -DC: a diffusers folder or a hub id. Default: {DEFAULT_VAE}."
        ),
    ] = None,
    pipeline: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Text-to-image pipeline of diffusers, or its hub id: its VAE and scaling, and captions by its encoders.",
        ),
    ] = None,
    resolution: Annotated[
        int | None, typer.Option(**COUNT, help="Resize and crop to N x N, as ADM does. Default: the images' own.")
    ] = None,
    split: Annotated[str, typer.Option(metavar="NAME", help="Split of the dataset.")] = "train",
    image_column: Annotated[str | None, typer.Option(metavar="NAME", help="Column of the images. Default: the first one.")] = None,
    label_column: Annotated[str | None, typer.Option(metavar="NAME", help="Column of the labels. Default: the first one.")] = None,
    text: Annotated[bool, typer.Option("--text", help="Keep captions too; --pipeline does so anyway.")] = False,
    caption_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="Column of the captions. Default: as usual.")
    ] = None,
    captions: Annotated[
        str | None, typer.Option(metavar="FILE", help="COCO's JSON, or rows with file_name.")
    ] = None,
    subset: Annotated[
        str | None, typer.Option(metavar="NAME", help="One of several data sets in a repository. Default: its own.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(metavar="NAME", help="Branch, tag or commit of a hub dataset. Default: main.")
    ] = None,
    follow_links: Annotated[
        bool, typer.Option("--follow-links", help="Also follow links that lead out of the folder.")
    ] = False,
    on_corrupt: Annotated[str, typer.Option(metavar="NAME", help="Damaged images: stop or skip.")] = "stop",
    normalisation: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Mean and deviation per channel: imm (IMM's constants), measure (of these latents), or auto (imm for "
            "sd-vae-ft-ema and sd-vae-ft-mse, else measure).",
        ),
    ] = "auto",
    dtype: Annotated[str, typer.Option(metavar="TYPE", help="Numbers on disk: float16 or float32.")] = "float16",
    xflip: Annotated[bool, typer.Option("--xflip", help="Also encode mirror images: twice the disk and time.")] = False,
    batch_size: Annotated[int, typer.Option(**COUNT, help="Images at a time: fewer need less memory.")] = 32,
    device: Annotated[str, typer.Option(**DEVICE)] = "auto",
) -> None:
    """Encode a data set into latents, once, for training.

    The same command continues an interrupted one. On several GPUs: accelerate launch -m mmgen cache-latents ...

    Example: mmgen cache-latents --data imagenet/ --resolution 256 --out latents/

    Then: mmgen train-imm --data latents/ --preset imagenet256-imm-xl

    With captions: mmgen cache-latents --data shards/ --pipeline SD15 --resolution 512 --out laion512/
    """
    check_device(device)
    if pipeline is not None and vae is not None:
        raise ConfigError("--pipeline brings its own VAE: leave --vae out")
    for name, value in (("--caption-column", caption_column), ("--captions", captions)):
        if value is not None and not (text or pipeline):
            raise ConfigError(f"{name} needs captions to be kept: give --pipeline, or --text")

    from ..data.encoding import EncodingSettings, encode_source
    from ..data.resolve import resolve
    from ..system.processes import find_process_group
    from ..encoders.pipeline import pipeline_parts
    from ..encoders.vae import load_vae

    settings = EncodingSettings(resolution, dtype, xflip, normalisation, on_corrupt, batch_size, text or pipeline is not None)
    settings.check()
    process_group = find_process_group(cpu=device == "cpu")
    reading = {"split": split, "image_column": image_column, "label_column": label_column, "subset": subset,
               "revision": revision, "follow_links": follow_links, "caption_column": caption_column, "captions": captions}  # fmt: skip
    source = resolve(data, **reading)
    where = find_device(device)
    parts = None if pipeline is None else pipeline_parts(pipeline, resolution or 0)
    loaded = load_vae(pipeline or vae or DEFAULT_VAE, where)
    speed = _Speed()
    with progress_bar("encoding", source.length) if process_group.is_main else contextlib.nullcontext() as update:
        record = encode_source(
            source, loaded, out, settings, name=data, reading={key: value for key, value in reading.items() if value},
            pipeline=parts, device=str(where), process_group=process_group, progress=update and speed.around(update), note=_note,
        )  # fmt: skip
    if process_group.is_main:
        _show(record, out, speed)


class _Speed:
    """How many images were encoded now, and how long that took."""

    def __init__(self) -> None:
        self.first = self.last = None

    def around(self, update: Any) -> Any:
        def progress(done: int, total: int) -> None:
            self.last = done, time.monotonic()
            self.first = self.first or self.last
            update(done, total)

        return progress

    def __str__(self) -> str:
        if self.first is None or self.last[0] == self.first[0]:
            return "nothing, all was there"
        images, seconds = (b - a for a, b in zip(self.first, self.last, strict=True))
        return f"{images:,} images in {seconds:,.1f} s, {images / max(seconds, 1e-9):,.1f} a second"


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def _show(record: dict[str, Any], out: Path, speed: _Speed) -> None:
    from rich.console import Console
    from rich.table import Table

    tried, latents = record["reconstruction"], record["latents"]
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    table = Table(show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in (
        ("latents", record["description"]),
        ("VAE", f"{latents['vae']}, SHA-256 {latents['vae_sha256']}"),
        ("mean", ", ".join(f"{value:.4f}" for value in latents["mean"])),
        ("standard deviation", ", ".join(f"{value:.4f}" for value in latents["std"]) + f", brought to {latents['target_std']:g}"),
        (
            "through the VAE and back",
            f"{tried['rmse']:.2f} grey levels RMS"
            + ("" if tried["psnr"] is None else f", PSNR {tried['psnr']:.2f} dB")
            + f" (first {tried['images']} images)",
        ),
        ("rounding to " + record["dtype"], f"{tried['rounding'] or 0:.1g} of the latents' standard deviation"),
        *([] if "text" not in record else [("captions", _captions(record["text"]))]),
        ("disk", f"{size / 1e9:,.3f} GB, {size / record['number']:,.0f} bytes per row"),
        ("encoded now", str(speed)),
    ):
        table.add_row(name, value)
    # Where the output goes to a file, lines are not broken
    console = Console(width=None if sys.stdout.isatty() else 1000)
    console.print(table, highlight=False, markup=False)
    for name in record["skipped"][:3]:
        console.print(f"left out: {name}", highlight=False, markup=False, soft_wrap=True)
    if (record.get("text") or {}).get("settings"):
        path = record["text"]["settings"]["encoder"]
        console.print(f"next:     mmgen distill --teacher {shlex.quote(path)} --data {shlex.quote(str(out))}", highlight=False, markup=False)
    elif record["channels"] == 4 and record["size"] == 32:
        console.print(f"next:     mmgen train-imm --data {out} --preset imagenet256-imm-xl", highlight=False, markup=False)


def _captions(text: dict[str, Any]) -> str:
    number, settings = f"{text['captions']:,}", text["settings"]
    if settings is None:
        return number
    how = f"{settings['length']} tokens by the encoders of {settings['pipeline']}"
    return f"{number}, {how}" if text["features"] else f"{number}, to become {how} while training"
