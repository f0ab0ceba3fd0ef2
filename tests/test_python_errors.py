"""Errors of the Python API speak of its arguments and settings; the command's options stand in brackets."""

from __future__ import annotations

import re

import numpy as np
import pytest
from PIL import Image
from tiny_model import make_model

import mmgen
from mmgen.errors import ConfigError, MmgenError, in_python


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Images that are not square, a damaged one, a folder of something else, models without classes."""
    folder = tmp_path_factory.mktemp("place")
    rng = np.random.default_rng(0)
    for name, shape in (("wide", (8, 16, 3)), ("square", (8, 8, 3)), ("damaged", (8, 8, 3)), ("columns", (8, 8, 3))):
        (folder / name).mkdir()
        for i in range(3):
            Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / name / f"{i}.png")
    (folder / "damaged/1.png").write_bytes((folder / "damaged/1.png").read_bytes()[:90])
    (folder / "other").mkdir()
    (folder / "other/notes.txt").write_text("mine")
    make_model(folder / "model.safetensors", channels=1, num_classes=10)
    return folder


SMALL = {"train.max_images": 8, "train.batch_size": 8, "network.model_channels": 8}
NO_LABELS = {"data.conditional": False}
CALLS = {
    "data.resolution (--resolution)": lambda at: mmgen.train_imm(at / "wide", preset="digits-imm", settings=NO_LABELS, progress=False, out=at / "a"),
    "data.on_corrupt (--on-corrupt)": lambda at: mmgen.train_imm(at / "damaged", preset="digits-imm", settings=SMALL | NO_LABELS, progress=False, out=at / "b"),
    "data.conditional=False (--unconditional)": lambda at: mmgen.train_imm(
        at / "square", preset="digits-imm", settings=SMALL, progress=False, out=at / "c"
    ),
    "another out (--out)": lambda at: mmgen.train_imm("digits", settings=SMALL, progress=False, out=at / "other"),
    "data.image_column (--image-column)": lambda at: mmgen.train_imm(at / "columns", settings={"data.image_column": "x"}, progress=False),
    "max_time (--max-time)": lambda at: mmgen.train_teacher("digits", max_time="2"),
    "device (--device)": lambda at: mmgen.train_teacher("digits", device="cuda:1"),
    "teacher (--teacher)": lambda at: mmgen.distill(""),
    "ref (--ref)": lambda at: mmgen.fid(at / "square"),
    "mode (--mode)": lambda at: mmgen.fid(at / "square", ref=at / "square", features="pixels", mode="tf"),
    "repeat (--repeat)": lambda at: mmgen.fid(at / "square", ref=at / "square", features="pixels", metrics="kid", repeat=2),
    "overwrite (--overwrite)": lambda at: mmgen.convert(at / "model.safetensors", at / "model.safetensors"),
    "to (--to)": lambda at: mmgen.convert(at / "model.safetensors", at / "x.safetensors"),
    "images (--images) must be positive": lambda at: mmgen.neon(at / "model.safetensors", images=0),
    "weight (--weight) must be a number": lambda at: mmgen.neon(at / "model.safetensors", weight=float("nan")),
    "out (--out) is a folder": lambda at: mmgen.neon(at / "model.safetensors", out=at / "better.safetensors"),
    "device (--device) cpu": lambda at: mmgen.load(at / "model.safetensors", device="cuda:5"),
}


@pytest.mark.parametrize("words", CALLS)
def test_arguments_and_settings_are_named(words, place, own_cache, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(MmgenError) as refused:
        CALLS[words](place)
    text = str(refused.value)
    assert words in text, text
    assert not re.search(r"(?<!\()--[a-z]", re.sub("`[^`]*`", "", text)), text


def test_commands_stay_as_they_are_and_nothing_is_named_twice():
    with pytest.raises(ConfigError) as refused, in_python(), in_python({"out": "folder"}):
        raise ConfigError("run `mmgen fid a --out b` with --out c or --follow-links, and torch's --image_size")
    assert str(refused.value) == (
        "run `mmgen fid a --out b` with folder (--out) c or follow_links (--follow-links), and torch's --image_size"
    )
