"""The examples of distillation run, and what they print is what they measured."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import forks
import numpy as np
import pytest
from PIL import Image
from tiny_model import make_denoiser, make_model

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
ABLATIONS = ROOT / "examples/distill_ablations.py"
QUICK = ("--seeds", "1", "--iterations", "2", "--teacher-iterations", "2", "--samples", "32", "--out", "table")


def run(*command, cwd: Path, path: str = "") -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **forks.places()}
    environment["PATH"] = os.pathsep.join(filter(None, (path, environment["PATH"])))
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)


def ablations(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    return forks.run(ABLATIONS, *arguments, cwd=cwd, timeout=600)


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The first comparisons, each student of two iterations: where it was run, and what was printed."""
    folder = tmp_path_factory.mktemp("ablations")
    result = ablations(*QUICK, "--only", "steps", "posterior", "method", "weighting", cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def test_every_variant_has_its_row(quick):
    folder, printed = quick
    assert (folder / "table/table.md").read_text() == printed
    head, _, halves, *rows = cells(printed)
    assert head[2] == "FD-pixels-32" and halves[0] == "halves of the data" and 0.2 < float(halves[2]) < 0.5
    steps = {}
    for name, count, *figures in rows:
        steps.setdefault(name, []).append(int(count))
        means, spreads = zip(*(map(float, figure.split(" ± ")) for figure in figures), strict=True)
        assert means[0] > 0 and means[1] >= 0 and all(0 <= share <= 1 for share in means[2:])
        assert spreads == (0, 0, 0, 0)  # one seed
    assert steps.pop("teacher") == [1, 2, 4, 8, 256]
    assert steps.pop("alternating") == [8, 4, 2, 1] and steps.pop("instant") == [8, 4, 2, 1]
    assert steps.pop("unconditional posterior") == steps.pop("stochasticity 0.5") == [8, 2]
    assert set(map(tuple, steps.values())) == {(8,)}
    assert all(name.startswith("weight ") for name in steps) and len(steps) == 3


def test_the_pictures_are_not_empty(quick):
    folder, printed = quick
    for name, width in (("chart.png", 1600), ("samples.png", None)):
        with Image.open(folder / "table" / name) as picture:
            assert picture.format == "PNG" and width in (None, picture.width)
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 10


def test_what_is_there_is_not_repeated_and_rows_can_be_chosen(quick):
    """Nor where the teacher is named: it is the same one."""
    folder, printed = quick
    models = {file: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")}
    result = ablations("--teacher", "table/teacher", *QUICK, "--only", "posterior", cwd=folder)
    assert result.returncode == 0, result.stderr
    again, before = cells(result.stdout), cells(printed)
    assert all(row in before for row in again)
    assert [row[:2] for row in again[8:]] == [
        ["alternating", "8"], ["alternating", "2"], ["unconditional posterior", "8"], ["unconditional posterior", "2"],
        ["stochasticity 0.5", "8"], ["stochasticity 0.5", "2"],
    ]  # fmt: skip
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")} == models


def test_other_settings_in_the_same_folder_are_refused(quick):
    """Not a table of students that are not comparable."""
    folder, _ = quick
    result = ablations(*QUICK, "--iterations", "1", "--only", "posterior", cwd=folder)
    assert result.returncode == 5 and "choose another out (--out)" in result.stderr and "Traceback" not in result.stderr
    assert "alternating" not in result.stdout


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Runs the example in this process, in an empty folder: exit status and what it said, or an assertion that it ended."""
    monkeypatch.chdir(tmp_path)

    def start(*arguments: str) -> tuple[int, str]:
        made = set(tmp_path.iterdir())
        monkeypatch.setattr(sys, "argv", ["distill_ablations.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ABLATIONS), run_name="__main__")
        said = capsys.readouterr()
        assert not said.out and set(tmp_path.iterdir()) == made  # before anything was drawn or trained
        return ended.value.code, said.err

    return start


@pytest.mark.parametrize(
    "arguments, named",
    [
        (("--only", "colour"), "posterior"),
        (("--seeds", "0"), "--seeds must be at least 1"),
        (("--samples", "8"), "--samples must be at least 32"),
        (("--iterations", "0"), "--iterations must be at least 1"),
        (("--teacher-iterations", "0"), "--teacher-iterations must be at least 1"),
    ],
)
def test_impossible_options_are_refused(arguments, named, refused):
    status, said = refused(*arguments)
    assert status == 2 and named in said


def test_teachers_that_cannot_be_one_are_refused(refused, tmp_path):
    """One that is not there, one of other images, a model that is no denoiser."""
    status, said = refused("--teacher", "nowhere/teacher.safetensors", *QUICK)
    assert status == 4 and "nowhere" in said
    colour = make_denoiser(tmp_path / "colour.safetensors", channels=3)
    status, said = refused("--teacher", str(colour), *QUICK)
    assert status == 2 and "(3, 8, 8)" in said
    status, said = refused("--teacher", str(make_model(tmp_path / "map.safetensors", channels=1)), *QUICK)
    assert status == 4 and "map.safetensors" in said


def test_the_measure_of_diversity():
    """Within classes, pooled: brute force; without labels, the variance about one mean."""
    example = runpy.run_path(str(ABLATIONS))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 1, 3, 3), dtype=np.uint8)
    labels = np.repeat([0, 3, 7], [20, 19, 1])  # one has a class to itself, and no deviation
    pixels = images.reshape(40, 9) / 127.5 - 1
    groups = [pixels[labels == label] for label in (0, 3, 7)]
    squares = sum(((group - group.mean(0)) ** 2).sum() for group in groups)
    assert example["variance"](images, labels) == pytest.approx(squares / (40 - 3), rel=1e-12)
    assert example["variance"](images, None) == pytest.approx(pixels.var(0, ddof=1).sum(), rel=1e-12)
    assert example["spread"]([1.0, 2.0, 6.0], 2) == "3.00 ± 2.50"


@pytest.mark.skipif(shutil.which("bash") is None, reason="the chain is a bash script")
def test_the_chain_runs_as_typed(tmp_path):
    """Teacher, student, samples."""
    command = tmp_path / "bin/mmgen"
    command.parent.mkdir()
    command.write_text('#!/bin/sh\nexec "$PYTHON_EXEC" -m mmgen "$@"\n')
    command.chmod(0o755)
    few = ("--max-images", "256", "--batch-size", "64", "--eval-num", "0")
    few = (*few, "--set", "optimizer.warmup_images=64", "--set", "run.eval_steps=[8]")
    chain = "bash", ROOT / "examples/digits_chain.sh", *few
    result = run(*chain, cwd=tmp_path, path=str(command.parent))
    assert result.returncode == 0, result.stderr
    with Image.open(tmp_path / "runs/digits-student.png") as grid:
        assert grid.width >= 10 * 8 and len(grid.convert("L").getcolors()) > 10
    assert (tmp_path / "runs/digits-student/samples.png").is_file()
    assert {"digits-teacher", "digits-student"} <= {file.parent.name for file in tmp_path.rglob("model.safetensors")}
