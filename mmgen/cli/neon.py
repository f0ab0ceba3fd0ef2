"""`mmgen neon`: a trained generator, led away from what training on its own samples does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..system.devices import check_device
from .options import COUNT, DEVICE, NUMBER


def neon(
    model: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or a model file of one.")],
    weight: Annotated[float, typer.Option(**NUMBER, help="w of the extrapolation; 0 is the model as it is.")] = 1.0,
    num: Annotated[int, typer.Option(**COUNT, help="Samples to draw and train on.")] = 10_000,
    steps: Annotated[int | None, typer.Option(**COUNT, help="Their steps. Default: IMM 8, others their own.")] = None,
    images: Annotated[int, typer.Option(**COUNT, help="Images to train on.")] = 20_000,
    lr: Annotated[float, typer.Option(**NUMBER, help="Learning rate of that training, constant.")] = 1e-5,
    ema: Annotated[str | None, typer.Option(metavar="NAME", help="Another weight average of the run, such as 0.9999.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Default: neon in the run's folder.")] = None,
    device: Annotated[str, typer.Option(**DEVICE)] = "auto",
) -> None:
    """Improve a trained model by Neon (arXiv:2510.03597), without new data.

    The model is trained for a moment on its own samples; its weights are then led away from what that did. Another --weight uses the
    same samples and training: compare a few by their scores. Students want less of it, and some none.

    Example: mmgen neon runs/digits-imm --weight 0.5
    """
    from ..methods.neon import NeonSettings, place
    from ..methods.neon import neon as improve
    from .training import is_main
    from .training_report import TrainingReport

    check_device(device, numbered=False)
    file, folder = place(model, ema, out)
    report = TrainingReport(visible=is_main())
    try:
        written, outcome = improve(file, folder, NeonSettings(weight, num, steps, images, lr), report, device)
    finally:
        report.stop()
    if not outcome.finished:
        typer.echo("interrupted: the same command goes on", err=True)
        raise typer.Exit(128 + (outcome.signal or 0))
    if is_main():
        typer.echo(f"model:  {written}")
        typer.echo(f"next:   mmgen fid {written}")
