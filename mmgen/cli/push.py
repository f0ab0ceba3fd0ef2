"""`mmgen push`: a model to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def push(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run folder such as runs/digits-imm, or a model file.", show_default=False)
    ],
    repository: Annotated[
        str, typer.Argument(metavar="USER/NAME", help="The hub repository; made if it is not there.", show_default=False)
    ],
    private: Annotated[bool, typer.Option("--private", help="Make it a private one. Default: public.")] = False,
    message: Annotated[str | None, typer.Option(help="Of the commit. Default: the file's name.")] = None,
) -> None:
    """Upload a model to the Hugging Face hub, with a model card and the pictures of its run.

    Example: mmgen push runs/digits-imm user/digits-imm --private

    Anyone it is shared with samples from it with: mmgen sample hf://user/digits-imm

    Needs a token with write access: hf auth login
    """
    from ..report.push import push as upload

    done = upload(run, repository, private=private, message=message)
    typer.echo(f"{done.url}: {', '.join(done.files)}")
    if done.kept_card:
        typer.echo("The README.md that is there was kept; one beside the model would replace it.")
    typer.echo(f"mmgen sample hf://{repository.removeprefix('hf://')}")
