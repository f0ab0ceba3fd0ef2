"""diffusers' text-to-image pipelines as teachers, every family with random weights: the same x_hat, guidance and samples as there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pipeline_calls import COUNT, called, drawn_by_mmgen, noises, open_pipeline, relative
from tiny_pipelines import KINDS, tiny_pipeline

import mmgen
from mmgen.encoders.text import described
from mmgen.networks.text import TextSettings
from mmgen.sampling.prompts import text_condition

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

PROMPTS = ["a red fox", "two!"]
FLOWS = ("sd3", "sana")
SMALL = [kind for kind in KINDS if kind != "pixart_alpha_1024"]


@pytest.fixture(scope="module", params=KINDS)
def opened(request, tmp_path_factory):
    """(kind, the pipeline, mmgen's teacher), both networks in float64."""
    folder = tiny_pipeline(request.param, tmp_path_factory.mktemp(request.param))
    model = mmgen.load(folder)
    model.network.double()
    return request.param, open_pipeline(folder, torch.float64), model


def as_ddim(pipe, kind):
    """The scheduler with which the pipeline's call is DDIM to the end of the noise, at trailing timesteps; a flow's own is Euler's."""
    config = pipe.scheduler.config
    if kind == "sd3":
        return diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
    if kind == "sana":
        return diffusers.DPMSolverMultistepScheduler.from_config(config, solver_order=1)
    keep = {"clip_sample": False, "set_alpha_to_one": True, "timestep_spacing": "trailing"}
    return diffusers.DDIMScheduler.from_config(config, **keep)


@pytest.mark.parametrize("w", [1.0, 3.0])
def test_x_hat_is_the_schedulers_pred_original_sample(opened, w):
    """At every step of a call; with w = 3 its network's output is the guided one."""
    kind, pipe, model = opened
    pipe.scheduler = as_ddim(pipe, kind)
    _, steps = called(pipe, kind, model, PROMPTS, 3, guidance_scale=w)
    condition = text_condition(model.config, PROMPTS, "", "cpu")
    assert len(steps) == 3
    for i, step in enumerate(steps):
        z, output = step.z.double(), step.output.double()
        if kind in FLOWS:
            sigma = pipe.scheduler.sigmas[i].double()
            expected, y, eta = z - sigma * output, z / (1 - sigma), sigma / (1 - sigma)
            if i == 0 and kind == "sd3":  # sigma 1, where the image is lost: the largest that mmgen knows
                y, eta = z * 1e8, torch.tensor(1e8, dtype=torch.float64)
        else:
            expected = pipe.scheduler.step(output, step.t, z).pred_original_sample
            bar = pipe.scheduler.alphas_cumprod[step.t].double().clamp(min=1e-16)
            y, eta = z / bar.sqrt(), ((1 - bar) / bar).sqrt()
        assert relative(model.denoise(y, eta.expand(COUNT), condition, w), expected) < 1e-5, (kind, i)


@pytest.mark.parametrize("w", [1.0, 3.0])
def test_ddim_is_the_pipelines_own_call(opened, w):
    kind, pipe, model = opened
    pipe.scheduler = as_ddim(pipe, kind)
    theirs, _ = called(pipe, kind, model, PROMPTS, 4, guidance_scale=w)
    grid = {"sd3": "linspace", "sana": "flow"}.get(kind, "uniform")
    ours = drawn_by_mmgen(model, PROMPTS, steps=4, guidance=w, sampler="ddim", grid=grid)
    assert relative(ours, theirs) < 1e-5
    other = drawn_by_mmgen(model, PROMPTS[::-1], steps=4, guidance=w, sampler="ddim", grid=grid)
    assert relative(other, theirs) > 1e-3  # the prompts matter


def test_negative_prompts(opened):
    kind, pipe, model = opened
    pipe.scheduler = as_ddim(pipe, kind)
    theirs, _ = called(pipe, kind, model, PROMPTS, 2, guidance_scale=2.0, negative_prompt=["three"] * 2)
    grid = {"sd3": "linspace", "sana": "flow"}.get(kind, "uniform")
    given = dict(steps=2, guidance=2.0, sampler="ddim", grid=grid)
    assert relative(drawn_by_mmgen(model, PROMPTS, negative="three", **given), theirs) < 1e-5
    assert relative(drawn_by_mmgen(model, PROMPTS, **given), theirs) > 1e-4


def test_no_condition_is_the_pipelines_null(opened):
    """The null is in the model, so that guidance 0 and no condition are the same."""
    kind, pipe, model = opened
    condition = text_condition(model.config, PROMPTS, "", "cpu")
    y, sigma = 2 * noises(model, 0), torch.full((COUNT,), 1.7, dtype=torch.float64)
    torch.testing.assert_close(model.denoise(y, sigma), model.denoise(y, sigma, condition, 0.0))


@pytest.mark.parametrize("kind", SMALL)
def test_in_float32_as_everybody_samples(tmp_path, kind):
    folder = tiny_pipeline(kind, tmp_path)
    model, pipe = mmgen.load(folder), open_pipeline(folder)
    pipe.scheduler = as_ddim(pipe, kind)
    theirs, _ = called(pipe, kind, model, PROMPTS, 4, guidance_scale=2.0)
    grid = {"sd3": "linspace", "sana": "flow"}.get(kind, "uniform")
    assert relative(drawn_by_mmgen(model, PROMPTS, steps=4, guidance=2.0, sampler="ddim", grid=grid), theirs) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_config_says(tmp_path, kind):
    """Read from the files, without loading an encoder; as encoding would have it."""
    folder = tiny_pipeline(kind, tmp_path)
    config = mmgen.load(folder).config
    found = described(TextSettings(encoder=str(Path(folder).absolute()), pipeline=config.text.pipeline))
    assert found == config.text
    assert config.latents.resolution == 2 * config.resolution and config.channels == 4
    assert config.sampling.guidance == {"sd15": 7.5, "sd21": 7.5, "sd21_zero_snr": 7.5, "sdxl": 5.0, "sd3": 7.0}.get(kind, 4.5)
    if kind in FLOWS:
        assert (config.denoiser.prediction, config.sampling.schedule.shift) == ("velocity", 3.0)
    else:
        assert config.denoiser.prediction == ("v" if kind.startswith("sd21") else "eps")
        assert config.denoiser.betas == ("linear" if kind.startswith("pixart") else "scaled_linear")
