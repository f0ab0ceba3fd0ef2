"""Two processes, as `accelerate launch` and torchrun start them, train what one trains."""

import os
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

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
