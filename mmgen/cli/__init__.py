"""The command line: one module per subcommand. Options in, one library call, a result shown. No mathematics here.

Nothing in these modules imports torch before a command runs, so that `mmgen --help` answers at once.
"""

from __future__ import annotations

import typer

from .. import __version__
from ..methods import METHODS
from . import cache_latents, compare, convert, ema, fid, neon, push, sample
from .help import Command, Group
from .training import training_command

app = typer.Typer(
    name="mmgen",
    help="Few-step image generators by moment matching: train, sample, measure.",
    epilog="Start with: mmgen train-imm   (minutes, on real images that come with mmgen)",
    cls=Group,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    # Without a default of its own for --help, typer loads pydantic (a tenth of a second) to find out that None is none
    context_settings={"help_option_names": ["-h", "--help"], "default_map": {"help": False}},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mmgen {__version__}")
        raise typer.Exit


@app.callback()
def _mmgen(
    version: bool = typer.Option(False, "--version", help="Show the version and exit.", callback=_show_version, is_eager=True),
) -> None:
    pass


COMMANDS = {
    **{name: training_command(method) for name, method in METHODS.items()},
    "sample": sample.sample, "fid": fid.fid, "convert": convert.convert, "inspect": convert.inspect,
    "cache-latents": cache_latents.cache_latents, "ema": ema.ema, "push": push.push, "compare": compare.compare,
    "neon": neon.neon,
}  # fmt: skip
for name, function in COMMANDS.items():
    app.command(name, cls=Command)(function)
