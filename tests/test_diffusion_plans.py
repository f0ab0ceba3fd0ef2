"""Plans of denoisers: evaluations, defaults, what is impossible, the commands that draw."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusion_tools import MEAN, SHAPE, STD, model
from fid_tools import run
from test_denoiser import KINDS, TINY, Ideal, denoiser
from tiny_model import make_denoiser, make_model

import mmgen
from mmgen.cli.fid import fid
from mmgen.cli.sample import sample
from mmgen.diffusion.preconditioning import DenoiserSettings
from mmgen.errors import ConfigError
from mmgen.models.config import ModelConfig, SamplingSettings
from mmgen.models.pixels import to_uint8
from mmgen.sampling.denoiser_samplers import (
    CONSISTENCY_SAMPLERS,
    SAMPLERS,
    Churn,
    heun,
)
from mmgen.sampling.drawing import SampleSettings, draw, plan
from mmgen.sampling.sigma_grids import sigma_grid
from mmgen.system.random import keys, normal

FAST = [("heun", 5, 9), ("ddim", 5, 5), ("ancestral", 5, 5), ("heun", 1, 1)]


@pytest.mark.parametrize(("sampler", "steps", "evaluations"), FAST)
@pytest.mark.parametrize(("classes", "guidance", "times"), [(0, None, 1), (5, 1.0, 1), (5, 0.0, 1), (5, 1.5, 2)])
def test_the_stated_number_of_evaluations_is_what_happens(sampler, steps, evaluations, classes, guidance, times):
    m, settings = model(classes), SampleSettings(steps=steps, sampler=sampler, guidance=guidance)
    draw(m, settings, range(7))
    assert plan(m.config, settings).nfe == evaluations * times and m.network.images == 7 * evaluations * times


@pytest.mark.parametrize("options", [{"sampler": s} for s in SAMPLERS] + [{"sampler": "heun", "churn": 10.0}], ids=str)
def test_an_image_does_not_depend_on_the_batch(options):
    m = model(5)
    settings = {"steps": 4, "guidance": 1.5, "seed": 3, **options}
    images, labels = draw(m, SampleSettings(**settings), range(30))
    for indices, size in (([17], 256), (list(range(30)), 7), ([29, 17, 0], 2)):
        again, again_labels = draw(m, SampleSettings(**settings, batch_size=size), indices)
        assert torch.equal(again, images[indices]) and torch.equal(again_labels, labels[indices])
    other, _ = draw(m, SampleSettings(**{**settings, "seed": 4}), range(30))
    assert (other != images).float().mean() > 0.5 and len(images.flatten(1).unique(dim=0)) == 30


def test_draw_is_the_sampler_from_the_images_own_noise():
    m = model()
    noise = [normal(keys(9, [3, 4], 2 + i), SHAPE, torch.float64) for i in range(5)]
    with torch.no_grad():
        expected = heun(m, 80 * noise[0], sigma_grid(DenoiserSettings(), 4), None, 1.0, noise.__getitem__, Churn(2.0, 0.1, 50.0))
    images, _ = draw(m, SampleSettings(steps=4, seed=9, churn=2.0, s_tmin=0.1, s_tmax=50.0), [3, 4])
    assert torch.equal(images, to_uint8(expected))


def test_defaults_follow_the_kind_of_model():
    for kind, expected in {
        "edm": ("heun", 18, 35), "vp": ("heun", 18, 35), "edm_cm": ("heun", 18, 35), "discrete": ("ddim", 50, 50),
        "flow": ("ddim", 50, 50), "cm": ("restart", 1, 1),
    }.items():  # fmt: skip
        chosen = plan(model(given=DenoiserSettings(kind)).config, SampleSettings())
        assert (chosen.sampler, chosen.steps, chosen.nfe, chosen.churn) == (*expected, None), kind
    own = model(5, sampling=SamplingSettings("heun", "uniform", 1.5, 32, 40.0, 0.05, 50.0, 1.003)).config
    chosen = plan(own, SampleSettings())
    assert (chosen.steps, chosen.grid, chosen.guidance, chosen.nfe) == (32, "uniform", 1.5, 126)
    assert chosen.churn == Churn(40.0, 0.05, 50.0, 1.003)
    assert plan(own, SampleSettings(churn=0.0)).churn is None and plan(own, SampleSettings(s_tmin=0.1)).churn.s_tmin == 0.1
    few = model(given=DenoiserSettings("discrete", num_timesteps=20)).config
    assert plan(few, SampleSettings()).steps == 20
    of_heun = plan(model(given=DenoiserSettings("flow")).config, SampleSettings(sampler="heun"))
    assert of_heun.times == sigma_grid(DenoiserSettings("flow"), 18, "edm") and of_heun.times[0] == 80
    other = plan(own, SampleSettings(sampler="ancestral"))
    assert (other.steps, other.churn) == (250, None)
    assert plan(own, SampleSettings(etas=(5.0, 1.0))).times == [80.0, 5.0, 1.0, 0.0]


def test_impossible_plans_are_refused():
    discrete, flow_map = model(5, DenoiserSettings("discrete")).config, make_config()
    cm, wrong = model(given=DenoiserSettings("cm")).config, model(sampling=SamplingSettings("restart")).config
    refused = [
        (model().config, {"sampler": "pushforward"}, "not for a diffusion model.*take heun or ddim or ancestral"),
        (discrete, {"sampler": "restart"}, "take ddim or ancestral or heun"),
        (discrete, {"sampler": "hein"}, "did you mean 'heun'"),
        (flow_map, {"sampler": "heun"}, "'heun' is not for a flow map.*take pushforward or restart"),
        (cm, {"sampler": "heun"}, "not for a consistency model.*take restart"), (wrong, {}, "'restart' is not for"),
        (discrete, {"churn": 3.0}, "churn: only the sampler heun"), (flow_map, {"s_tmin": 3.0}, "s_tmin: only the sampler heun"),
        (model().config, {"s_noise": 1.1}, "s_noise: nothing is churned"), (model().config, {"churn": -1.0}, "not negative"),
        (model().config, {"churn": math.nan}, "not negative"), (discrete, {"steps": 2000}, "at most 1000"),
        (discrete, {"sampler": "heun", "grid": "uniform"}, "use the grid edm"),
        (model().config, {"guidance": 1.5}, "class-conditional"), (discrete, {"grid": "trailing"}, "Valid: default, uniform"),
        (model(sampling=SamplingSettings("ddim", churn=3.0)).config, {}, "sampling.churn is for the sampler heun"),
    ]  # fmt: skip
    for config, options, message in refused:
        with pytest.raises(ConfigError, match=message):
            plan(config, SampleSettings(**options))


def make_config() -> ModelConfig:
    from mmgen.diffusion.flow_map import FlowMapSettings

    return ModelConfig(TINY, FlowMapSettings(t_min=0.006, t_max=0.994), 4, 3)


def test_guidance_needs_a_null_class():
    from mmgen.networks import ADMSettings

    config = replace(model(5).config, network=ADMSettings(null_class=False))
    with pytest.raises(ConfigError, match="without a class"):
        plan(config, SampleSettings(guidance=1.5))
    assert plan(config, SampleSettings()).guidance == 1


@pytest.mark.slow
def test_all_samplers_run_on_all_kinds():
    """From ideal networks of every kind, images of the data's mean and deviation come out."""
    for name, (given, output) in KINDS.items():
        m = denoiser(given, Ideal(output))
        for sampler in CONSISTENCY_SAMPLERS if name == "cm" else SAMPLERS:
            steps = {"restart": 1, "ancestral": 250}.get(sampler, 40)
            pixels = draw(m, SampleSettings(steps=steps, sampler=sampler), range(20))[0].double() / 127.5 - 1
            # the consistency model is none: its ideal network gives the mean of the data
            assert pixels.mean().item() == pytest.approx(MEAN, abs=0.06), (name, sampler)
            if name != "cm":
                assert pixels.std().item() == pytest.approx(STD, rel=0.12), (name, sampler)


