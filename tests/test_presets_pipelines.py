"""Presets for students of diffusers' pipelines: their dry runs, with a tiny pipeline in the teacher's place and without any."""

import dataclasses

import pytest
from test_cli import mmgen
from tiny_pipelines import tiny_pipeline

from mmgen.config.distill import resolve
from mmgen.config.sections import preset_names, read_preset

PRESETS = {"sd15-distill": "sd15", "sd15-distill-lora": "sd15", "sdxl-distill-lora": "sdxl", "pixart512-distill": "pixart_alpha",
           "sd3-distill-lora": "sd3"}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_settings(name):
    assert name in preset_names("distill")
    config = resolve(read_preset(name, "distill"))
    assert config.student.steps == 8 and config.optimizer.beta1 == 0 and config.run.gradient_checkpointing
    assert config.data.caption_dropout == 0 and config.train.precision == "bf16" and config.teacher.guidance > 1
    assert (config.student.lora > 0) == name.endswith("-lora")
    assert dataclasses.asdict(config)["loss"]["method"] == "alternating"


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_dry_runs(name, tmp_path):
    folder = tiny_pipeline(PRESETS[name], tmp_path / "teacher")
    asked = ["distill", "--preset", name, "--data", "nowhere/latents", "--dry-run"]
    shown = mmgen(*asked, "--teacher", folder, "--device", "cpu", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "LoRA of rank 64" in shown.stdout and "all weights, gradient checkpointing" in shown.stdout
    without = mmgen(*asked, cwd=tmp_path)
    assert without.returncode != 0 and "a student needs a teacher" in without.stderr and "Traceback" not in without.stderr
