"""The README's commands run, one after the other as they are written, with settings small enough for a test."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from original_files import write_edm_pickle
from test_documents import LAUNCHERS, ROOT, fenced
from tiny_vae import write_images
from typer.testing import CliRunner

import mmgen
from mmgen.cli import app
from mmgen.formats import edm
from mmgen.models.config import ModelConfig
from mmgen.models.denoiser import Denoiser, DenoiserSettings
from mmgen.networks import UNetSettings

pytestmark = pytest.mark.slow

README = (ROOT / "README.md").read_text()
HUB = "mmgen push", "mmgen sample hf://"  # need the hub: see test_push
CPU = ["--device", "cpu"]
TRAIN = [*CPU, "--batch-size", "8", "--max-images", "16", "--eval-num", "0",
         "--set", "run.batch_per_device=8", "--set", "run.eval_steps=[1,2]"]  # fmt: skip
NARROW = ["--set", "network.model_channels=8", "--set", "network.channel_mult=[1]", "--set", "network.num_blocks=1",
          "--set", "network.attn_resolutions=[]", "--set", "train.precision=fp32"]  # fmt: skip
SMALL = {
    "train-imm": [*TRAIN, *NARROW],
    "train-teacher": [*TRAIN, *NARROW],
    "distill": [*TRAIN, "--teacher-steps", "2", "--precision", "fp32"],
    "sample": [*CPU, "--num", "20"],
    "fid": [*CPU, "--num", "20"],
    "compare": [*CPU, "--num", "4"],
}


def edm_pickle(path: Path) -> None:
    """A file like EDM's for CIFAR-10, with a narrow network of random weights."""
    network = UNetSettings(model_channels=16, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(), dropout=0.1)
    config = ModelConfig(network, None, resolution=32, channels=3, num_classes=10, denoiser=DenoiserSettings("edm"))
    torch.manual_seed(0)
    tensors = edm.original_state(replace(config, data="cifar10"), Denoiser(config).network.state_dict())
    given = {"img_resolution": 32, "img_channels": 3, "label_dim": 10, "model_type": "SongUNet", "model_channels": 16,
             "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [], "dropout": 0.1}  # fmt: skip
    write_edm_pickle(path, tensors, init_kwargs=given)


def written() -> list[list[str]]:
    """Arguments of the commands in the README's blocks, without the launcher of several processes."""
    lines = [re.sub(f"^{LAUNCHERS}", "", line) for block in fenced(README, "bash") for line in block.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("mmgen ") and not line.startswith(HUB)]


def small(arguments: list[str]) -> list[str]:
    """The command with less to do; where the run's folder would have another name for that, with the one that the README uses."""
    name = arguments[0]
    if "--dry-run" in arguments:
        return arguments
    added = list(SMALL.get(name, []))
    if name.startswith("train") and "--out" not in arguments:
        given = dict(pairwise(arguments))
        preset = given.get("--preset") or f"{given.get('--data', 'digits').strip('/')}-{name.removeprefix('train-')}"
        added += ["--out", f"runs/{preset}"]
    if "--batch-per-device" in arguments:
        added += ["--out", "runs/auto"]
    return [*("1,2" if one == "1,2,4,8" else one for one in arguments), *added]


def test_the_commands_run(own_cache, tmp_path, monkeypatch, published):
    monkeypatch.setenv("MMGEN_DATA_DIR", str(tmp_path / "sets"))
    monkeypatch.setenv("MMGEN_INCEPTION", str(published))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_images(tmp_path / "sets/cifar10", per_class=4, side=32, classes=10)
    write_images(tmp_path / "sets/user/name", per_class=4, side=70, classes=2)
    write_images(tmp_path / "photos", per_class=4, side=40, classes=2)
    edm_pickle(tmp_path / "edm-cifar10-32x32-cond-vp.pkl")
    ran = []
    for arguments in written():
        if "latents/" in arguments:
            continue  # test_printed_commands encodes latents and trains on them
        if arguments[0] == "compare":
            for run in ("run-a", "run-b"):
                invoke(["sample", "runs/digits-imm", "--out", f"{run}/samples", "--num", "4", *CPU])
        invoke(small(arguments))
        ran.append(arguments[0])
    assert {"train-imm", "train-teacher", "distill", "sample", "fid", "inspect", "convert", "compare"} <= set(ran) and len(ran) > 15
    small_settings = {"train.batch_size": 8, "train.max_images": 16, "run.eval_num": 0, "run.batch_per_device": 8, "run.eval_steps": [1],
                      "network.model_channels": 8, "network.channel_mult": [1], "network.attn_resolutions": []}  # fmt: skip
    train = mmgen.train_imm
    monkeypatch.setattr(mmgen, "train_imm", lambda data, settings: train(data, settings={**settings, **small_settings}, device="cpu"))
    for block in fenced(README, "python"):
        exec(compile(block, "README.md", "exec"), {})
    assert Path("photo.png").exists() and Path("3.png").exists()


def invoke(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, f"mmgen {shlex.join(arguments)}: {result.output}\n{result.exception!r}"
