"""How long the command line takes to answer, and a model to draw, against a program that imports torch and typer at its top."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from mmgen.config.imm import resolve
from mmgen.config.sections import read_preset
from mmgen.data import load
from mmgen.methods.imm.objective import imm_model_config
from mmgen.models.build import build_model
from mmgen.models.files import save_model

from .measuring import Row, Size, process, temporary_folder

PLAIN = [sys.executable, "-c", "import torch, typer"]


def commands() -> list[str]:
    from mmgen.cli import app

    return [command.name for command in app.registered_commands]


def digits_model() -> str:
    """A file with the digits' model, not trained."""
    config = resolve(read_preset("digits-imm"))
    model = build_model(imm_model_config(config, load("digits").shape))
    save_model(file := temporary_folder() / "model.safetensors", model.config, model.network.state_dict())
    return str(file)


def rows(size: Size, device: str) -> Iterator[Row]:
    """Milliseconds; the ratio is how many times less mmgen needs."""
    model = digits_model()
    helps = {f"mmgen {name} --help": [sys.executable, "-m", "mmgen", name, "--help"] for name in commands()}
    asked = {
        "import mmgen": [sys.executable, "-c", "import mmgen"],
        "mmgen --help": [sys.executable, "-m", "mmgen", "--help"],
        "mmgen sample, 64 digits": [sys.executable, "-m", "mmgen", "sample", model, "--num", "64", "--out", "{folder}"],
        **helps,
    }
    if size == "tiny":
        asked = dict(list(asked.items())[:3])
    repetitions = {"tiny": 1, "quick": 3, "full": 10}[size]
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in ("plain", *asked)}
    for _ in range(repetitions):
        for name, command in {"plain": PLAIN, **asked}.items():
            folder = str(temporary_folder() / "samples")  # a new one each time: images that are there are not drawn again
            runs[name].append(process([part.format(folder=folder) for part in command])[:2])
    least = {name: min(seconds for seconds, _ in found) * 1000 for name, found in runs.items()}
    most = {name: max(mib for _, mib in found) for name, found in runs.items()}
    for name in asked:
        yield Row(name, "ms", least[name], least["plain"], least["plain"] / least[name], most[name], most["plain"])
