"""Two processes, as torchrun starts them, do what one does: commands that train and measure, sampling, scoring.

Each of the two is launched once, with all commands: `runs`. Training alone, by every method with every network: test_matrix.py; latents:
test_latents.py; the commands sharded: test_sharding.py.
"""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from forks import ROOT, TWO, run
from safetensors.torch import load_file
from tiny_inception import write_inception
from tiny_model import make_denoiser

from mmgen.system.processes import COLLECTIVE_TIMEOUT

pytestmark = pytest.mark.slow

TINY = ["--set", "network.model_channels=8", "--set", "network.channel_mult=[1]", "--set", "network.dropout=0.1"]
DISTILL = ["distill", "--teacher", "teacher.safetensors", "--lr", "1e-3", "--set", "optimizer.warmup_images=16"]
EVALUATE = ["--eval-num", "32", "--eval-every", "64", "--preview-every", "64"]
METHODS = {
    "imm": ["train-imm", *TINY, *EVALUATE, "--set", "run.eval_steps=[1, 2]"],
    "alternating": [*DISTILL, "--method", "alternating", *EVALUATE, "--teacher-steps", "4"],
}
SHARED = ["--device", "cpu", "--batch-size", "16", "--batch-per-device", "8", "--set", "optimizer.decay=none"]
SAMPLE = ["sample", "teacher.safetensors", "--steps", "2", "--num", "13", "--batch-size", "4", "--device", "cpu"]
FID = ["fid", "a", "--ref", "b", "--batch-size", "8", "--device", "cpu"]
SCORES = {
    "inception": [*FID, "--metrics", "fid,kid,is,pr,dc", "--inception", "network.pt"],
    "pixels": [*FID, "--features", "pixels", "--metrics", "fid,kid,pr,dc", "--repeat", "3"],
}


def launch(folder: Path, launcher: Sequence[str], commands: list[list[str]], cache: str) -> subprocess.CompletedProcess:
    command = *launcher, ROOT / "tests/several_commands.py", json.dumps(commands)
    result = run(*command, cwd=folder, timeout=600, MMGEN_CACHE=str(folder / cache))
    assert result.returncode == 0, result.stderr
    return result


def trainings(out: str, steps: int) -> list[list[str]]:
    return [[*method, *SHARED, "--max-images", str(16 * steps), "--out", f"{out}/{name}"] for name, method in METHODS.items()]


