"""Time grids, the two samplers, and which random numbers, labels and evaluations an image costs."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from diffusion_tools import Counting

from mmgen.diffusion.process import diffuse
from mmgen.errors import ConfigError
from mmgen.diffusion.flow_map import FlowMapSettings
from mmgen.models.config import ModelConfig, SamplingSettings
from mmgen.models.flow_model import FlowModel
from mmgen.models.pixels import to_uint8
from mmgen.networks import UNetSettings
from mmgen.networks.conditions import Labels
from mmgen.system.random import keys, normal
from mmgen.sampling.flow_map_samplers import SAMPLERS, restart, time_grid
from mmgen.sampling.drawing import SampleSettings, draw, draw_condition, plan

CIFAR = FlowMapSettings(t_min=0.006, t_max=0.994)
LATENT = FlowMapSettings(t_min=0.0, t_max=0.994)
TINY = UNetSettings(model_channels=16, channel_mult=(1,), num_blocks=1, attn_resolutions=(), dropout=0.0)


def model(num_classes: int = 0, flow: FlowMapSettings = CIFAR, **options) -> FlowModel:
    config = ModelConfig(TINY, flow, resolution=4, channels=3, num_classes=num_classes, **options)
    return FlowModel(config, Counting(num_classes))


def grid(*arguments, **options) -> torch.Tensor:
    return torch.tensor(time_grid(*arguments, **options), dtype=torch.float64)


def close(found, expected, atol):
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=atol)


def test_grids_of_the_paper():
    """Section 3 of the facts; half a unit of the last decimal where they are printed."""
    assert time_grid(CIFAR, 1) == [0.994, 0.006]
    close(grid(CIFAR, 2), [0.994, 0.583333, 0.006], 5e-7)
    close(grid(LATENT, 2, "uniform"), [0.994, 0.497, 0.0], 1e-15)
    close(grid(LATENT, 4), [0.994, 0.7455, 0.497, 0.2485, 0.0], 1e-15)
    close(grid(LATENT, 8), [0.994 - i * 0.12425 for i in range(9)], 1e-15)
    close(grid(LATENT, 4, "edm"), [0.994, 0.95674, 0.56413, 0.01001, 0.0], 5e-6)
    close(grid(FlowMapSettings("vp_cosine", t_min=0.006, t_max=0.996), 2), [0.996, 0.605137, 0.006], 5e-7)
    close(grid(CIFAR, 3, "eta", (9.0, 1.0)), [0.994, 0.9, 0.5, 0.006], 1e-15)


@pytest.mark.parametrize("name", ["default", "uniform", "edm"])
@pytest.mark.parametrize("steps", [1, 2, 3, 8, 50])
def test_grids_descend_from_end_to_end(name, steps):
    for schedule, t_max in (("fm", 0.994), ("vp_cosine", 0.996)):
        for t_min in (0.0, 0.006):
            times = time_grid(FlowMapSettings(schedule, t_min=t_min, t_max=t_max), steps, name)
            assert len(times) == steps + 1 and times[0] == t_max and times[-1] == t_min
            assert all(s < t for t, s in pairwise(times))


def test_impossible_grids_are_refused():
    for steps in (0, -1):
        with pytest.raises(ConfigError, match="at least 1"):
            time_grid(CIFAR, steps)
    for etas in ((), (1.0, 2.0, 3.0)):
        with pytest.raises(ConfigError, match="2 intermediate"):
            time_grid(CIFAR, 3, "eta", etas)
    for etas in ((1.0, 2.0), (1.0, 1.0), (200.0, 1.0), (1.0, 0.001), (1.0, -1.0), (float("nan"), 1.0)):
        with pytest.raises(ConfigError, match="descend"):
            time_grid(CIFAR, 3, "eta", etas)
    with pytest.raises(ConfigError, match="t_max < 1"):
        time_grid(FlowMapSettings(t_min=0.0, t_max=1.0), 4, "edm")


def test_impossible_plans_are_refused():
    unconditional, conditional = model().config, model(5).config
    refused = [
        (unconditional, {"guidance": 1.5}, "class-conditional"), (unconditional, {"classes": [1]}, "unconditional"),
        (conditional, {"classes": [5]}, "0 to 4"), (conditional, {"classes": [-1]}, "0 to 4"),
        (conditional, {"classes": []}, "0 to 4"), (conditional, {"classes": "even"}, "balanced"),
        (conditional, {"sampler": "restrat"}, "did you mean 'restart'"), (conditional, {"grid": "edn"}, "did you mean 'edm'"),
        (conditional, {"batch_size": 0}, "batch size"), (conditional, {"etas": (1.0,), "grid": "edm"}, "eta"),
        (conditional, {"etas": (1.0,), "steps": 3}, "2 intermediate"),
    ]  # fmt: skip
    for config, options, message in refused:
        with pytest.raises(ConfigError, match=message):
            plan(config, SampleSettings(**options))


def test_plan_takes_the_models_defaults():
    config = model(5, sampling=SamplingSettings("restart", "uniform", 1.5)).config
    chosen = plan(config, SampleSettings(steps=2))
    assert (chosen.sampler, chosen.grid, chosen.guidance, chosen.times[1]) == ("restart", "uniform", 1.5, 0.5)
    chosen = plan(config, SampleSettings(steps=2, sampler="pushforward", etas=(3.0,), guidance=1.0))
    assert (chosen.sampler, chosen.grid, chosen.guidance, chosen.times[1]) == ("pushforward", "eta", 1.0, 0.75)


@pytest.mark.parametrize("classes, guidance, evaluations", [(0, None, 1), (5, None, 1), (5, 1.0, 1), (5, 0.0, 1), (5, 1.5, 2)])
@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_the_stated_number_of_evaluations_is_what_happens(classes, guidance, evaluations, sampler):
    m = model(classes)
    settings = SampleSettings(steps=3, guidance=guidance, sampler=sampler)
    draw(m, settings, range(7))
    assert plan(m.config, settings).nfe == 3 * evaluations
    assert m.network.images == 7 * 3 * evaluations


def test_restart_by_hand():
    """Algorithm 5, written out for three steps."""
    m, x = model(5), 0.5 * torch.randn(4, 3, 4, 4, dtype=torch.float64)
    label, fresh = Labels(torch.tensor([0, 1, 2, 3]), 5), {i: torch.randn(4, 3, 4, 4, dtype=torch.float64) for i in (1, 2)}
    path, eps = CIFAR.get_schedule(), torch.full((4,), 0.006, dtype=torch.float64)
    times = [torch.full((4,), t, dtype=torch.float64) for t in (0.994, 0.6, 0.3)]
    clean = m.f(x, eps, times[0], label, 1.5)
    clean = m.f(diffuse(path, clean, 0.5 * fresh[1], times[1]), eps, times[1], label, 1.5)
    expected = m.f(diffuse(path, clean, 0.5 * fresh[2], times[2]), eps, times[2], label, 1.5)
    assert torch.equal(restart(m, x, [0.994, 0.6, 0.3, 0.006], label, 1.5, fresh.__getitem__), expected)
    assert expected.dtype == torch.float64


@pytest.mark.parametrize("sampler, steps, expected", [("pushforward", 4, []), ("restart", 1, []), ("restart", 4, [1, 2, 3])])
def test_noise_is_drawn_only_where_it_is_used(sampler, steps, expected):
    m, drawn = model(), []

    def noise(i: int) -> torch.Tensor:
        drawn.append(i)
        return torch.zeros(2, 3, 4, 4, dtype=torch.float64)

    SAMPLERS[sampler](m, torch.ones(2, 3, 4, 4, dtype=torch.float64), time_grid(CIFAR, steps), None, 1.0, noise)
    assert drawn == expected


def test_one_step_is_one_jump_from_the_noise():
    """What `draw` returns is f_{eps,T}(sigma_d eps), as pixels."""
    m = model()
    x = 0.5 * normal(keys(9, [3, 4], 2), (3, 4, 4), torch.float64)
    with torch.no_grad():
        jumped = m.f(x, torch.full((2,), 0.006).double(), torch.full((2,), 0.994).double())
    images, labels = draw(m, SampleSettings(seed=9), [3, 4])
    assert torch.equal(images, to_uint8(jumped)) and labels is None and images.dtype == torch.uint8


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_an_image_does_not_depend_on_the_batch(sampler):
    m = model(5)
    settings = {"steps": 3, "sampler": sampler, "guidance": 1.5, "seed": 3}
    images, labels = draw(m, SampleSettings(**settings), range(30))
    for indices, size in (([17], 256), (list(range(30)), 7), ([29, 17, 0], 2)):
        again, again_labels = draw(m, SampleSettings(**settings, batch_size=size), indices)
        assert torch.equal(again, images[indices]) and torch.equal(again_labels, labels[indices])
    other, _ = draw(m, SampleSettings(**{**settings, "seed": 4}), range(30))
    assert (other != images).float().mean() > 0.5
    assert len(images.flatten(1).unique(dim=0)) == 30


def test_no_images():
    images, labels = draw(model(5), SampleSettings(), [])
    assert images.shape == (0, 3, 4, 4) and images.dtype == torch.uint8 and labels.shape == (0,)
    assert draw(model(), SampleSettings(), [])[1] is None


def test_random_labels_follow_the_training_data():
    """20,000 draws: a share p is known to sqrt(p (1 - p) / 20000) = 0.0035 at most; bound 4 sigma."""
    counts = [0, 10, 30, 0, 60, 0]
    for given, shares in ((counts, [c / 100 for c in counts]), (None, [1 / 6] * 6)):
        config = model(6, class_counts=given).config
        labels = draw_condition(config, plan(config, SampleSettings()), torch.arange(20000)).classes
        found = torch.bincount(labels, minlength=6) / 20000
        assert (found - torch.tensor(shares)).abs().max() < 0.014 and labels.dtype == torch.int64
        assert all(found[i] == 0 for i, share in enumerate(shares) if share == 0)


def test_chosen_labels():
    config = model(5).config
    index = torch.tensor([0, 1, 6, 14, 3])
    assert draw_condition(config, plan(config, SampleSettings(classes="balanced")), index).classes.tolist() == [0, 1, 1, 4, 3]
    assert draw_condition(config, plan(config, SampleSettings(classes=[4, 2])), index).classes.tolist() == [4, 2, 4, 4, 2]
    assert draw_condition(model().config, plan(model().config, SampleSettings()), index) is None
