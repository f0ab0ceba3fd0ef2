"""Sampling from the command line, for tests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from tiny_model import NAMES, make_model
from typer.testing import CliRunner

from mmgen.cli.sample import sample


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return make_model(folder / "model.safetensors", channels=1, num_classes=10, class_names=NAMES, class_counts=[5] * 10)


@pytest.fixture(scope="module")
def colour_model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "model.safetensors", channels=3)


def run(*arguments) -> str:
    """The command's output; raises what it raises."""
    app = typer.Typer()
    app.command()(sample)
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=True)
    if result.exception is not None:
        raise result.exception
    return result.output


def pixels(folder: Path) -> np.ndarray:
    """[N, H, W] or [N, H, W, C] of the PNG files in a folder, in the order of their names."""
    return np.stack([np.array(Image.open(path)) for path in sorted(folder.glob("*.png"))])


def record(path: Path) -> dict:
    return json.loads(path.read_text())