# The command line
def test_sample_command(tmp_path):
    path = make_denoiser(tmp_path / "d.safetensors", channels=1, num_classes=3)
    out = tmp_path / "out"
    command = (path, "--num", 5, "--out", out, "--steps", 3, "--churn", 2, "--s-tmin", 0.01, "--s-tmax", 50, "--s-noise", 1.01)
    run(sample, *command)
    found = json.loads((out / "samples.json").read_text())
    wanted = {"kind": "denoiser", "sampler": "heun", "grid": "default", "steps": 3, "nfe": 5, "churn": 2.0, "s_tmin": 0.01,
              "s_tmax": 50.0, "s_noise": 1.01, "complete": True, "image": [1, 8, 8]}  # fmt: skip
    assert wanted.items() <= found.items() and found["times"] == sigma_grid(DenoiserSettings(), 3)
    run(sample, *command)  # the same settings: nothing to do
    for changes, said in ((("--churn", 3), "churn would be 3.0, not 2.0"), (("--s-tmax", 40), "s_tmax would be 40.0, not 50.0")):
        with pytest.raises(ConfigError, match=said):
            run(sample, *command, *changes)
    with pytest.raises(ConfigError, match="is not for a diffusion model"):
        run(sample, path, "--out", tmp_path / "x", "--sampler", "pushforward")
    with pytest.raises(ConfigError, match="is not for a flow map"):
        run(sample, make_model(tmp_path / "m.safetensors", channels=1), "--out", tmp_path / "x", "--sampler", "ddim")
    table = run(sample, path, "--num", 2, "--out", tmp_path / "a.npz", "--guidance", 2)
    assert " 18 " in table and " 70 " in table  # the default, and two times 35 evaluations
    expected = mmgen.load(path).sample(2, guidance=2.0).images.permute(0, 2, 3, 1).numpy()
    assert np.array_equal(np.load(tmp_path / "a.npz")["arr_0"], expected)


