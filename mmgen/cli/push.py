"""`mmgen push`: a model to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def push(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run folder such as runs/digits-imm, or a model file.")
    ],
    repository: Annotated[
        str, typer.Argument(metavar="USER/NAME", help="The hub repository; created if it does not exist.")
    ],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    message: Annotated[str | None, typer.Option(metavar="TEXT", help="Commit message. Default: the file's name.")] = None,
) -> None:
    """Upload a model to the Hugging Face hub, with a model card and pictures.

    Needs a token with write access: hf auth login

    Example: mmgen push runs/digits-imm user/digits-imm --private

    Then, for everyone: mmgen sample hf://user/digits-imm
    """
    from ..report.push import push as upload

    done = upload(run, repository, private=private, message=message)
    typer.echo(f"{done.url}: {', '.join(done.files)}")
    if done.kept_card:
        typer.echo("The README.md of the repository was kept; one beside the model replaces it.")
    typer.echo(f"mmgen sample hf://{repository.removeprefix('hf://')}")
