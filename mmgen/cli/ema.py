"""`mmgen ema`: averages of the weights of other lengths, made after training."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from .options import home, numbers


def ema(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, of a training with train.ema_lengths.")],
    length: Annotated[
        str,
        typer.Option(metavar="LIST", help="Lengths of the averages, such as 0.05,0.1: standard deviations as fractions of the training."),
    ],
) -> None:
    """Make weight averages of any length after training (EDM2's post-hoc EMA).

    The run must have been trained with --set train.ema_lengths=[0.05,0.1], which keeps snapshots.

    Example: mmgen ema runs/cifar10-teacher --length 0.08

    Then: mmgen sample runs/cifar10-teacher --ema posthoc0.08

    Several lengths, scored: mmgen fid runs/cifar10-teacher --ema-lengths 0.05,0.1,0.15
    """
    from ..models.post_hoc import make_average
    from .tables import show, table_of

    made = [make_average(home(run), one) for one in numbers(length, float, "--length", "0.05,0.1")]
    table = table_of("average", "file", "images", "snapshots", "profile error")
    for one in made:
        table.add_row(one.name, str(one.file), f"{one.images:,}", str(one.snapshots), f"{one.error:.2%}")
    show(table)
    show(f"next: mmgen sample {shlex.quote(str(run))} --ema {made[0].name}")
