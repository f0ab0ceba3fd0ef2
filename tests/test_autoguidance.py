"""Guidance away from a worse version of the model: against the closed form of normal data, where it acts, what is recorded."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tiny_model import awaken, changed, make_denoiser, make_model
from toy_distill import config_for, digits, place, run, task_for, toy_teacher  # noqa: F401
from typer.testing import CliRunner

import mmgen
from mmgen.cli import app
from mmgen.diffusion.preconditioning import DenoiserSettings, preconditioning
from mmgen.errors import ConfigError
from mmgen.methods.distill.instant import TeacherFunction
from mmgen.methods.distill.method import find_teacher
from mmgen.models.autoguidance import autoguided, check_guide
from mmgen.models.denoiser import Denoiser
from mmgen.models.files import load_model, read_config
from mmgen.sampling import drawing
from mmgen.sampling.denoiser_samplers import heun
from mmgen.sampling.drawing import SampleSettings, plan
from mmgen.sampling.guidance import Guide
from mmgen.sampling.guidance_interval import weights

EDM = DenoiserSettings()


class NormalData(torch.nn.Module):
    """The network whose EDM denoiser is exact for data N(0, std^2): x_hat = y std^2 / (std^2 + sigma^2)."""

    def __init__(self, std):
        super().__init__()
        self.std, self.weight = std, torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x, t, s=None, condition=None):
        sigma = (4 * t).exp()  # c_noise = log(sigma) / 4
        c_skip, c_out, c_in, _ = preconditioning(EDM)(sigma)
        return ((self.std**2 / (self.std**2 + sigma**2) - c_skip) / c_out / c_in)[:, None, None, None] * x


@pytest.fixture(scope="module")
def normal(tmp_path_factory):
    """Denoisers of normal data with standard deviation 0.5, and, as a worse model has it, 0.8."""
    config = read_config(make_denoiser(tmp_path_factory.mktemp("normal") / "m.safetensors", EDM, channels=1))
    return Denoiser(config, NormalData(0.5)), Denoiser(config, NormalData(0.8))


@pytest.mark.parametrize("w, interval", [(2.0, ()), (3.0, (0.2, 2.0))])
def test_guided_sampling_is_the_solution_of_the_guided_ode(normal, w, interval):
    """d log y / d sigma = w sigma / (s1^2 + sigma^2) + (1 - w) sigma / (s0^2 + sigma^2), where it is guided; else w = 1."""
    def shrunk(std, high, low):
        return ((std**2 + low**2) / (std**2 + high**2)) ** 0.5

    sigmas = torch.cat([torch.logspace(1, -3, 300, dtype=torch.float64), torch.zeros(1)]).tolist()
    y = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    found = heun(autoguided(*normal), y, sigmas, None, weights(interval, w), None)
    expected = y
    for high, low, v in ((10, 2, 1), (2, 0.2, w), (0.2, 0, 1)) if interval else ((10, 0, w),):
        expected = expected * shrunk(0.5, high, low) ** v * shrunk(0.8, high, low) ** (1 - v)
    assert ((found - expected).norm() / expected.norm()).item() < (0.02 if interval else 1e-3)  # a step of 3 % crosses each end


def test_each_image_may_have_its_own_weight(normal):
    y, sigma, w = torch.randn(3, 1, 8, 8, dtype=torch.float64), 0.7, torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)
    good, bad = (0.25 / (0.25 + 0.49), 0.64 / (0.64 + 0.49))
    expected = (bad + w * (good - bad))[:, None, None, None] * y
    assert torch.allclose(autoguided(*normal).denoise(y, sigma, guidance=w), expected, rtol=1e-6, atol=0)


def test_a_clipped_denoiser_is_clipped_once(normal):
    config = replace(normal[0].config, denoiser=replace(EDM, clip=True))
    model = autoguided(Denoiser(config, normal[0].network), Denoiser(config, normal[1].network))
    y = torch.full((1, 1, 8, 8), 1.3, dtype=torch.float64)
    good, bad = (1.3 * 0.25 / (0.25 + 0.04), 1.3 * 0.64 / (0.64 + 0.04))
    assert bad > good > 1 > 3 * good - 2 * bad
    assert model.denoise(y, 0.2, guidance=3.0)[0, 0, 0, 0].item() == pytest.approx(3 * good - 2 * bad, rel=1e-6)
    assert model.denoise(2 * y, 0.2, guidance=3.0).max() == 1


@pytest.fixture(scope="module", params=[make_model, make_denoiser])
def models(request, tmp_path_factory):
    """A random model without a null, and one with other weights as its guide."""
    folder, more = tmp_path_factory.mktemp("models"), {"channels": 1, "num_classes": 10, "null_trained": False}
    model, other = (awaken(request.param(folder / f"{name}.safetensors", **more)) for name in ("model", "guide"))
    return model, changed(other)


def images(model, **settings):
    return mmgen.load(model).sample(4, steps=3, seed=1, **settings).images


def test_the_guide_is_compiled_as_well(models, monkeypatch):
    compiled = []
    monkeypatch.setattr(drawing, "compile_network", compiled.append)
    model, guide = load_model(models[0]), load_model(models[1])
    drawing.draw(model, SampleSettings(steps=2, guidance=2.0, guide=Guide("guide", "", guide), compile=True), range(2))
    assert compiled == [model.network, guide.network]


def test_the_model_itself_guides_nowhere_and_another_does(models):
    model, other = models
    plain = images(model)
    assert (images(model, guidance=3.0, guide=model).int() - plain.int()).abs().max() <= 1
    assert (images(model, guidance=3.0, guide=other).int() - plain.int()).abs().max() > 10
    assert torch.equal(images(model, guidance=3.0, guide=other, guidance_interval=(1e8, 1e9)), plain)


def test_f_of_a_flow_map_is_led(tmp_path):
    paths = [awaken(make_model(tmp_path / f"{i}.safetensors", channels=1)) for i in range(2)]
    model, guide = load_model(paths[0]), load_model(changed(paths[1]))
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    good, bad = model.f(x, 0.2, 0.8), guide.f(x, 0.2, 0.8)
    assert torch.allclose(autoguided(model, guide).f(x, 0.2, 0.8, guidance=2.5), 2.5 * good - 1.5 * bad, rtol=0, atol=1e-9)
    assert not torch.allclose(good, bad)


def test_it_costs_a_second_evaluation_and_needs_neither_classes_nor_a_null(models, tmp_path):
    model, other = models
    config, guide = read_config(model), Guide.of(other)
    once = plan(config, SampleSettings(steps=4)).nfe
    assert plan(config, SampleSettings(steps=4, guidance=2.0, guide=guide)).nfe == 2 * once
    assert plan(config, SampleSettings(steps=4, guidance=2.0, guide=guide, guidance_interval=(0.3, 3))).nfe < 2 * once
    with pytest.raises(ConfigError, match="label dropout"):
        plan(config, SampleSettings(guidance=2.0))
    free = replace(config, num_classes=0)
    with pytest.raises(ConfigError, match="or a guide"):
        plan(free, SampleSettings(guidance=2.0))
    with pytest.raises(ConfigError, match="a guide needs guidance"):
        plan(config, SampleSettings(guide=guide))


def test_what_is_no_version_of_the_model_is_named(models, tmp_path):
    config = read_config(models[0])
    for changes, name in (({"channels": 3}, "channels"), ({"resolution": 16}, "resolution"), ({"num_classes": 0}, "num_classes")):
        with pytest.raises(ConfigError, match=f"differs from the model in {name}"):
            check_guide(config, replace(config, **changes))
    kinds = read_config(make_model(tmp_path / "a.safetensors", channels=1)), read_config(make_denoiser(tmp_path / "b.safetensors", channels=1))
    with pytest.raises(ConfigError, match="a denoiser by a denoiser"):
        check_guide(*kinds)
    with pytest.raises(ConfigError, match="randomness of its own"):
        check_guide(kinds[1], replace(kinds[1], denoiser=replace(kinds[1].denoiser, noise_channels=1)))
    with pytest.raises(ConfigError, match="flow.schedule"):
        check_guide(kinds[0], replace(kinds[0], flow=replace(kinds[0].flow, schedule="vp_cosine")))


def test_the_record_says_it_and_other_samples_do_not_join(models, tmp_path):
    model, other = models
    sample = ["sample", str(model), "--num", "2", "--steps", "2", "--guidance", "2", "--out", str(tmp_path / "s")]
    first = CliRunner().invoke(app, [*sample, "--guide", str(other)])
    assert first.exit_code == 0, first.output
    record = json.loads((tmp_path / "s/samples.json").read_text())
    assert record["guide"] == str(other) and record["guide_sha256"] == Guide.of(other).sha256
    again = CliRunner().invoke(app, [*sample, "--guide", str(model)])
    assert again.exit_code != 0 and "the guide would be" in again.output + str(again.exception)
    none = CliRunner().invoke(app, [*sample, "--guide", str(tmp_path / "none")])
    assert none.exit_code != 0 and "there is no" in none.output + str(none.exception)


def test_scores_of_a_sweep_have_a_row_without(models, tmp_path):
    model, other = models
    report = mmgen.fid(model, guide=other, guidance=[1, 2], steps=2, num=80, features="pixels", ref="digits", batch_size=80)
    assert [(row.subject.record["guidance"], row.subject.record["guide"]) for row in report.rows] == [(1, None), (2, str(other))]


# ---------------------------------------------------------------------- as a teacher's guidance


@pytest.fixture(scope="module")
def guide(place, tmp_path_factory):  # noqa: F811
    """The toy teacher with other weights."""
    return changed(toy_teacher(tmp_path_factory.mktemp("guide")))


def test_the_teacher_is_led_away_from_its_guide(place, guide):  # noqa: F811
    changes = {"teacher.guide": str(guide), "teacher.guidance": 2.0, "teacher.guidance_interval": [0.5, 5]}
    task, teacher = task_for(place, **changes)
    used = next(iter(task.trained.values())).objective.matching
    noised = used.noised(digits())
    with torch.no_grad():
        good, bad = (m.x_hat(noised.z_t, noised.s, used.schedule, noised.condition) for m in (teacher.model, load_model(guide)))
        sigma = used.schedule.eta(noised.s)
        w = torch.where((sigma > 0.5) & (sigma <= 5), 2.0, 1.0)[:, None, None, None]
        assert 0 < (w == 1).sum() < 16
        expected = bad + w * (good - bad)
        assert torch.allclose(used.teacher_x(noised.z_t, noised), expected, rtol=0, atol=1e-6)
        function = TeacherFunction(used)
        assert torch.allclose(function.at(noised.z_t, noised)(function.parameters), expected, rtol=0, atol=1e-6)
    assert function.parameters.keys() == dict(teacher.model.network.named_parameters()).keys()  # the guide is not moved along


def test_a_student_says_what_its_teacher_was_led_away_from(place, guide, tmp_path):  # noqa: F811
    changes = {"teacher.guide": str(guide), "teacher.guidance": 2.0, "train.max_images": 32}
    outcome = run(place, tmp_path / "run", **changes)
    origin = read_config(tmp_path / "run/model.safetensors").training["distilled"]
    assert outcome.finished and origin["guide"] == str(guide) and origin["guide_sha256"] == Guide.of(guide).sha256
    assert load_file(tmp_path / "run/model.safetensors").keys() == load_file(place).keys()
    with pytest.raises(ConfigError, match="teacher.guide needs teacher.guidance"):
        config_for(place, **{"teacher.guide": str(guide)})
    with pytest.raises(ConfigError, match="differs from the model in num_classes"):
        find_teacher(config_for(place, **changes | {"teacher.guide": str(make_denoiser(tmp_path / "o.safetensors", EDM, channels=1))}))


def test_a_steps_cost_counts_the_guide():
    from mmgen.config.distill import resolve
    from mmgen.methods.distill.method import TRAINING

    for method in ("alternating", "instant"):
        plain, led = (
            TRAINING.work(resolve({"teacher": table, "loss": {"method": method}}))[0] for table in ({}, {"guidance": 2.0, "guide": "bad"})
        )
        assert (led.forward, led.backward, led.frozen) == (plain.forward + 1, plain.backward, plain.frozen + 1)
