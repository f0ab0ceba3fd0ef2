"""Guidance at some noise levels only: where it acts, what it costs, and what of it is recorded."""

import json

import pytest
import torch
from tiny_model import awaken, make_denoiser, make_model
from typer.testing import CliRunner

import mmgen
from mmgen.cli import app
from mmgen.diffusion.flow_map import FlowMapSettings
from mmgen.diffusion.schedules import ScheduleSettings, make_schedule
from mmgen.errors import ConfigError
from mmgen.methods.distill.matching import Matching, Noised
from mmgen.models.files import read_config
from mmgen.sampling.denoiser_samplers import SAMPLERS
from mmgen.sampling.drawing import SampleSettings, plan
from mmgen.sampling.guidance_interval import check_interval, weight_at, weights


class Recorder:
    """A denoiser whose x_hat is 0; it notes sigma and w."""

    def __init__(self):
        from mmgen.diffusion.preconditioning import DenoiserSettings

        self.settings, self.asked = DenoiserSettings(), []

    def denoise(self, y, sigma, condition, guidance, clip=True):
        self.asked.append((round(sigma[0].item(), 6), guidance))
        return torch.zeros_like(y)


@pytest.mark.parametrize("name, expected", [
    ("ddim", [(10, 1), (3, 2.5), (1, 2.5), (0.2, 1)]),
    ("ancestral", [(10, 1), (3, 2.5), (1, 2.5), (0.2, 1)]),
    ("heun", [(10, 1), (3, 2.5), (3, 2.5), (1, 2.5), (1, 2.5), (0.2, 1), (0.2, 1)]),
])  # fmt: skip
def test_samplers_guide_inside_the_interval_alone(name, expected):
    model, y = Recorder(), torch.ones(1, 1, 2, 2, dtype=torch.float64)
    SAMPLERS[name](model, y, [10, 3, 1, 0.2, 0], None, weights((0.5, 5), 2.5), lambda i: torch.zeros_like(y))
    assert model.asked == expected


def test_the_upper_end_belongs_to_it_and_the_lower_does_not():
    assert [weight_at((1, 2), 3.0, sigma) for sigma in (1, 1.01, 2, 2.01)] == [1, 3, 3, 1]
    assert weight_at((), 3.0, 1e9) == 3


def test_times_of_flow_maps_are_told_by_eta():
    flow = FlowMapSettings(schedule="fm", t_min=0.006, t_max=0.994)
    weight = weights((0.5, 5), 2.0, flow)
    assert [weight(t) for t in (0.2, 0.5, 0.8, 0.9)] == [1, 2, 2, 1]  # eta = t / (1 - t): 0.25, 1, 4, 9


@pytest.mark.parametrize("interval", [(1.0,), (2.0, 1.0), (-1.0, 2.0), (1.0, 2.0, 3.0)])
def test_what_is_no_interval_is_named(interval):
    with pytest.raises(ConfigError, match="LOW,HIGH with 0 <= LOW < HIGH"):
        check_interval(interval)


@pytest.fixture(scope="module", params=[make_model, make_denoiser])
def model(request, tmp_path_factory):
    """A random model of classes whose images depend on them."""
    return awaken(request.param(tmp_path_factory.mktemp("model") / "model.safetensors", channels=1, num_classes=10, null_trained=True))


def images(model, **settings):
    return mmgen.load(model).sample(4, steps=4, seed=1, **settings).images


def test_everywhere_is_no_interval_and_nowhere_is_no_guidance(model):
    everywhere = images(model, guidance=3.0)
    assert torch.equal(images(model, guidance=3.0, guidance_interval=(0, 1e9)), everywhere)
    assert torch.equal(images(model, guidance=3.0, guidance_interval=(1e8, 1e9)), images(model))
    some = images(model, guidance=3.0, guidance_interval=(0.3, 2))
    assert not torch.equal(some, everywhere) and not torch.equal(some, images(model))


def test_a_step_outside_costs_one_evaluation(model):
    config = read_config(model)
    whole, none = plan(config, SampleSettings(steps=4, guidance=3.0)), plan(config, SampleSettings(steps=4))
    part = plan(config, SampleSettings(steps=4, guidance=3.0, guidance_interval=(0.3, 3)))
    assert none.nfe < part.nfe < whole.nfe == 2 * none.nfe
    with pytest.raises(ConfigError, match="needs guidance"):
        plan(config, SampleSettings(guidance_interval=(0.3, 3)))


def test_the_record_says_it_and_other_samples_do_not_join(model, tmp_path):
    sample = ["sample", str(model), "--num", "2", "--steps", "2", "--guidance", "2", "--out", str(tmp_path / "s")]
    first = CliRunner().invoke(app, [*sample, "--guidance-interval", "0.3,3"])
    assert first.exit_code == 0, first.output
    assert json.loads((tmp_path / "s/samples.json").read_text())["guidance_interval"] == [0.3, 3]
    other = CliRunner().invoke(app, [*sample, "--guidance-interval", "0.3,4"])
    assert other.exit_code != 0 and "guidance interval" in other.output + str(other.exception)


def test_a_teacher_is_guided_inside_its_interval():
    matching = Matching.__new__(Matching)
    matching.schedule, matching.guidance, matching.guidance_range = make_schedule(ScheduleSettings(name="fm")), 2.0, ()
    s = torch.tensor([0.2, 0.5, 0.8, 0.9], dtype=torch.float64)
    noised = Noised(None, None, s, None, None)
    matching.guidance_interval = ()
    assert matching.guidance_of(noised) == 2.0
    matching.guidance_interval = (0.5, 5)
    assert matching.guidance_of(noised).tolist() == [1, 2, 2, 1]
