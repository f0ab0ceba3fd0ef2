"""How long the command line takes to answer, against a program that imports torch and typer at its top."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from .measuring import Row, Size, process

PLAIN = [sys.executable, "-c", "import torch, typer"]


def commands() -> list[str]:
    from mmgen.cli import app

    return [command.name for command in app.registered_commands]


def rows(size: Size, device: str) -> Iterator[Row]:
    """Milliseconds; the ratio is how many times less mmgen needs."""
    helps = {f"mmgen {name} --help": [sys.executable, "-m", "mmgen", name, "--help"] for name in commands()}
    asked = {
        "import mmgen": [sys.executable, "-c", "import mmgen"],
        "mmgen --help": [sys.executable, "-m", "mmgen", "--help"],
        **helps,
    }
    if size == "tiny":
        asked = dict(list(asked.items())[:2])
    repetitions = {"tiny": 1, "quick": 3, "full": 10}[size]
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in ("plain", *asked)}
    for _ in range(repetitions):
        for name, command in {"plain": PLAIN, **asked}.items():
            runs[name].append(process(command)[:2])
    least = {name: min(seconds for seconds, _ in found) * 1000 for name, found in runs.items()}
    most = {name: max(mib for _, mib in found) for name, found in runs.items()}
    for name in asked:
        yield Row(name, "ms", least[name], least["plain"], least["plain"] / least[name], most[name], most["plain"])