def test_fid_command(tmp_path, monkeypatch):
    monkeypatch.setenv("MMGEN_CACHE", str(tmp_path / "cache"))
    path = make_denoiser(tmp_path / "d.safetensors", channels=1)
    options = ("--features", "pixels", "--num", 40, "--steps", "2,3", "--sampler", "heun", "--churn", 5, "--device", "cpu")
    said = run(fid, path, *options)
    assert "sampler heun, churn 5" in said
    scores = json.loads((tmp_path / "d.safetensors.scores.json").read_text())["scores"]
    assert [s["samples"]["nfe"] for s in scores] == [3, 5] and all(s["samples"]["churn"] == 5.0 for s in scores)


def test_latents_are_decoded(tmp_path, monkeypatch):
    """A stand-in for the autoencoder: draw gives it the latents, and the record names it."""
    from mmgen.encoders import vae
    from mmgen.models.latents import LatentSettings

    latents = LatentSettings(vae="somebody/vae", vae_sha256="0" * 64, mean=(0.0,) * 4, std=(1.0,) * 4, resolution=16)
    path = make_denoiser(tmp_path / "d.safetensors", channels=4, latents=latents)
    seen = []

    def decoder(settings, device="cpu"):
        def decode(x):
            seen.append((settings, x.shape))
            return to_uint8(x[:, :3].repeat_interleave(2, 2).repeat_interleave(2, 3))

        return decode

    monkeypatch.setattr(vae, "decoder", decoder)
    run(sample, path, "--num", 3, "--out", tmp_path / "out", "--steps", 2)
    assert seen == [(latents, (3, 4, 8, 8))]
    record = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert record["image"] == [3, 16, 16] and record["vae"] == {"name": "somebody/vae", "sha256": "0" * 64}
    run(sample, path, "--num", 3, "--out", tmp_path / "a.npz", "--steps", 2)
    assert np.load(tmp_path / "a.npz")["arr_0"].shape == (3, 16, 16, 3)
    assert mmgen.load(path).sample(0).images.shape == (0, 3, 16, 16)


def test_training_begins_only_with_a_sampler_for_flow_maps():
    """And with steps and guidance that the model can be sampled by: what is wrong with them is not said after the training."""
    from mmgen.config import imm as configs
    from mmgen.config import teacher as teachers
    from mmgen.data import DataShape
    from mmgen.methods.imm.objective import imm_model_config
    from mmgen.methods.teacher.objective import teacher_model_config

    for sampling, said in (({"sampler": "heun"}, "not for a flow map"), ({"churn": 2.0}, "sampling.churn is for"),
                           ({"steps": 0}, "sampling.steps must be at least 1"), ({"steps": 10**9}, "sampling.steps must be at most"),
                           ({"guidance_interval": [5.0, 1.0]}, "LOW < HIGH"),
                           ({"guidance_range": [1.0, 4.0]}, "is of students")):  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            imm_model_config(configs.resolve({"sampling": sampling}), DataShape(32, 3))
        if "sampler" not in sampling and "churn" not in sampling:
            with pytest.raises(ConfigError, match=said):
                teacher_model_config(teachers.resolve({"sampling": sampling}), DataShape(32, 3))
    for hidden in ({"conditional": True, "label_dropout": 0.0}, {"text": True, "caption_dropout": 0.0}):
        config = configs.resolve({"data": hidden, "sampling": {"guidance": 1.5}})
        with pytest.raises(ConfigError, match="sampling.guidance 1.5 needs .*set data.[a-z]*_dropout to 0.1"):
            imm_model_config(config, DataShape(32, 3, 10))
    assert imm_model_config(configs.resolve({"data": {"conditional": True}, "sampling": {"guidance": 1.5}}), DataShape(32, 3, 10)).sampling.guidance == 1.5
