"""The command line as a person meets it: help, version, one sentence for bad input, a short run from the shell."""

import json
import re
import subprocess
import sys
from pathlib import Path

import forks
import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
TINY = ["--set", "network.model_channels=8", "--set", "network.channel_mult=[1]", "--set", "run.eval_num=32",
        "--set", "run.eval_steps=[1, 2]", "--batch-size", "16", "--device", "cpu"]  # fmt: skip


COMMANDS = ("train-imm", "train-teacher", "distill", "sample", "fid", "convert", "inspect", "cache-latents", "ema", "neon", "push", "compare")


def mmgen(*arguments, cwd, timeout=120, **environment):
    return forks.run("-m", "mmgen", *arguments, cwd=cwd, timeout=timeout, **{"COLUMNS": "200", **environment})


def test_help_does_not_load_torch(tmp_path):
    code = (
        "import sys; sys.argv = ['mmgen'] + sys.argv[1:]\n"
        "from mmgen.__main__ import main\n"
        "slow = {'torch', 'numpy', 'datasets', 'accelerate', 'PIL', 'pyarrow', 'pydantic'}\n"
        "try: main()\n"
        "finally: print('loaded:', sorted(slow & set(sys.modules)))"
    )
    for arguments in (["--help"], ["--version"], *([command, "--help"] for command in COMMANDS)):
        result = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert "loaded: []" in result.stdout, result.stdout + result.stderr


def test_help_shows_every_default_and_an_example(tmp_path):
    for command in COMMANDS:
        text = mmgen(command, "--help", cwd=tmp_path, COLUMNS="400").stdout
        assert f"Example: mmgen {command}" in text
    assert all(command in mmgen("--help", cwd=tmp_path).stdout for command in COMMANDS)
    assert re.fullmatch(r"mmgen \d+\.\d+\.\d+(\.dev\d+)?\n", mmgen("--version", cwd=tmp_path).stdout)


def test_train_then_sample_then_train_on(tmp_path):
    first = mmgen("train-imm", *TINY, "--max-images", "64", "--out", "run", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "FD-pixels" in first.stdout and "real against real (noise floor)" in first.stdout and "mmgen sample run" in first.stdout
    assert "FID" not in first.stdout.replace("not FID", "")
    lines = [json.loads(line) for line in first.stderr.splitlines() if line.startswith("{")]
    assert any("loss" in line for line in lines)
    picture = Image.open(tmp_path / "run/samples.png")
    assert min(picture.size) > 300
    again = mmgen("train-imm", *TINY, "--max-images", "64", "--out", "run", cwd=tmp_path)
    assert again.returncode == 0 and '"loss"' not in again.stderr  # nothing left to train
    on = mmgen("train-imm", *TINY, "--max-images", "96", "--out", "run", cwd=tmp_path)
    assert on.returncode == 0 and "resuming" in on.stderr
    sampled = mmgen("sample", "run", "--steps", "2", "--num", "12", "--out", "samples.npz", cwd=tmp_path)
    assert sampled.returncode == 0, sampled.stderr
    with np.load(tmp_path / "samples.npz") as archive:
        assert archive["arr_0"].shape == (12, 8, 8, 1) and archive["arr_1"].shape == (12,)


@pytest.mark.slow
def test_the_default_folder_tells_settings_apart(tmp_path):
    result = mmgen("train-imm", *TINY, "--max-images", "16", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"digits-imm-[0-9a-f]{6}", folder.name)


@pytest.mark.slow
def test_dry_run_trains_nothing(tmp_path):
    result = mmgen("train-imm", "--dry-run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "1,797 images" in result.stdout and "parameters" in result.stdout and "memory per device" in result.stdout
    assert not (tmp_path / "runs").exists()
    # The paper counts 118.64 G multiply-adds for DiT-XL/2 and 21.28 for CIFAR-10's network (table 5)
    for preset, low, high in (("imagenet256-imm-xl", 118.0, 119.3), ("cifar10-imm", 21.0, 21.5)):
        result = mmgen("train-imm", "--preset", preset, "--dry-run", cwd=tmp_path, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path),
                       MMGEN_CACHE=str(tmp_path), MMGEN_DATA_DIR=str(tmp_path))  # fmt: skip
        assert result.returncode == 0, result.stderr
        assert low < float(re.search(r"([\d.]+) G multiply-adds", result.stdout)[1]) < high


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--preset", "cifar-imm"], 2, "did you mean 'cifar10-imm'"),
        (["--set", "loss.kernal=rbf"], 2, "loss.kernel"),
        (["--data", "absent/"], 3, "no file or folder absent/"),
        (["--data", "absent/", "--preset", "digits-imm"], 3, "absent"),
        (["--max-time", "soon"], 2, "--max-time"),
        (["--precision", "fp8"], 2, "fp16"),
        (["--precision", "fp16", "--device", "cpu"], 2, "needs a GPU"),
        (["--device", "tpu"], 2, "did you mean 'cpu'"),
        (["--config", "absent.toml"], 2, "absent.toml"),
        (["--log-with", "mlflow"], 2, "tensorboard"),
        (["--batch-size", "10"], 2, "multiple of loss.group_size"),
        (["--data", "digits", "--label-column", "digit"], 3, "label"),
    ],
)
def test_bad_input_is_answered_with_one_sentence(tmp_path, arguments, status, message):
    result = mmgen("train-imm", *arguments, cwd=tmp_path, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path), MMGEN_CACHE=str(tmp_path))
    assert result.returncode == status, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0], result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    result = mmgen("train-imm", *TINY, "--out", "file/run", cwd=tmp_path)
    assert result.returncode == 1 and "error: cannot write file/run" in result.stderr


@pytest.mark.slow
def test_tensorboard_gets_the_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    result = mmgen("train-imm", *TINY, "--max-images", "32", "--out", "run", "--log-with", "tensorboard", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = {file.parent for file in (tmp_path / "run").rglob("events.out*")}
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    assert "loss" in accumulator.Tags()["scalars"]
