"""`--data photos/` with nothing else: a preset is chosen by the images, announced, and trains."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_cli import mmgen
from typer.testing import CliRunner

from mmgen.cli import app
from mmgen.config import imm, teacher
from mmgen.config.sections import read_preset
from mmgen.data.survey import survey
from mmgen.errors import DataError
from mmgen.methods import timing

QUICK = ["--set", "network.model_channels=8", "--set", "network.num_blocks=1", "--batch-size", "8", "--batch-per-device", "8",
         "--max-images", "16", "--eval-num", "0", "--set", "run.eval_steps=[1]", "--device", "cpu"]  # fmt: skip


def photos(folder: Path, side: int = 40, classes: tuple[str, ...] = ("cat", "dog"), count: int = 6) -> Path:
    for i in range(count):
        file = folder / classes[i % len(classes)] / f"{i}.jpg" if classes else folder / f"{i}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (side, side + 7 * (i % 2), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file)
    return folder


def test_a_survey(own_cache):
    found = survey(str(photos(Path("photos"), side=40)))
    assert (found.images, found.side, found.classes) == (6, 40, 2)
    assert survey(str(photos(Path("flat"), classes=()))).classes == 0
    photos(Path("flat"), classes=(), count=3)
    Path("flat/0.jpg").write_bytes(b"no image")  # one of them damaged
    assert survey("flat").side == 40
    Path("bad").mkdir()
    Path("bad/0.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="none of the first images of bad"):
        survey("bad")


@pytest.mark.parametrize("command, config", [("imm", imm), ("teacher", teacher)])
@pytest.mark.parametrize("size", [32, 64])
def test_the_presets(command, config, size):
    found = config.resolve(read_preset(f"own{size}-{command}", f"train-{command}"))
    assert found.data.resolution == size and found.train.batch_size == 256 and found.data.augment > 0


@pytest.fixture
def untimed(monkeypatch):
    """The command line in this process; a dry run makes no steps of these networks."""
    monkeypatch.setattr(timing, "MOST_SECONDS", 0.0)
    return lambda *arguments: CliRunner().invoke(app, arguments)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train-imm", "train-teacher"])
@pytest.mark.parametrize("side, size", [(28, 32), (40, 32), (50, 64), (300, 64)])
def test_the_preset_suits_the_images(command, side, size, own_cache, untimed):
    photos(Path("photos"), side)
    result = untimed(command, "--data", "photos/", "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert f"photos/: 6 images, 2 classes, about {side} pixels: preset own{size}-{command[6:]}, for {size}x{size} pixels and with class " \
        "labels; another with --preset" in result.stderr.replace("\n", " ")  # fmt: skip
    assert f"{size} x {size} x 3, 2 classes used" in result.stdout


@pytest.mark.slow
def test_it_trains_and_what_is_typed_counts(own_cache, untimed):
    photos(Path("photos"), 40)
    result = mmgen("train-imm", "--data", "photos/", *QUICK, "--out", "run", cwd=Path.cwd())
    assert result.returncode == 0, result.stderr
    assert Path("run/model.safetensors").is_file() and Path("run/samples.png").is_file()
    assert 3 <= len([line for line in result.stderr.splitlines() if not line.startswith("{")]) <= 6  # a short summary
    result = untimed("train-imm", "--data", "photos/", "--unconditional", "--resolution", "64", "--dry-run")
    assert "preset own64-imm, for 64x64 pixels; another" in result.stderr.replace("\n", " ") and "no classes used" in result.stdout
    photos(Path("flat"), classes=())
    result = untimed("train-imm", "--data", "flat", "--dry-run")
    assert result.exit_code == 0 and "no classes, about 40 pixels: preset own32-imm" in result.stderr.replace("\n", " ")


@pytest.mark.slow
def test_verbose_shows_all_settings(own_cache):
    arguments = ("train-imm", "--set", "loss.k=12", "--max-images", "1", *QUICK[4:8], "--device", "cpu", "--eval-num", "0")
    shown = mmgen(*arguments, "--verbose", "--out", "a", cwd=Path.cwd()).stderr
    assert "mapping=eta" in shown and "* differs from the preset" in shown
    shown = mmgen(*arguments, "--out", "b", cwd=Path.cwd()).stderr
    assert "mapping=eta" not in shown and "changed: loss.k=12" in shown
