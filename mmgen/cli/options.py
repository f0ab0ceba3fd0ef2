"""What several subcommands understand alike: counts and numbers, lists of them, devices."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeVar

import typer

from ..errors import ConfigError, shortened

Place = TypeVar("Place", str, Path, None)


def _count(value: Any) -> int:
    from ..system.schema import parse_count

    number = parse_count(str(value))
    if number is None:
        raise typer.BadParameter(f"must be a whole number, such as 500, 64k, 1M or 64Ki, not {shortened(value)}")
    return number


def _number(value: Any) -> float:
    try:
        number = float(value)
        if abs(number) < float("inf"):
            return number
    except ValueError:
        pass
    raise typer.BadParameter(f"must be a number, such as 0.5 or 2e-4, not {shortened(value)}")


# What an option for a whole number and for a decimal number is made with: typer.Option(**COUNT, help=...)
COUNT: dict[str, Any] = {"parser": _count, "metavar": "N"}
NUMBER: dict[str, Any] = {"parser": _number, "metavar": "X"}
DEVICE: dict[str, Any] = {"metavar": "NAME", "help": "auto (a GPU if any), cpu, cuda or cuda:N."}
PRECISION: dict[str, Any] = {"metavar": "TYPE", "help": "fp32, tf32, bf16 or fp16. Default: as the weights."}

# What a checkpoint of another project may not say of itself, as `formats.family.ConvertOptions` has it
TYPE: dict[str, Any] = {"metavar": "NAME", "help": "sit, dit or repa, where tensors do not tell."}
FLAGS: dict[str, Any] = {"metavar": "NAME", "help": "ADM, consistency models: the published flags."}
HEADS: dict[str, Any] = {**COUNT, "help": "DiT and its kin: attention heads."}
NUM_CLASSES: dict[str, Any] = {**COUNT, "help": "DiT and its kin: classes, without the null."}
GUIDE_ALL: dict[str, Any] = {"help": "DiT, SiT: guide all channels, not three."}


def numbers(text: str, kind: type, option: str, example: str) -> list:
    """Numbers separated by commas, without repetitions. Raises ConfigError."""
    from ..system.schema import parse_count

    try:
        found = [parse_count(part) if kind is int else kind(part) for part in text.split(",")]
        if None in found:
            raise ValueError
        return list(dict.fromkeys(found))
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise ConfigError(f"{option} must be {what} separated by commas, such as {example}, not {shortened(text)}") from None


def sigma_interval(text: str | None, option: str) -> tuple[float, ...] | None:
    """LOW,HIGH as two numbers; None where it is not given. Raises ConfigError."""
    return None if text is None else tuple(numbers(text, float, option, "0.3,5"))


def home(path: Place) -> Place:
    """A name or path with ~ at its start read as the home folder: shells leave it as it is in --option=~/file."""
    if path is None or not str(path).startswith("~"):
        return path
    return type(path)(os.path.expanduser(path))
