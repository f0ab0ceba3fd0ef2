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
from tiny_model import make_denoiser

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


TINY = ["--set", "network.model_channels=8", "--set", "network.channel_mult=[1]", "--set", "network.dropout=0.1"]
DISTILL = [
    "distill", "--teacher", "teacher.safetensors", "--teacher-steps", "0", "--lr", "1e-3", "--set", "optimizer.warmup_images=16",
]  # fmt: skip
METHODS = {
    "imm": ["train-imm", *TINY],
    "teacher": ["train-teacher", *TINY],
    "alternating": [*DISTILL, "--method", "alternating"],
    "instant": [*DISTILL, "--method", "instant"],
}


def relative_difference(found: Path, expected: Path) -> float:
    """Of all tensors of two files together: the norm of the difference over the norm."""
    found, expected = load_file(found), load_file(expected)
    assert found.keys() == expected.keys()
    squares = [((found[key].double() - value.double()).square().sum(), value.double().square().sum())
               for key, value in expected.items()]  # fmt: skip
    difference, norm = (sum(column).item() ** 0.5 for column in zip(*squares, strict=True))
    return difference / norm


def test_twenty_steps_on_two_processes_are_those_of_one(tmp_path):
    """Of every method, with the same images in a pass: networks, averages and optimisers to 1e-6; in truth bit for bit, as a sum
    of two gradients has one order only. 16 steps on two processes go on for 4 on one. And the same samples are drawn."""
    make_denoiser(tmp_path / "teacher.safetensors", channels=1, num_classes=10)
    shared = ["--device", "cpu", "--batch-size", "16", "--batch-per-device", "8", "--set", "run.eval_num=0"]

    def train(out: str, steps: int, *launcher: str) -> None:
        commands = [[*method, *shared, "--max-images", str(16 * steps), "--set", "optimizer.decay=none",
                     "--out", f"{out}/{name}"] for name, method in METHODS.items()]  # fmt: skip
        for place in (f"{out}.npz", f"{out}/samples/") if steps == 16 or out == "one" else ():
            draw = ["sample", "teacher.safetensors", "--steps", "2", "--num", "13", "--batch-size", "4", "--device", "cpu"]
            commands.append([*draw, "--out", place])
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        script = str(ROOT / "tests/several_commands.py")
        result = subprocess.run(
            [sys.executable, *launcher, script, json.dumps(commands)],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr

    train("one", 20)
    train("two", 16, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2")
    train("two", 20)
    for name in METHODS:
        one, two = (tmp_path / place / name / "checkpoints/000000000320" for place in ("one", "two"))
        files = sorted(file.name for file in one.glob("*.safetensors"))
        assert len(files) >= 2 and files == sorted(file.name for file in two.glob("*.safetensors"))
        for file in files:
            assert relative_difference(two / file, one / file) <= 1e-6, (name, file)
    one, two = (np.load(tmp_path / f"{name}.npz") for name in ("one", "two"))
    assert np.array_equal(one["arr_0"], two["arr_0"]) and np.array_equal(one["arr_1"], two["arr_1"]) and len(one["arr_0"]) == 13
    one, two = (sorted((tmp_path / name / "samples").rglob("*.png")) for name in ("one", "two"))
    assert len(one) == len(two) == 13
    assert all(a.name == b.name and a.read_bytes() == b.read_bytes() for a, b in zip(one, two, strict=True))


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
