"""The examples run."""

import json
import math
import runpy
import signal
import subprocess
from pathlib import Path

import forks
import pytest

import mmgen
import torch
from PIL import Image

from mmgen.diffusion.schedules import ScheduleSettings, make_schedule
from mmgen.training.task import Outcome
from tests.benchmarks import scale_table

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


def run(example: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    return forks.run(ROOT / "examples" / example, *arguments, cwd=cwd, timeout=600)


def test_the_ablations_make_their_table(tmp_path):
    """Every variant trains: all parametrisations, mappings, kernels, weightings and group sizes."""
    result = run("imm_ablations.py", "--seeds", "1", "--images", "256", "--samples", "32", "--out", "table", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    table = (tmp_path / "table/table.md").read_text().splitlines()
    assert len(table) == 2 + 14 and all(row.count("±") == 3 for row in table[2:])
    assert "nan" not in result.stdout


def test_quality_against_cost_goes_on_where_it_was_stopped(tmp_path):
    few = ("--seeds", "1", "--max-images", "128", "--samples", "65", "--out", "q")
    first = run("digits_ablations.py", "--only", "imm", *few, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    kept = json.loads((tmp_path / "q/quality.json").read_text())
    scores = kept["rows"]["imm"]["seeds"]["0"]
    assert list(scores) == ["1", "2", "4", "8"] and first.stdout.count("imm, seed 0") == 4
    assert "`mmgen train-imm --preset digits-imm --seed S`" in (tmp_path / "q/quality.md").read_text()
    del scores["4"]
    (tmp_path / "q/quality.json").write_text(json.dumps(kept))
    trained = (tmp_path / "q/imm-0/model.safetensors").stat().st_mtime_ns
    again = run("digits_ablations.py", "--only", "imm", *few, cwd=tmp_path)
    assert again.returncode == 0 and again.stdout.count("imm, seed 0") == 1 and "4 steps" in again.stdout
    assert (tmp_path / "q/imm-0/model.safetensors").stat().st_mtime_ns == trained
    with Image.open(tmp_path / "q/quality.png") as picture:
        assert picture.size == (900, 560)
    other = run("digits_ablations.py", "--only", "imm", *few[:-4], "--samples", "70", "--out", "q", cwd=tmp_path)
    assert other.returncode != 0 and "choose another --out" in other.stderr


@pytest.mark.parametrize(
    ("example", "function", "trains", "arguments"),
    [
        ("imm_ablations.py", "run", "train_imm", ("a", {}, Path("a"))),
        ("distill_ablations.py", "teacher", "train_teacher", (Path("a"), 2)),
        ("distill_ablations.py", "student", "distill", ("teacher", "a", 8, {}, Path("a"))),
    ],
)
def test_half_a_training_is_no_result(example, function, trains, arguments, monkeypatch):
    """A signal lets a run save and end in good order; the script must not go on as if it had finished."""
    names = runpy.run_path(str(ROOT / "examples" / example))
    monkeypatch.setattr(mmgen, trains, lambda *_, **__: Outcome(128, signal=signal.SIGTERM))
    with pytest.raises(SystemExit) as ended:
        names[function](*arguments)
    assert ended.value.code == 143


def test_the_table_of_scale(tmp_path):
    """digits-imm: 4.8 GFLOP a step, two passes forward and one back; its 128 images in groups of 4 are too few for 64 GPUs."""
    presets = ["digits-imm", "digits-distill", "imagenet256-imm-s", "own32-imm"]
    result = run("../tests/benchmarks/scale_table.py", "--presets", *presets, "--utilisation", "0.5", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in result.stdout.splitlines() if line.startswith("| `")
    ]
    assert [row[0].split("`")[1] for row in rows] == presets * 2 and "of digits-teacher" in rows[1][0]
    assert rows[0][5] == "–" and rows[0][3] != "–" and float(rows[4][3]) == pytest.approx(0.00482, rel=0.01)
    # DiT-S/2: 6.05 G multiply-adds a pass, four passes' worth, 4,096 images, at half of 494 TFLOP/s
    assert float(rows[6][4]) == pytest.approx(4 * 2 * 6.05e9 * 4096 / 247e12, rel=0.05)
    assert 3 < float(rows[7][3]) < 4  # at 32 x 32: 0.21 TFLOP at 8 x 8, times 16


def test_every_preset_is_in_the_table_of_scale():
    table, shown = (ROOT / "examples/scale.md").read_text(), scale_table.preset_names()
    for name in shown:
        assert scale_table.recipe(name).model.channels > 0
        assert table.count(f"| `{name}`") >= 2, name  # memory and time


@pytest.mark.slow
def test_students_on_cards_are_as_the_document_says():
    for row in scale_table.card_rows("pixart512-distill", scale_table.GPUS["h200"], 0.35):
        assert row in (ROOT / "examples/scale.md").read_text()


# The weights of the predictions as they were computed for vp_cosine elsewhere, to the digits that they were noted with.
WEIGHTS = {
    8: {
        "DDPM": "0.0015 0.0051 0.0107 0.0215 0.0481 0.1393 0.7546",
        "DDIM": "0.0388 0.0420 0.0495 0.0647 0.0969 0.1790 0.5098",
    },
    4: {"DDPM": "0.027 0.131 0.765", "DDIM": "0.159 0.224 0.541"},
}


@pytest.mark.parametrize("steps", WEIGHTS)
def test_the_weights_of_predictions_are_the_known_ones(tmp_path, steps):
    """Both samplers, digit for digit, with their sum, cos(pi / (2 k)); and a picture."""
    result = run("predictions_weights.py", "--steps", str(steps), "--out", "new/weights.png", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in result.stdout.splitlines() if row.startswith("|")]
    names, table, total = [cell.split(" ")[0] for cell in rows[0]], rows[2:-1], rows[-1]
    assert [row[0] for row in table] == [str(call) for call in range(1, steps)] and total[0] == "sum"
    for sampler, expected in WEIGHTS[steps].items():
        column = names.index(sampler)
        for row, noted in zip(table, expected.split(), strict=True):
            digits = len(noted) - 2  # of the table there are four
            assert abs(float(row[column]) - float(noted)) <= (0 if digits == 4 else 0.5 * 10**-digits + 1e-9), (sampler, row)
        assert abs(float(total[column]) - math.cos(math.pi / (2 * steps))) < 1e-4
    with Image.open(tmp_path / "new/weights.png") as picture:
        assert picture.format == "PNG" and picture.size == (1000, 360)
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 10  # lines, not an empty page


@pytest.mark.parametrize("schedule", ["fm", "ddpm_linear", "edm"])
def test_the_weights_of_predictions_under_other_schedules(schedule):
    """DDPM's are in proportion to the increments of the SNR, DDIM's to those of its root, as unrolling by hand gives."""
    path = ROOT / "examples/predictions_weights.py"
    example = runpy.run_path(str(path))
    noise = make_schedule(ScheduleSettings(schedule))
    times = torch.tensor([6, 5, 4, 3, 2, 1], dtype=torch.float64) / 6
    for stochasticity, power in ((1.0, 1.0), (0.0, 0.5)):
        increments = (noise.alpha(times) / noise.sigma(times)).pow(2 * power).diff()
        found = torch.tensor(example["weights"](noise, 6, stochasticity), dtype=torch.float64)
        torch.testing.assert_close(found / found.sum(), increments / increments.sum(), rtol=1e-9, atol=1e-12)


def test_one_step_has_no_weights(tmp_path):
    result = run("predictions_weights.py", "--steps", "1", cwd=tmp_path)
    assert result.returncode == 2 and "at least 2" in result.stderr and not list(tmp_path.iterdir())


def test_a_student_without_noise_loses_variance_of_normal_data_and_one_that_is_posterior_keeps_it():
    """And Neon brings it back: the more, the larger w, until there is too much."""
    example = runpy.run_path(str(ROOT / "examples/normal_students.py"))
    sampled, led_away = example["sampled"], example["led_away"]
    a, b, error = example["student"](4, 0.3, 1.0, 2000)
    assert error < 1e-6 and sampled(a, b, 4, 0.3) == pytest.approx([1.0] * 4, abs=1e-3)
    a, b, error = example["student"](4, 0.3, 0.0, 2000)
    found = sampled(a, b, 4, 0.3)
    assert error < 0.05 and found[-1] < 0.7 and found == sorted(found, reverse=True)
    last = [sampled(led_away(a, 0.3 * found[-1], w), b, 4, 0.3)[-1] for w in (0.0, 0.2, 0.5, 1.0)]
    assert last[0] == found[-1] and last == sorted(last) and abs(last[2] - 1) < abs(last[0] - 1) / 2 and last[3] > 1.1
