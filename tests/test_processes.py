"""Two processes, as `accelerate launch` and torchrun start them, train what one trains."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from tiny_inception import write_inception

ROOT = Path(__file__).parents[1]
TRAIN = [
    "-m", "mmgen", "train-imm", "--device", "cpu", "--batch-size", "16", "--batch-per-device", "8", "--max-images", "64",
    "--eval-every", "32", "--preview-every", "32", "--set", "network.model_channels=8", "--set", "network.channel_mult=[1]",
    "--set", "run.eval_num=32", "--set", "run.eval_steps=[1, 2]", "--set", "network.dropout=0.1",
]  # fmt: skip


def launch(cwd, *launcher):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    out = launcher[-1]
    result = subprocess.run(
        [sys.executable, *launcher[:-1], *TRAIN, "--out", out],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return load_file(cwd / out / "model.safetensors"), result


def test_two_processes_train_what_one_trains(tmp_path):
    one, _ = launch(tmp_path, "one")
    two, result = launch(tmp_path, "-m", "torch.distributed.run", "--nproc_per_node", "2", "two")
    assert result.stdout.count("two halves of the data") == 1  # one process speaks
    assert {p.name for p in (tmp_path / "two").iterdir()} == {p.name for p in (tmp_path / "one").iterdir()}
    for key, value in one.items():
        assert (two[key] - value).norm() <= 1e-5 * value.norm() + 1e-8, key


def test_accelerate_launch(tmp_path):
    weights, _ = launch(tmp_path, "-m", "accelerate.commands.launch", "--cpu", "run")
    assert len(weights) > 30


def test_two_processes_score_what_one_scores(tmp_path):
    random = np.random.default_rng(0)
    for name, count in (("a", 45), ("b", 37)):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.fromarray(random.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(tmp_path / name / f"{i:03d}.png")
    write_inception(tmp_path / "network.pt")
    command = ["-m", "mmgen", "fid", "a", "--ref", "b", "--metrics", "fid,kid,is,pr,dc", "--inception", "network.pt", "--batch-size", "8",
               "--repeat", "3", "--device", "cpu"]  # fmt: skip
    figures = []
    for launcher in ([], ["-m", "torch.distributed.run", "--nproc_per_node", "2"]):
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "MMGEN_CACHE": str(tmp_path / f"c{len(launcher)}"),
        }
        result = subprocess.run(
            [sys.executable, *launcher, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("kept in:") == 1  # one process speaks
        figures.append(json.loads((tmp_path / "a" / "scores.json").read_text())["scores"][-1])
    one, two = figures
    assert list(one["figures"]) == list(two["figures"])
    for key in ("figures", "spreads"):
        assert two[key] == pytest.approx(one[key], rel=1e-5)
