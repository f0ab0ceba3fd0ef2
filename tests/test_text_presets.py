"""The presets of text-to-image that need an encoder: a dry run works without its weights, a training says what is missing."""

from __future__ import annotations

import pytest
from test_cli import mmgen

from mmgen.config.distill import resolve as resolve_student
from mmgen.config.sections import read_preset
from mmgen.config.teacher import resolve
from mmgen.encoders.text import described, sizes_of
from mmgen.errors import ConfigError, ModelError
from mmgen.networks.text import TextSettings
from tiny_encoder import make_encoder

TEACHERS, STUDENTS = ("emoji32-teacher", "t2i512-teacher"), ("emoji32-distill", "t2i512-distill")


@pytest.mark.parametrize("name", TEACHERS)
def test_teachers_are_of_captions(name):
    config = resolve(read_preset(name, "train-teacher"))
    assert config.data.text and not config.data.conditional and config.data.caption_dropout == 0.1
    assert config.denoiser.prediction == "v" and config.denoiser.schedule.shift == max(1, config.data.resolution / 64)


@pytest.mark.parametrize("name", STUDENTS)
def test_students_have_8_steps_and_a_guided_teacher(name):
    config = resolve_student(read_preset(name, "distill"))
    assert config.student.steps == 8 and config.teacher.guidance > 1 and config.loss.method == "alternating"


@pytest.mark.slow
def test_t2i512_is_counted_without_its_encoder_and_not_trained(tmp_path):
    arguments = ["train-teacher", "--preset", "t2i512-teacher", "--set", "network.depth=1"]
    found = mmgen(*arguments, "--dry-run", cwd=tmp_path)
    assert found.returncode == 0 and "512 x 512 x 3, captions used" in found.stdout and "memory per device" in found.stdout
    found = mmgen(*arguments, cwd=tmp_path)
    assert found.returncode != 0 and "there is no text encoder in" in found.stderr and "Traceback" not in found.stderr


def test_sizes_are_the_encoders_where_it_is_there(tmp_path):
    folder = make_encoder(tmp_path / "encoder")
    assert sizes_of(TextSettings(encoder=str(folder), length=6)) == described(TextSettings(encoder=str(folder), length=6))
    with pytest.raises(ConfigError, match="takes at most 32 tokens: set text.length=32"):
        described(TextSettings(encoder=str(folder), length=33))
    absent = TextSettings(encoder=str(tmp_path / "no"), width=40, pooled=24)
    assert (sizes_of(absent).width, sizes_of(absent).pooled, sizes_of(absent).depth) == (40, 24, 0)
    with pytest.raises(ModelError, match="there is no text encoder in"):
        described(absent)
