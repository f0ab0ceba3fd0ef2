"""`mmgen cache-latents`: a data set through a VAE, once, for training in its latent space."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import check_device, choose_device
from .progress import progress_bar


def cache_latents(
    data: Annotated[
        str,
        typer.Option(
            help="The images: a hub id such as ILSVRC/imagenet-1k, a folder (parquet, class folders, images, save_to_disk), an "
            "EDM zip or a parquet file."
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="The folder of latents, for `mmgen train-imm --data`. One that is not whole is continued.")
    ],
    vae: Annotated[
        str,
        typer.Option(help="AutoencoderKL or AutoencoderTiny: a folder as diffusers writes it, or a hub id."),
    ] = "stabilityai/sd-vae-ft-ema",
    resolution: Annotated[
        int | None, typer.Option(help="Side to resize and crop the images to, as ADM does. Default: the images' own.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "train",
    image_column: Annotated[str | None, typer.Option(help="Column of the images. Default: the first that holds images.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of the labels. Default: the first that holds classes.")] = None,
    on_corrupt: Annotated[
        str, typer.Option(metavar="stop|skip", help="An image that cannot be decoded stops the command, or is left out.")
    ] = "stop",
    normalisation: Annotated[
        str,
        typer.Option(
            metavar="auto|imm|measure",
            help="Mean and standard deviation of each channel. imm: IMM's constants. measure: those of these latents. auto: imm "
            "for a VAE called sd-vae-ft-ema or sd-vae-ft-mse, else measure.",
        ),
    ] = "auto",
    dtype: Annotated[
        str, typer.Option(metavar="float16|float32", help="Of the numbers on disk; float16 rounds to 11 bits.")
    ] = "float16",
    xflip: Annotated[
        bool, typer.Option("--xflip", help="Encode the mirror image of each as well: twice the disk and time. Default: off.")
    ] = False,
    batch_size: Annotated[int, typer.Option(help="Images that the VAE sees at a time: more need more memory.")] = 32,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="auto: the GPU if there is one.")] = "auto",
) -> None:
    """Encode a data set into latents, once, so that training need not.

    Example: mmgen cache-latents --data imagenet/ --vae stabilityai/sd-vae-ft-ema --resolution 256 --out imagenet256-latents/

    Then: mmgen train-imm --data imagenet256-latents/ --preset imagenet256-imm-xl

    Images are read as they are encoded; never are all of them in memory. The same command continues an interrupted one. With
    several GPUs: accelerate launch -m mmgen cache-latents ...
    """
    check_device(device)

    from ..data.encoding import EncodingSettings, encode_source
    from ..data.resolve import resolve
    from ..system.processes import find_team
    from ..encoders.vae import load_vae

    settings = EncodingSettings(resolution, dtype, xflip, normalisation, on_corrupt, batch_size)
    settings.check()
    team = find_team(cpu=device == "cpu")
    source = resolve(data, split=split, image_column=image_column, label_column=label_column)
    loaded = load_vae(vae, choose_device(device))
    speed = _Speed()
    with progress_bar("encoding", source.length) if team.is_main else contextlib.nullcontext() as update:
        record = encode_source(
            source, loaded, out, settings, word=data, team=team, progress=update and speed.around(update), note=_note
        )
    if team.is_main:
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
        ("disk", f"{size / 1e9:,.3f} GB, {size / record['number']:,.0f} bytes per row"),
        ("encoded now", str(speed)),
    ):
        table.add_row(name, value)
    # Where the output goes to a file, lines are not broken
    console = Console(width=None if sys.stdout.isatty() else 1000)
    console.print(table, highlight=False, markup=False)
    for name in record["skipped"][:3]:
        console.print(f"left out: {name}", highlight=False, markup=False, soft_wrap=True)
    if record["channels"] == 4 and record["size"] == 32:
        console.print(f"next:     mmgen train-imm --data {out} --preset imagenet256-imm-xl", highlight=False, markup=False)
