"""What the tests of `mmgen fid` share: the command as a function, and pictures to score."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import typer
from PIL import Image
from typer.testing import CliRunner


def run(command, *arguments) -> str:
    """The command's output; raises what it raises."""
    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=True)
    if result.exception is not None:
        raise result.exception
    return result.output


def scores(place: Path) -> list[dict]:
    return json.loads(place.read_text())["scores"]


def write_images(folder: Path, count: int, size: int = 12, seed: int = 0, mean: float = 128) -> np.ndarray:
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    pixels = random.normal(mean, 40, (count, size, size, 3)).clip(0, 255).astype(np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i:05d}.png")
    return pixels.transpose(0, 3, 1, 2)
