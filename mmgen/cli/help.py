"""Help in plain text, grouped, for 80 columns; and wrong usage as one sentence, like every other error.

Every command of the command line is a `Command` and the command line itself a `Group`. An option's group is its
`rich_help_panel`. The text of a command is its docstring: paragraphs are wrapped, indented lines are shown as they are.
"""

from __future__ import annotations

import shutil
import textwrap
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from ..errors import ConfigError

WIDEST = 80  # columns, also where the terminal has more
_NAMES = 24  # columns of an option's name; longer names have a line of their own
_OTHER = "Options"  # the group of options without one


class Command(TyperCommand):
    """A command with help in plain text."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        arguments, options = _parameters(self, ctx)
        usage = " ".join([ctx.command_path, *(name for name, _ in arguments), "[OPTIONS]"])
        sections = {"Arguments": arguments} if arguments else {}
        _write(formatter, usage, self.help, sections | options)


class Group(TyperGroup):
    """The command line: the list of commands as help in plain text, and ConfigError for wrong usage."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        commands = [(name, _first_sentence(command.help)) for name, command in self.commands.items()]
        _, options = _parameters(self, ctx)
        _write(formatter, f"{ctx.command_path} COMMAND [OPTIONS]", self.help, {"Commands": commands} | options, self.epilog)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args:
            typer.echo(ctx.get_help())
            ctx.exit()
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None

    def main(self, *args: Any, standalone_mode: bool = True, **more: Any) -> Any:
        """As click's, but wrong usage raises ConfigError."""
        try:
            status = super().main(*args, standalone_mode=False, **more)
        except Exception as error:
            if not hasattr(error, "format_message"):  # click's errors have it, also those of the copy of click in typer
                raise
            raise ConfigError(_usage_sentence(error)) from None
        if not standalone_mode:
            return status
        raise SystemExit(status if isinstance(status, int) else 0)


def _usage_sentence(error: Any) -> str:
    parameter = getattr(error, "param", None)
    if isinstance(error, typer.BadParameter) and parameter is not None and "Missing" not in type(error).__name__:
        name = parameter.opts[-1] if parameter.param_type_name == "option" else parameter.metavar
        sentence = f"{name}: {error.message}"
    else:
        sentence = " ".join(error.format_message().split())
        sentence = sentence[:1].lower() + sentence[1:]
    context = getattr(error, "ctx", None)
    more = f"; see {context.command_path} --help" if context is not None else ""
    return sentence.rstrip(".") + more


def _parameters(command: Any, ctx: Any) -> tuple[list[tuple[str, str]], dict[str, list[tuple[str, str]]]]:
    """(name, help) of the arguments, and of the options of each group, the group without a name last."""
    arguments, groups = [], {}
    for parameter in command.get_params(ctx):
        if getattr(parameter, "hidden", False):
            continue
        if parameter.param_type_name == "argument":
            arguments.append((parameter.metavar or parameter.name.upper(), parameter.help or ""))
        else:
            group = getattr(parameter, "rich_help_panel", None) or _OTHER
            groups.setdefault(group, []).append((_option_name(parameter), _option_help(parameter)))
    if _OTHER in groups:
        groups[_OTHER] = groups.pop(_OTHER)
    return arguments, groups


def _option_name(parameter: Any) -> str:
    names = ", ".join([*sorted(parameter.opts, key=len), *parameter.secondary_opts])
    if parameter.is_flag:
        return names
    return f"{names} {parameter.metavar or 'VALUE'}"


def _option_help(parameter: Any) -> str:
    text, default = parameter.help or "", parameter.default
    if parameter.is_flag or default is None or not isinstance(default, str | int | float) and not hasattr(default, "parts"):
        return text
    return f"{text} Default: {default}."


def _first_sentence(text: str | None) -> str:
    paragraph = " ".join((text or "").split("\n\n")[0].split())
    return paragraph.split(". ")[0].split(" (arXiv")[0].rstrip(".")


def _write(formatter: Any, usage: str, text: str | None, sections: dict[str, list[tuple[str, str]]], end: str | None = None) -> None:
    width = min(WIDEST, max(shutil.get_terminal_size((WIDEST, 24)).columns, 40))
    lines = _wrapped(f"Usage: {usage}", width, "       ") + [""]
    for paragraph in (text or "").split("\n\n"):
        verbatim = paragraph.startswith(" ")
        lines += [*(paragraph.splitlines() if verbatim else _wrapped(" ".join(paragraph.split()), width)), ""]
    for title, rows in sections.items():
        lines += [*_wrapped(f"{title}:", width), *(line for name, told in rows for line in _row(name, told, width)), ""]
    formatter.write("\n".join(lines + ([end] if end else [])).rstrip() + "\n")


def _row(name: str, text: str, width: int) -> list[str]:
    """An option's name and, beside it, its text."""
    beside = _wrapped(text, width - _NAMES - 2) or [""]
    head = f"  {name}"
    first = [head] if len(head) > _NAMES else []
    if not first:
        first, beside = [f"{head:{_NAMES + 2}}{beside[0]}".rstrip()], beside[1:]
    return first + [" " * (_NAMES + 2) + line for line in beside if line]


def _wrapped(text: str, width: int, indent: str = "") -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