def drawn_and_scored(out: str) -> list[list[str]]:
    samples = [[*SAMPLE, "--out", place] for place in (f"{out}.npz", f"{out}/samples/")]
    return samples + [[*command, "--out", f"{out}/{name}.json"] for name, command in SCORES.items()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(folder, what two processes printed): `one` is of one process; `two` of two, whose last 2 of 6 steps one makes."""
    folder = tmp_path_factory.mktemp("processes")
    make_denoiser(folder / "teacher.safetensors", channels=1, num_classes=10, augment_dim=9)
    write_inception(folder / "network.pt")
    random = np.random.default_rng(0)
    for name, count in (("a", 45), ("b", 37)):
        (folder / name).mkdir()
        for i in range(count):
            Image.fromarray(random.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(folder / name / f"{i:03d}.png")
    printed = launch(folder, TWO, [*trainings("two", 4), *drawn_and_scored("two")], "cache-two")
    said = [json.loads((folder / f"process-{number}.json").read_text()) for number in (0, 1)]
    assert said == [{"size": 2, "seconds": COLLECTIVE_TIMEOUT.total_seconds()}] * 2
    for file in folder.glob("process-*.json"):
        file.unlink()
    launch(folder, [], [*trainings("two", 6), *trainings("one", 6), *drawn_and_scored("one")], "cache-one")
    assert [json.loads(file.read_text())["size"] for file in folder.glob("process-*.json")] == [1]
    return folder, printed


def relative_difference(found: Path, expected: Path) -> float:
    """Of all tensors of two files together: the norm of the difference over the norm."""
    found, expected = load_file(found), load_file(expected)
    assert found.keys() == expected.keys()
    squares = [((found[key].double() - value.double()).square().sum(), value.double().square().sum())
               for key, value in expected.items()]  # fmt: skip
    difference, norm = (sum(column).item() ** 0.5 for column in zip(*squares, strict=True))
    return difference / norm


def figures_of(folder: Path) -> dict[int, dict[str, float]]:
    """By the number of images seen, those while training and at the end."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {line["images"]: line["values"] for line in lines if "values" in line}


@pytest.mark.parametrize("method", METHODS)
def test_training(runs, method):
    """With the same images in a pass: networks, averages and optimisers to 1e-6; in truth bit for bit, as a sum of two gradients
    has one order only."""
    folder, _ = runs
    one, two = (folder / name / method / "checkpoints/000000000096" for name in ("one", "two"))
    files = sorted(file.name for file in one.glob("*.safetensors"))
    assert len(files) >= 2 and files == sorted(file.name for file in two.glob("*.safetensors"))
    for file in files:
        assert relative_difference(two / file, one / file) <= 1e-6, file
    assert {p.name for p in (folder / "one" / method).iterdir()} == {p.name for p in (folder / "two" / method).iterdir()}
    ours, theirs = figures_of(folder / "two" / method), figures_of(folder / "one" / method)
    assert ours.keys() == theirs.keys() == {64, 96}
    for images, values in ours.items():
        assert values == pytest.approx(theirs[images], rel=1e-4), images


def test_a_comparison_is_shared(runs):
    folder, _ = runs
    rows = [json.loads((folder / name / "alternating/results.json").read_text())["comparison"]["rows"] for name in ("one", "two")]
    assert len(rows[0]) == len(rows[1]) >= 4
    for row, other in zip(*rows, strict=True):
        assert row["value"] == pytest.approx(other["value"], rel=1e-4)


def test_sampling(runs):
    folder, _ = runs
    one, two = (np.load(folder / f"{name}.npz") for name in ("one", "two"))
    assert np.array_equal(one["arr_0"], two["arr_0"]) and np.array_equal(one["arr_1"], two["arr_1"]) and len(one["arr_0"]) == 13
    one, two = (sorted((folder / name / "samples").rglob("*.png")) for name in ("one", "two"))
    assert len(one) == len(two) == 13
    assert all(a.name == b.name and a.read_bytes() == b.read_bytes() for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("features", SCORES)
def test_scoring(runs, features):
    folder, _ = runs
    one, two = (json.loads((folder / name / f"{features}.json").read_text())["scores"][-1] for name in ("one", "two"))
    assert list(one["figures"]) == list(two["figures"])
    for key in ("figures", "spreads"):
        assert two[key] == pytest.approx(one[key], rel=1e-5)


def test_one_process_speaks(runs):
    _, printed = runs
    assert printed.stdout.count("kept in:") == 2 and printed.stdout.count("trained on 64") == len(METHODS)


def test_nobody_waits_in_a_collective_for_one_that_works_alone(tmp_path):
    """Collectives end the job after a while: what takes one process longer is waited for elsewhere. See slow_alone.py."""
    random = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(20):
        Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / "images" / f"{i:03d}.png")
    command = [*TWO, ROOT / "tests/slow_alone.py", "--data", "images", "--preset", "digits-imm", "--unconditional", *TINY,
               *SHARED, "--max-images", "32", "--eval-num", "0", "--out", "run"]  # fmt: skip
    result = run(*command, cwd=tmp_path, timeout=300, MMGEN_CACHE=str(tmp_path / "cache"))
    assert result.returncode == 0, result.stderr
    for what in ("_write", "picture", "write_state"):
        assert result.stdout.count(f"alone: {what}") == 1, result.stdout
    assert (tmp_path / "run/results.json").is_file()


def test_accelerate_launch_on_a_cpu_starts_one(tmp_path):
    """`--num_processes 2` or not: so the README shows torchrun for several processes on CPUs."""
    make_denoiser(tmp_path / "teacher.safetensors", channels=1, num_classes=10)
    launch(tmp_path, ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"], [[*SAMPLE, "--out", "a.npz"]], "cache")
    assert [json.loads(file.read_text())["size"] for file in tmp_path.glob("process-*.json")] == [1]
    assert len(np.load(tmp_path / "a.npz")["arr_0"]) == 13
