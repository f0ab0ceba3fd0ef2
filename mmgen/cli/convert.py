"""`mmgen convert` and `mmgen inspect`: other people's checkpoints, read without running any of what is in them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import FLAGS, GUIDE_ALL, HEADS, NUM_CLASSES, TYPE

_WHERE = "A file, a diffusers folder, or a hub repository user/name."
_WEIGHTS = "ema (averaged) or model, where the file has both."
Type = Annotated[str | None, typer.Option(**TYPE)]
Preset = Annotated[str | None, typer.Option(**FLAGS)]
Weights = Annotated[str, typer.Option(metavar="NAME", help=_WEIGHTS)]
Heads = Annotated[int | None, typer.Option(**HEADS)]
NumClasses = Annotated[int | None, typer.Option(**NUM_CLASSES)]
GuideAll = Annotated[bool, typer.Option("--guide-all", **GUIDE_ALL)]


def convert(
    path: Annotated[str, typer.Argument(metavar="IN", help=_WHERE)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="NAME.safetensors, NAME.pt (--to pt) or a folder (--to diffusers).")],
    to: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="mmgen (one .safetensors file and a model card), diffusers (a folder), or pt (the state dict under its "
            "original names).",
        ),
    ] = "mmgen",
    type: Type = None,
    preset: Preset = None,
    heads: Heads = None,
    num_classes: NumClasses = None,
    guide_all: GuideAll = False,
    precision: Annotated[str | None, typer.Option(metavar="TYPE", help="fp32 or fp16. Default: as in IN.")] = None,
    weights: Weights = "ema",
    lora_only: Annotated[bool, typer.Option("--lora-only", help="To diffusers: only the LoRA weights of a student by --lora.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
) -> None:
    """Convert a checkpoint of another project to mmgen's file, or back.

    Reads IMM, EDM, EDM2, ADM, consistency models, DiT, SiT, REPA and diffusers. Nothing in IN is executed: a pickle that
    holds more than tensors is refused. Every tensor is used, or listed with the reason it was left out.

    Example: mmgen convert edm-cifar10-32x32-cond-vp.pkl edm-cifar10.safetensors

    Then: mmgen sample edm-cifar10.safetensors --steps 18
    """
    from ..formats.family import ConvertOptions
    from ..formats.recognise import FAMILIES
    from ..formats.convert import convert_file

    options = ConvertOptions(type, preset, precision, heads, num_classes, guide_all)
    done = convert_file(path, out, options, to=to, weights=weights, overwrite=overwrite, lora_only=lora_only)
    config = done.config
    rows: dict[str, Any] = {
        "family": FAMILIES[done.family].title,
        "draws": f"{config.channels} x {config.resolution} x {config.resolution}"
        + (f", {config.num_classes} classes" if config.num_classes else ", without classes" if config.text is None else ", of a text"),
        "tensors": f"{done.used:,} used, {len(done.left_out):,} left out",
        "left out": [f"{name}: {reason}" for name, reason in done.left_out.items()],
        "assumed": list(done.assumed),
        "sampling": list(done.sampled),
        "written": str(done.out),
    }
    if done.card is not None:
        rows["model card"] = str(done.card)
        rows["next"] = f"mmgen sample {done.out} --num 16 --out grid.png"
    _show(rows)


def inspect(
    path: Annotated[str, typer.Argument(metavar="FILE", help=_WHERE)],
    type: Type = None,
    preset: Preset = None,
    heads: Heads = None,
    num_classes: NumClasses = None,
    guide_all: GuideAll = False,
    weights: Weights = "ema",
) -> None:
    """Show what a file of weights is, what it holds and what mmgen can do with it.

    Nothing in it is executed.

    Example: mmgen inspect edm-cifar10-32x32-cond-vp.pkl
    """
    from ..formats.family import ConvertOptions
    from ..formats.reading import read
    from ..formats.recognise import describe

    options = ConvertOptions(type, preset, None, heads, num_classes, guide_all)
    _show(describe(read(path, weights=weights), options))


def _show(rows: dict[str, Any]) -> None:
    """A line for each row; lists are shortened on a terminal, where thousands of names would hide the rest."""
    from rich.console import Console
    from rich.table import Table

    terminal = sys.stdout.isatty()
    table = Table(show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in rows.items():
        if isinstance(value, list):
            if not value:
                continue
            more = (
                [f"... and {len(value) - 12:,} more: written to a file, this output has them all"]
                if terminal and len(value) > 12
                else []
            )
            value = "\n".join(value[:12] + more if more else value)
        table.add_row(name, f"{value:,}" if isinstance(value, int) else str(value))
    Console(width=None if terminal else 1000).print(table, highlight=False, markup=False)
