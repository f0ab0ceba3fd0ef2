"""Students of discrete teachers, written for diffusers: its own scheduler draws what mmgen draws, from the same noises."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_convert import first_noise, small_unet

from mmgen.diffusion.schedules import ScheduleSettings, make_schedule
from mmgen.errors import ConfigError
from mmgen.formats.convert import convert_file
from mmgen.formats.diffusers import write_diffusers
from mmgen.formats.diffusers_scheduler import write_scheduler
from mmgen.methods.distill.teachers import Teacher, load_teacher
from mmgen.methods.distill.method import student_model_config
from mmgen.config.distill import DistillConfig, resolve
from mmgen.config.sections import nest
from mmgen.diffusion.preconditioning import DenoiserSettings, preconditioning
from mmgen.models.denoiser import Denoiser
from mmgen.models.config import SamplingSettings
from mmgen.models.files import save_model
from mmgen.sampling.drawing import _NOISE, SampleSettings, _draw_batch, plan
from mmgen.system.random import keys, normal

diffusers = pytest.importorskip("diffusers")


def teacher_of(folder, channels_out: int = 3, **scheduler) -> Teacher:
    given = {"clip_sample": True, **scheduler}
    unet = small_unet(diffusers)
    if channels_out != 3:
        torch.manual_seed(0)
        unet = diffusers.UNet2DModel.from_config({**unet.config, "out_channels": channels_out})
        given["variance_type"] = "learned_range"
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(**given)).save_pretrained(folder)
    return load_teacher(folder)


def student_of(teacher: Teacher, steps: int, **changes) -> Denoiser:
    """A student that has learned nothing yet: how it is sampled is all that matters here."""
    config = resolve(nest({"teacher.name": "t", "data.name": "digits", "student.steps": steps, **changes}, DistillConfig))
    student = Denoiser(student_model_config(config, teacher))
    student.network.load_state_dict(teacher.model.network.state_dict())
    return student.eval()


@torch.no_grad()
def drawn_by_diffusers(folder, model: Denoiser, steps: int) -> torch.Tensor:
    """DDPMPipeline's loop with its scheduler and network, float32, given the noises that mmgen draws."""
    pipeline = diffusers.DDPMPipeline.from_pretrained(folder)
    scheduler, unet = pipeline.scheduler, pipeline.unet.eval()
    scheduler.set_timesteps(steps)
    z, drawn = first_noise(model, 2), iter(range(1, steps + 1))

    def noise(*args, **options):
        return normal(keys(0, torch.arange(2), _NOISE + next(drawn)), model.image_shape, torch.float64)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", noise)
        for t in scheduler.timesteps:
            z = scheduler.step(unet(z.float(), t).sample.double(), t, z).prev_sample
    return z


def model_betas(model: Denoiser) -> torch.Tensor:
    s = model.settings
    if s.betas == "linear":
        return torch.linspace(s.beta_start, s.beta_end, 1000, dtype=torch.float64)
    if s.betas == "scaled_linear":
        return torch.linspace(s.beta_start**0.5, s.beta_end**0.5, 1000, dtype=torch.float64) ** 2
    bar = [math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(1001)]
    return torch.tensor([min(1 - b / a, 0.999) for a, b in zip(bar[:-1], bar[1:], strict=True)], dtype=torch.float64)


