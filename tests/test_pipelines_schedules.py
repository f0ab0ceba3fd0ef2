"""Schedules that pipelines bring: zero terminal SNR, and the times of flows as diffusers' schedulers space them."""

from __future__ import annotations

import pytest
import torch

from mmgen.diffusion.preconditioning import DenoiserSettings, check_settings, preconditioning
from mmgen.diffusion.schedules import ScheduleSettings, make_schedule
from mmgen.errors import ConfigError, ModelError
from mmgen.formats.diffusers_scheduler import read_flow, read_scheduler, write_flow
from mmgen.models.config import SamplingSettings
from mmgen.sampling.sigma_grids import sigma_grid

diffusers = pytest.importorskip("diffusers")

FLOW = DenoiserSettings("schedule", prediction="velocity", schedule=ScheduleSettings("fm"), sigma_max=1e8)
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def test_zero_terminal_snr_is_diffusers_rescaling():
    theirs = diffusers.DDIMScheduler(**SD, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    settings = read_scheduler({**theirs.config, "_class_name": "DDIMScheduler", "clip_sample": False}, "x")
    assert settings.zero_snr and settings.prediction == "v"
    table = preconditioning(settings).table(torch.device("cpu"))
    bar = theirs.alphas_cumprod.double()
    torch.testing.assert_close(1 / (1 + table**2), bar, rtol=2e-4, atol=1e-9)  # theirs in float32
    assert table[-1] == pytest.approx(1e8) and table[-2] == pytest.approx(2254, rel=0.01)
    schedule = make_schedule(preconditioning(settings).process)
    t = torch.tensor([0.3, 0.999, 0.9995, 1.0], dtype=torch.float64)
    torch.testing.assert_close(schedule.eta_inverse(schedule.eta(t)), t)
    plain = read_scheduler({**theirs.config, "_class_name": "DDIMScheduler", "rescale_betas_zero_snr": False}, "x")
    assert preconditioning(plain).table(torch.device("cpu"))[-1] == pytest.approx(14.6146, rel=1e-4)


def test_zero_terminal_snr_needs_v_or_x():
    with pytest.raises(ModelError, match="the noise says nothing of the image"):
        read_scheduler({"_class_name": "DDIMScheduler", **SD, "rescale_betas_zero_snr": True}, "x")
    with pytest.raises(ConfigError, match="denoiser.zero_snr needs"):
        check_settings(DenoiserSettings("discrete", zero_snr=True))
    check_settings(DenoiserSettings("discrete", prediction="x", zero_snr=True))


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 8, 28])
def test_grids_of_flows_are_diffusers_own(shift, steps):
    flow = {"linspace": diffusers.FlowMatchEulerDiscreteScheduler(shift=shift),
            "flow": diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)}
    for grid, scheduler in flow.items():
        scheduler.set_timesteps(steps)
        eta = torch.tensor(sigma_grid(FLOW, steps, grid, schedule=ScheduleSettings("fm", shift=shift)), dtype=torch.float64)
        torch.testing.assert_close(eta / (1 + eta), scheduler.sigmas.double(), rtol=0, atol=3e-7)
        denoiser, sampling = read_flow({**scheduler.config, "_class_name": type(scheduler).__name__}, "x")
        assert sampling == SamplingSettings(grid=grid, schedule=ScheduleSettings("fm", shift=shift))
        times = preconditioning(denoiser).time(eta[:-1].clamp(max=1e8))
        if grid == "linspace" or shift != 1:  # with shift 1, 999 may be 998.9999 in diffusers: see the next test
            torch.testing.assert_close(times, scheduler.timesteps.double(), rtol=1e-6, atol=0)


def test_a_grid_of_flows_is_for_flows():
    for grid, settings in (("flow", DenoiserSettings("discrete")), ("linspace", DenoiserSettings()), ("leading", FLOW)):
        with pytest.raises(ConfigError, match=f"the grid {grid} is for"):
            sigma_grid(settings, 4, grid)
    with pytest.raises(ConfigError, match="heun cannot take the first step"):
        sigma_grid(FLOW, 4, "flow", sampler="heun")


def student(steps: int, **changes) -> SamplingSettings:
    given = {"schedule": ScheduleSettings("fm", shift=3.0), "grid": "flow", "student_steps": steps}
    return SamplingSettings("ancestral", **{**given, **changes})


def test_written_flows_are_sampled_by_the_posterior():
    """One step of the scheduler against q(z_s | z_t, x_hat) in float64."""
    from mmgen.diffusion.process import posterior

    rounding = DenoiserSettings("schedule", prediction="velocity", schedule=ScheduleSettings("fm"), sigma_max=1e8, round_time=True)
    for steps in (1, 2, 4, 8):
        config = write_flow(student(steps), rounding)
        scheduler = diffusers.DPMSolverMultistepScheduler.from_config(config)
        scheduler.set_timesteps(steps)
        g = torch.Generator().manual_seed(0)
        for i, t in enumerate(scheduler.timesteps):
            z, u, noise = torch.randn(3, 1, 4, 8, 8, generator=g)
            found = scheduler.step(u, t, z, variance_noise=noise).prev_sample.double()
            high, low = (scheduler.sigmas[j : j + 1].double() for j in (i, i + 1))
            on_z, on_x, std = posterior(make_schedule(ScheduleSettings("fm")), low, high)
            x = z.double() - high * u.double()
            expected = on_z * z.double() + on_x * x + std * noise.double()
            assert (found - expected).norm() <= 1e-5 * expected.norm(), (steps, i)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"stochasticity": 0.5}, "stochasticity 0.5"),
        ({"schedule": ScheduleSettings("vp_cosine")}, "schedule vp_cosine"),
        ({"grid": "schedule"}, "other times"),
    ],
)
def test_flows_that_diffusers_would_sample_otherwise(changes, words):
    rounding = DenoiserSettings("schedule", prediction="velocity", schedule=ScheduleSettings("fm"), sigma_max=1e8, round_time=True)
    with pytest.raises(ConfigError, match=words):
        write_flow(student(4, **changes), rounding)


def test_steps_whose_times_diffusers_rounds_otherwise_are_refused():
    rounding = DenoiserSettings("schedule", prediction="velocity", schedule=ScheduleSettings("fm"), sigma_max=1e8, round_time=True)
    wrong = []
    for steps in range(1, 65):
        sampling = student(steps, schedule=ScheduleSettings("fm"))
        scheduler = diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
        scheduler.set_timesteps(steps)
        eta = torch.tensor(sigma_grid(rounding, steps, "flow", schedule=sampling.schedule)[:-1], dtype=torch.float64)
        same = torch.equal(preconditioning(rounding).time(eta).long(), scheduler.timesteps.long())
        try:
            write_flow(sampling, rounding)
            assert same, steps
        except ConfigError as error:
            assert not same and "rounds one of the times" in str(error), steps
            wrong.append(steps)
    assert wrong  # some there are


@pytest.mark.parametrize(
    "config, words",
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}, "use_dynamic_shifting = True"),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "UniPCMultistepScheduler of flows"),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True, "prediction_type": "epsilon"}, "prediction_type = 'epsilon'"),
    ],
)  # fmt: skip
def test_schedulers_that_cannot_be_expressed(config, words):
    with pytest.raises(ModelError, match=words):
        read_flow(config, "the folder")
