"""Students of pipelines: mmgen writes a pipeline's folder, and diffusers' own call draws what mmgen draws from the same noises."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pipeline_calls import called, drawn_by_mmgen, open_pipeline, relative
from tiny_pipelines import KINDS, tiny_pipeline

import mmgen
from mmgen.config.distill import DistillConfig, resolve
from mmgen.config.sections import nest
from mmgen.errors import ConfigError, ModelError
from mmgen.methods.distill.method import copy_of, student_model_config
from mmgen.methods.distill.teachers import Teacher, load_teacher
from mmgen.models.denoiser import Denoiser
from mmgen.models.files import save_model

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

PROMPTS = ["a red fox", "two!"]


def student_of(teacher: Teacher, steps: int, **changes) -> Denoiser:
    """A student that has learned something: its weights are not the teacher's."""
    config = resolve(nest({"teacher.name": "t", "data.name": "x", "student.steps": steps, **changes}, DistillConfig))
    student = copy_of(teacher.model, student_model_config(config, teacher))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in student.network.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return student


@pytest.fixture(scope="module", params=KINDS)
def teacher(request, tmp_path_factory):
    return request.param, load_teacher(tiny_pipeline(request.param, tmp_path_factory.mktemp(request.param) / "teacher"))


def written(student: Denoiser, folder: Path) -> Path:
    save_model(folder / "model.safetensors", student.config, student.network.state_dict())
    mmgen.convert(folder / "model.safetensors", folder / "student", to="diffusers")
    return folder / "student"


@pytest.mark.slow
def test_diffusers_draws_what_mmgen_draws(teacher, tmp_path):
    kind, opened = teacher
    for steps in (1, 2, 4, 8):
        student = student_of(opened, steps)
        (tmp_path / str(steps)).mkdir()
        pipe = open_pipeline(written(student, tmp_path / str(steps)))
        theirs, _ = called(pipe, kind, student, PROMPTS, steps, guidance_scale=1)
        assert relative(drawn_by_mmgen(student, PROMPTS), theirs) < 1e-5, steps
    assert relative(drawn_by_mmgen(student, PROMPTS[::-1]), theirs) > 1e-3
    guided, _ = called(pipe, kind, student, PROMPTS, steps)  # the pipeline's default: what the card warns of
    assert relative(guided, theirs) > 1e-3
    assert (tmp_path / "8" / "student" / "README.md").read_text().count("num_inference_steps=8, guidance_scale=1") == 1


@pytest.mark.parametrize("kind", ["sd15", "sd21", "sdxl"])
def test_a_student_that_is_told_its_guidance(tmp_path, kind):
    """The pipeline embeds guidance_scale - 1 and leaves classifier-free guidance off."""
    student = student_of(load_teacher(tiny_pipeline(kind, tmp_path / "teacher")), 4, **{"student.guidance_range": [1, 8]})
    with torch.no_grad():  # learned: it begins at 0
        student.network.model.time_embedding.cond_proj.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(2))
    pipe = open_pipeline(written(student, tmp_path))
    drawn = {}
    for w in (1.0, 3.0, 7.5):
        theirs, steps = called(pipe, kind, student, PROMPTS, 4, guidance_scale=w)
        drawn[w] = drawn_by_mmgen(student, PROMPTS, guidance=w)
        assert relative(drawn[w], theirs) < 1e-5
        assert len(steps[0].output) == len(PROMPTS)  # one evaluation an image
    assert relative(drawn[3.0], drawn[7.5]) > 1e-3
    assert student.config.sampling.guidance == (5.0 if kind == "sdxl" else 7.5)  # as the pipeline's own call has it
    with pytest.raises(ConfigError, match="outside what this student learned: 1 to 8"):
        drawn_by_mmgen(student, PROMPTS, guidance=9.0)


@pytest.mark.parametrize(
    "kind, changes, sentence",
    [
        ("sd15", {"student.steps": 61}, "61 steps are not so many"),
        ("sd15", {"student.stochasticity": 0.5}, "stochasticity 0.5"),
        ("sd15", {"student.shift": 2.0}, "discrete shifted by 2"),
        ("sd15", {"student.schedule.name": "vp_cosine"}, "schedule vp_cosine"),
        ("sd3", {"student.stochasticity": 0.5}, "stochasticity 0.5"),
        ("sd3", {"student.schedule.name": "vp_cosine"}, "schedule vp_cosine"),
    ],
)
def test_what_diffusers_would_sample_otherwise_is_refused(tmp_path, kind, changes, sentence):
    opened = load_teacher(tiny_pipeline(kind, tmp_path / "teacher"))
    student = student_of(opened, **{"steps": 4, **{k.replace("student.steps", "steps"): v for k, v in changes.items()}})
    with pytest.raises(ConfigError, match=sentence):
        written(student, tmp_path)
    assert not (tmp_path / "student").exists()


def test_negative_prompts_and_guidance_of_a_student_are_refused(tmp_path):
    student = student_of(load_teacher(tiny_pipeline("sd15", tmp_path)), 4)
    with pytest.raises(ConfigError, match="a negative prompt has no effect on a student"):
        drawn_by_mmgen(student, PROMPTS, negative="blur", guidance=2.0)


def test_a_teacher_is_written_back_as_it_was(tmp_path):
    folder = Path(tiny_pipeline("sdxl", tmp_path / "teacher"))
    mmgen.convert(folder, tmp_path / "own.safetensors")
    mmgen.convert(tmp_path / "own.safetensors", tmp_path / "back", to="diffusers")
    assert (tmp_path / "back" / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    for name in ("model_index.json", "scheduler/scheduler_config.json"):
        assert json.loads((tmp_path / "back" / name).read_text()) == json.loads((folder / name).read_text())
    old, new = open_pipeline(folder).unet.state_dict(), open_pipeline(tmp_path / "back").unet.state_dict()
    assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)


def test_a_pipeline_that_changed_is_not_copied(tmp_path):
    student = student_of(load_teacher(tiny_pipeline("sd15", tmp_path / "teacher")), 4)
    tiny_pipeline("sd15", tmp_path / "teacher", seed=1)
    with pytest.raises(ModelError, match="has other text encoders than the model was trained with"):
        written(student, tmp_path)
    assert not (tmp_path / "student").exists()