BETAS = {
    "linear": {},
    "scaled_linear": {"beta_start": 0.00085, "beta_end": 0.012},
    "squaredcos_cap_v2": {},
}


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("schedule", BETAS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_diffusers_draws_what_mmgen_draws(tmp_path, schedule, prediction, steps):
    teacher = teacher_of(tmp_path / "teacher", beta_schedule=schedule, prediction_type=prediction, **BETAS[schedule])
    student = student_of(teacher, steps)
    save_model(tmp_path / "student.safetensors", student.config, student.network.state_dict())
    convert_file(tmp_path / "student.safetensors", tmp_path / "out", to="diffusers")
    ours = _draw_batch(student, plan(student.config, SampleSettings()), torch.arange(2), None)
    theirs = drawn_by_diffusers(tmp_path / "out", student, steps)
    assert (ours - theirs).norm() <= 1e-5 * ours.norm()


def test_a_learned_variance_is_left_out(tmp_path):
    teacher = teacher_of(tmp_path / "teacher", channels_out=6)
    student = student_of(teacher, 4)
    write_diffusers(student.config, student.network.state_dict(), tmp_path / "out")
    ours = _draw_batch(student, plan(student.config, SampleSettings()), torch.arange(2), None)
    theirs = drawn_by_diffusers(tmp_path / "out", student, 4)
    assert (ours - theirs).norm() <= 1e-5 * ours.norm()


def test_what_the_scheduler_says(tmp_path):
    student = student_of(teacher_of(tmp_path / "teacher"), 4).config
    written = write_scheduler(student.denoiser, student.sampling, "DDIMScheduler")
    expected = {"_class_name": "DDPMScheduler", "variance_type": "fixed_small", "timestep_spacing": "trailing"}
    expected |= {"clip_sample": False, "thresholding": False}
    assert expected.items() <= written.items()
    teacher = write_scheduler(DenoiserSettings("discrete"), SamplingSettings(), "DDPMScheduler")
    assert teacher["variance_type"] == "fixed_small" and teacher["timestep_spacing"] == "trailing"


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"student.schedule.name": "vp_cosine"}, "schedule vp_cosine"),
        ({"student.shift": 2.0}, "discrete shifted by 2"),
        ({"student.stochasticity": 0.5}, "stochasticity 0.5"),
        ({"student.steps": 61}, "61 steps are not so many"),
    ],
)
def test_students_that_diffusers_would_sample_otherwise(tmp_path, changes, words):
    student = student_of(teacher_of(tmp_path / "teacher"), **{"steps": changes.pop("student.steps", 4), **changes})
    with pytest.raises(ConfigError, match=words):
        write_diffusers(student.config, student.network.state_dict(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- the schedule `discrete`


@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "cosine"])
def test_the_grid_is_the_trailing_timesteps(betas):
    """Alpha-bar written out; Stable Diffusion's betas end at sigma 14.6, far from ddpm_linear's 152."""
    settings = preconditioning(DenoiserSettings("discrete", betas=betas, beta_start=0.00085, beta_end=0.012)).process
    assert settings.name == "discrete" and settings.betas == betas
    schedule = make_schedule(settings)
    model = type("Model", (), {"settings": DenoiserSettings("discrete", betas=betas, beta_start=0.00085, beta_end=0.012)})
    bar = torch.cumprod(1 - model_betas(model), 0)
    for k in (1, 2, 4, 8):
        timesteps = np.round(np.arange(1000, 0, -1000 / k)).astype(int) - 1
        t = torch.arange(k, 0, -1, dtype=torch.float64) / k
        torch.testing.assert_close(schedule.alpha(t), bar[timesteps].sqrt(), rtol=1e-9, atol=0)
        torch.testing.assert_close(schedule.sigma(t), (1 - bar[timesteps]).sqrt(), rtol=1e-9, atol=0)
    if betas == "scaled_linear":
        assert schedule.eta(torch.tensor(1.0, dtype=torch.float64)).item() == pytest.approx(14.6146, rel=1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_discrete_between_timesteps(shift):
    """log eta is linear between timesteps; below the first, eta is proportional to t; slopes and inverse agree with both."""
    schedule = make_schedule(ScheduleSettings("discrete", shift=shift))
    t = torch.tensor([0.0, 2e-4, 9e-4, 0.00123, 0.0456, 0.70033, 0.99951], dtype=torch.float64)
    eta = schedule.eta(t)
    torch.testing.assert_close(schedule.eta_inverse(eta), t, rtol=1e-10, atol=1e-15)
    knots = torch.tensor([0.5, 0.501], dtype=torch.float64)
    middle = schedule.eta(torch.tensor(0.5005, dtype=torch.float64))
    torch.testing.assert_close(middle.log(), schedule.eta(knots).log().mean())
    torch.testing.assert_close(eta[1] / eta[2], torch.tensor(2 / 9, dtype=torch.float64))
    torch.testing.assert_close(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, torch.ones_like(t))
    inside = t[1:]
    h = 1e-6 * inside
    for value, slope in ((schedule.alpha, schedule.d_alpha), (schedule.sigma, schedule.d_sigma)):
        numeric = (value(inside + h) - value(inside - h)) / (2 * h)
        torch.testing.assert_close(slope(inside), numeric, rtol=1e-5, atol=1e-6)
    assert (schedule.d_log_snr(torch.linspace(0.0005, 1, 777, dtype=torch.float64)) < 0).all()
    beyond = schedule.eta_inverse(torch.tensor([1e9, torch.inf], dtype=torch.float64))
    assert (beyond == 1).all()


def test_a_discrete_schedule_has_the_teachers_betas():
    """--schedule discrete says it by name only."""
    from mmgen.config.distill import StudentSettings, student_schedule

    teacher = DenoiserSettings("discrete", betas="scaled_linear", beta_start=0.00085, beta_end=0.012)
    named = student_schedule(StudentSettings(schedule=ScheduleSettings("discrete"), shift=2.0), teacher)
    assert named == replace(preconditioning(teacher).process, shift=2.0)


@pytest.mark.parametrize("wrong", [{"beta_start": 0.0}, {"beta_start": 0.03}, {"beta_end": 1.0}, {"num_timesteps": 1}])
def test_betas_that_cannot_be(wrong):
    with pytest.raises(ConfigError, match="schedule.beta_start"):
        make_schedule(ScheduleSettings("discrete", **wrong))
