"""The last commands that a run prints work as they are printed: for every kind of data, every method, from that folder."""

from __future__ import annotations

import shlex

import pytest
from tiny_vae import write_images, write_vae
from typer.testing import CliRunner

from mmgen.cli import app

pytestmark = pytest.mark.usefixtures("own_cache")  # without Inception, and nothing is downloaded
SMALL = ["--batch-size", "8", "--max-images", "16", "--device", "cpu", "--eval-num", "20", "--set", "run.eval_steps=[1,2]"]
NETWORK = ["--set", "network.model_channels=8", "--set", "network.channel_mult=[1]", "--set", "network.attn_resolutions=[]"]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("mmgen.metrics.inception.build_inception", refuse)
    monkeypatch.setattr("mmgen.metrics.features.build_inception", refuse)


def refuse(*arguments, **options):
    from mmgen.errors import ModelError

    raise ModelError("Inception was asked for")


def mmgen(*arguments) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=True)
    assert result.exit_code == 0, f"{arguments}: {result.output}\n{result.exception!r}"
    return result.output


def printed(output: str) -> list[str]:
    """What a run says to type next."""
    lines = [line.strip() for line in output.partition("next:")[2].splitlines()]
    commands = [line for line in lines if line.startswith("mmgen ")]
    assert commands and commands[-1].startswith("mmgen fid ")
    return commands


def type_in(command: str) -> str:
    return mmgen(*shlex.split(command)[1:])


def train(command: str, *arguments) -> list[str]:
    return printed(mmgen(command, *SMALL, *arguments))


def test_digits(monkeypatch):
    for line in train("train-imm", *NETWORK):
        shown = type_in(line)
    assert "FD-pixels-20" in shown and "digits, 1,797 images" in shown


def test_teacher_and_student():
    """A teacher is sampled in 256 steps by default: of its commands the last, with the steps that were measured."""
    lines = train("train-teacher", *NETWORK)
    assert [line.split()[1] for line in lines] == ["sample", "distill", "fid"]
    assert "FD-pixels-20" in type_in(lines[-1])
    lines = train("distill", "--teacher", "runs/" + shlex.split(lines[-1])[2].split("/")[1], "--set", "run.teacher_steps=2")
    assert "FD-pixels-20" in type_in(lines[-1]) and type_in(lines[0])


def test_a_folder_with_blanks_in_its_name(tmp_path):
    write_images(tmp_path / "my photos", per_class=8, side=8)
    for line in train("train-imm", *NETWORK, "--data", "my photos", "--preset", "digits-imm", "--out", "a run")[-1:]:
        assert "my photos, 24 images" in type_in(line)


def test_latents(tmp_path, monkeypatch):
    write_images(tmp_path / "images", per_class=8)
    write_vae(tmp_path / "vae")
    mmgen("cache-latents", "--data", "images", "--vae", "vae", "--out", "latents", "--device", "cpu")
    lines = train("train-imm", *NETWORK, "--data", "latents", "--preset", "digits-imm", "--set", "train.ema_betas=[0.9]")
    shown = mmgen(*shlex.split(lines[-1])[1:], "--num", 20, "--steps", 1)  # nothing was measured: of 50,000, for want of a number
    assert "images, 24 images" in shown and "FD-pixels-20" in shown


def test_nothing_measured_and_other_features():
    lines = train("train-imm", *NETWORK, "--eval-num", "0")
    assert "--num" not in lines[-1] and "--steps" not in lines[-1]
    lines = train("train-imm", *NETWORK, "--set", "run.eval_features=pixels", "--out", "other")
    assert lines[-1].endswith("--steps 1,2 --features pixels --num 20") and "FD-pixels-20" in type_in(lines[-1])
