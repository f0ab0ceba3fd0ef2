"""Sampling of models of a schedule and of students: algorithm 1 of Moment Matching Distillation, in its own coordinates."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
import typer
from test_denoiser import KINDS, MEAN, STD, TINY, Ideal, gaussian
from tiny_model import make_denoiser
from torch import nn
from typer.testing import CliRunner

from mmgen.cli import app
from mmgen.cli.sample import sample
from mmgen.models.denoiser import Denoiser, DenoiserSettings
from mmgen.diffusion.process import posterior
from mmgen.sampling.denoiser_samplers import start
from mmgen.sampling.sigma_grids import PURE_NOISE, sigma_grid
from mmgen.errors import ConfigError
from mmgen.models.config import ModelConfig, SamplingSettings
from mmgen.networks import UNetSettings
from mmgen.system.random import keys, normal
from mmgen.sampling.record import difference
from mmgen.sampling.drawing import SampleSettings, _draw_batch, draw, plan
from mmgen.diffusion.schedules import ScheduleSettings, make_schedule

SHAPE = (3, 4, 4)
PROCESSES = {
    word + ("" if shift == 1 else f"-{shift}"): ScheduleSettings(word, shift)
    for word, shift in (("vp_cosine", 1), ("vp_cosine", 0.5), ("fm", 1), ("fm", 3), ("ddpm_linear", 1), ("edm", 1))
}


class Bent(Denoiser):
    """A denoiser whose x_hat is not linear, in float64, and depends on all that it is given; it has no trained weights."""

    def denoise(self, y, sigma, condition=None, guidance=1.0, noise=None, *, clip=True):
        assert (sigma >= self.range[0]).all() and (sigma <= self.range[1]).all()
        sigma = sigma[:, None, None, None]
        own = 0.0 if noise is None else 0.1 * normal(noise, y.shape[1:], torch.float64)
        return 0.7 * torch.tanh(y / (0.5 + sigma)) + 0.1 * torch.sin(3 * sigma) + own


def config(denoiser: DenoiserSettings = DenoiserSettings(), **sampling) -> ModelConfig:
    network = UNetSettings(model_channels=16, channel_mult=(1,), num_blocks=1, attn_resolutions=(), dropout=0.1)
    return ModelConfig(network, None, 4, 3, denoiser=denoiser, sampling=SamplingSettings(**sampling))


def own(process: ScheduleSettings, **options) -> DenoiserSettings:
    return DenoiserSettings("schedule", prediction="v", schedule=process, **options)


def f64(value: float, count: int = 2) -> torch.Tensor:
    return torch.full((count,), value, dtype=torch.float64)


def in_z(model: Denoiser, process: ScheduleSettings, steps: int, seed: int, index: list[int], stochasticity: float = 1.0):
    """Algorithm 1 written out: z_1, then x_hat and the posterior at t = 1, (k - 1)/k, ..., 1/k."""
    schedule = make_schedule(process)
    z = normal(keys(seed, index, 2), SHAPE, torch.float64) * (process.sigma_max if process.name == "edm" else 1)
    for i in range(steps):
        t, s = f64(1 - i / steps), f64(1 - (i + 1) / steps)
        noise = keys(seed, index, 10_000 + i) if model.is_random else None
        x = model.x_hat(z, t, schedule, noise=noise)
        on_z, on_x, std = (value[:, None, None, None] for value in posterior(schedule, s, t, stochasticity=stochasticity))
        z = on_z * z + on_x * x
        if i < steps - 1:
            z = z + std * normal(keys(seed, index, 3 + i), SHAPE, torch.float64)
    return x


TEACHERS = {
    "own": lambda process: own(process), "wide": lambda process: own(process, sigma_min=1e-4, sigma_max=1e4),
    "edm": lambda process: DenoiserSettings("edm"), "discrete": lambda process: DenoiserSettings("discrete"),
    "random": lambda process: own(process, noise_dropout=True),
}  # fmt: skip


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("name", PROCESSES)
def test_draw_is_algorithm_1_in_the_coordinates_of_the_process(name, teacher):
    """Also where the process begins beyond what the model was trained at: as training has it, exactly."""
    process = PROCESSES[name]
    settings = TEACHERS[teacher](process)
    for stochasticity, steps in itertools.product((1.0, 0.5, 0.0), (1, 2, 8)):
        model = Bent(config(settings, sampler="ancestral", schedule=process, student_steps=8, stochasticity=stochasticity))
        chosen = plan(model.config, SampleSettings(steps=steps, seed=5))
        found = _draw_batch(model, chosen, torch.tensor([3, 11]), None)
        expected = in_z(model, process, steps, 5, [3, 11], stochasticity)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", PROCESSES)
def test_a_teacher_of_the_schedule_is_sampled_alike(name):
    """By ancestral on its default grid; and by ddim, which is the same without stochasticity."""
    process = PROCESSES[name]
    model = Bent(config(own(process)))
    assert plan(model.config, SampleSettings()).sampler == "ddim"
    for sampler, stochasticity in (("ancestral", 1.0), ("ddim", 0.0)):
        chosen = plan(model.config, SampleSettings(steps=8, seed=5, sampler=sampler))
        found = _draw_batch(model, chosen, torch.tensor([3, 11]), None)
        torch.testing.assert_close(found, in_z(model, process, 8, 5, [3, 11], stochasticity), rtol=0, atol=1e-9)


def test_the_grid():
    edm = sigma_grid(DenoiserSettings(), 8, schedule=ScheduleSettings("edm"))
    np.testing.assert_allclose(edm, [80, 39.02, 17.53, 7.10, 2.515, 0.743, 0.170, 0.0261, 0], rtol=2.5e-3)
    flow = sigma_grid(own(PROCESSES["fm"]), 4)
    np.testing.assert_allclose(flow, [PURE_NOISE, 3, 1, 1 / 3, 0], rtol=1e-12)
    assert sigma_grid(own(PROCESSES["fm"]), 4, "uniform") == flow == sigma_grid(DenoiserSettings(), 4, schedule=PROCESSES["fm"])
    cosine = sigma_grid(DenoiserSettings("discrete"), 4, "schedule", schedule=PROCESSES["vp_cosine"])
    np.testing.assert_allclose(cosine, [PURE_NOISE, *(math.tan(math.pi / 2 * t) for t in (0.75, 0.5, 0.25)), 0], rtol=1e-12)
    linear = sigma_grid(own(PROCESSES["ddpm_linear"]), 2)
    assert linear[0] == pytest.approx(152.2, abs=0.05)
    # heun takes none of the long first steps
    assert sigma_grid(own(PROCESSES["fm"]), 5, sampler="heun")[:5:4] == [80.0, 0.002]
    for given, grid in ((own(PROCESSES["fm"]), "uniform"), (DenoiserSettings(), "schedule")):
        with pytest.raises(ConfigError, match=f"heun cannot take the first step of this model's {grid} grid"):
            sigma_grid(given, 5, grid, sampler="heun", schedule=PROCESSES["vp_cosine"])
    assert sigma_grid(DenoiserSettings(), 8, "schedule", sampler="heun", schedule=ScheduleSettings("edm")) == edm
    with pytest.raises(ConfigError, match="for students"):
        sigma_grid(DenoiserSettings(), 4, "schedule")


def test_where_y_begins():
    """z = noise where the variance is preserved, sigma noise elsewhere."""
    noise = torch.randn(2, *SHAPE, dtype=torch.float64)
    for name, factor in (("vp_cosine", math.sqrt(26)), ("ddpm_linear", math.sqrt(26)), ("fm", 5.0), ("edm", 5.0)):
        assert torch.equal(start(own(PROCESSES[name]), 5.0, noise), factor * noise)
        assert torch.equal(start(DenoiserSettings("discrete"), 5.0, noise, PROCESSES[name]), factor * noise)


@pytest.mark.parametrize("name", ["vp_cosine", "fm-3", "ddpm_linear"])
def test_all_samplers_draw_the_data(name):
    """From the ideal network of Gaussian data, its mean and deviation come out."""
    schedule = make_schedule(PROCESSES[name])

    def output(z, time):
        a, s = schedule.alpha(time / 1000), schedule.sigma(time / 1000)
        x = gaussian(z / a, s / a)
        return a * (z - a * x) / s - s * x

    model = Denoiser(ModelConfig(TINY, None, 4, 3, denoiser=own(PROCESSES[name])), Ideal(output))
    for sampler, steps in (("ddim", 60), ("ancestral", 250), ("heun", 30)):
        pixels = draw(model, SampleSettings(steps=steps, sampler=sampler), range(40))[0].double() / 127.5 - 1
        assert pixels.mean().item() == pytest.approx(MEAN, abs=0.05) and pixels.std().item() == pytest.approx(STD, rel=0.1)


def test_a_student_knows_its_steps():
    student = config(own(PROCESSES["fm"]), schedule=PROCESSES["fm"], student_steps=8)
    chosen = plan(student, SampleSettings())
    assert (chosen.sampler, chosen.steps, chosen.nfe, chosen.stochasticity, chosen.notes) == ("ancestral", 8, 8, 1.0, ())
    (note,) = plan(student, SampleSettings(steps=3)).notes
    assert "distilled for 8 steps" in note and "of 3 may" in note
    (note,) = plan(student, SampleSettings(sampler="ddim")).notes
    assert "sampler ancestral" in note and plan(student, SampleSettings(sampler="ddim")).steps == 8
    (note,) = plan(student, SampleSettings(grid="edm")).notes
    assert "grid schedule" in note
    assert len(plan(student, SampleSettings(sampler="heun", steps=4)).notes) == 2
    assert plan(config(), SampleSettings(steps=3)).notes == ()
    half = config(own(PROCESSES["fm"]), schedule=PROCESSES["fm"], student_steps=1, stochasticity=0.5)
    assert (
        plan(half, SampleSettings()).stochasticity == 0.5 and plan(half, SampleSettings(stochasticity=0.2)).stochasticity == 0.2
    )
    assert plan(half, SampleSettings(sampler="heun")).stochasticity == 1.0
    assert "for 1 step," in plan(half, SampleSettings(steps=2)).notes[0]


def test_impossible_plans_are_refused():
    from mmgen.diffusion.flow_map import FlowMapSettings

    flow_map = ModelConfig(TINY, FlowMapSettings(t_min=0.006, t_max=0.994), 4, 3, sampling=SamplingSettings(student_steps=2))
    refused = [
        (config(), {"stochasticity": 0.5}, "only the sampler ancestral"),
        (config(sampler="ddim", stochasticity=0.5), {}, "sampling.stochasticity is for the sampler ancestral"),
        (config(sampler="ancestral"), {"stochasticity": 1.5}, "from 0"),
        (config(sampler="ancestral"), {"stochasticity": math.nan}, "from 0"), (config(), {"grid": "schedule"}, "unknown grid"),
        (config(grid="schedule"), {}, "needs sampling.schedule"), (config(student_steps=4), {}, "needs sampling.schedule"),
        (config(schedule=PROCESSES["fm"], student_steps=0), {}, "at least 1"), (flow_map, {}, "a flow map is none"),
    ]  # fmt: skip
    for given, options, said in refused:
        with pytest.raises(ConfigError, match=said):
            plan(given, SampleSettings(**options))


@pytest.mark.parametrize("own_noise", [{"noise_channels": 2}, {"noise_dropout": True}], ids=["channels", "dropout"])
def test_a_students_image_does_not_depend_on_the_batch(own_noise):
    """And it does on what the student draws itself: with one seed its first noise is the same, its images are not."""
    model = Denoiser(config(own(PROCESSES["vp_cosine"], **own_noise), schedule=PROCESSES["vp_cosine"], student_steps=2))
    torch.manual_seed(0)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.3)
    model.eval()
    images, _ = draw(model, SampleSettings(seed=3), range(20))
    for indices, size in (([17], 256), (list(range(20)), 7), ([19, 0], 1)):
        again, _ = draw(model, SampleSettings(seed=3, batch_size=size), indices)
        assert (again.int() - images[indices].int()).abs().max() <= 1  # rounding in the network's last bits
    index, first = torch.arange(2), normal(keys(3, torch.arange(2), 2), SHAPE, torch.float64)
    drawn = [model.x_hat(first, f64(1.0), make_schedule(PROCESSES["vp_cosine"]), noise=keys(3, index, p)) for p in (1, 2)]
    assert (drawn[0] - drawn[1]).abs().mean() > 1e-3


# The command line


def run(*arguments):
    alone = typer.Typer()
    alone.command()(sample)
    result = CliRunner().invoke(alone, [str(a) for a in arguments])
    if result.exception is not None:
        raise result.exception
    return result


def notes_of(result) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.startswith("note: ")]


def test_sample_command(tmp_path):
    process = PROCESSES["vp_cosine"]
    path = make_denoiser(
        tmp_path / "s.safetensors", own(process), channels=1, sampling=SamplingSettings(schedule=process, student_steps=8)
    )
    out = tmp_path / "out"
    assert notes_of(run(path, "--num", 2, "--out", out)) == []
    record = json.loads((out / "samples.json").read_text())
    wanted = {"sampler": "ancestral", "steps": 8, "nfe": 8, "grid": "default", "stochasticity": None, "notes": []}
    assert wanted.items() <= record.items() and record["times"] == sigma_grid(own(process), 8)
    said = notes_of(run(path, "--num", 2, "--out", tmp_path / "many", "--steps", "3,8,2", "--stochasticity", 0.5))
    assert [line.split(",")[0] for line in said] == ["note: this student was distilled for 8 steps"] * 2
    record = json.loads((tmp_path / "many/steps-3/samples.json").read_text())
    assert record["stochasticity"] == 0.5 and "distilled for 8 steps" in record["notes"][0]
    with pytest.raises(ConfigError, match="stochasticity would be 0.5, not None"):
        run(path, "--num", 2, "--out", out, "--stochasticity", 0.5)
    run(path, "--num", 2, "--out", out, "--stochasticity", 1, "--grid", "schedule")  # what it is by default
    with pytest.raises(ConfigError, match="only the sampler ancestral"):
        run(path, "--num", 2, "--out", tmp_path / "x", "--stochasticity", 0.5, "--sampler", "ddim")


def test_records_from_before_students_are_continued():
    new = {"stochasticity": None, "steps": 4}
    assert difference({"steps": 4}, new) is None and "stochasticity" in difference({"steps": 4}, {**new, "stochasticity": 0.5})
    assert set(KINDS)  # and the models of others have no notes
    for name, (given, _) in KINDS.items():
        assert plan(config(given), SampleSettings(steps=2)).notes == (), name


def test_fid_says_the_same_and_takes_stochasticity(own_cache, tmp_path):
    process = PROCESSES["vp_cosine"]
    path = make_denoiser(
        tmp_path / "s.safetensors", own(process), channels=1, sampling=SamplingSettings(schedule=process, student_steps=8)
    )
    scores = tmp_path / "scores.json"
    command = ["fid", path, "--ref", "digits", "--features", "pixels", "--num", 32, "--steps", "3,8", "--stochasticity", 0.5]
    result = CliRunner().invoke(app, [*map(str, command), "--out", str(scores)])
    assert result.exit_code == 0, result.output
    assert [line.split(",")[0] for line in notes_of(result) if "distilled" in line] == [
        "note: this student was distilled for 8 steps"
    ]
    assert [one["samples"]["stochasticity"] for one in json.loads(scores.read_text())["scores"]] == [0.5, 0.5]
