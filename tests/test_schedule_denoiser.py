"""Denoisers of a schedule, as mmgen trains them: one x_hat of every schedule and prediction; a student's own randomness."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_denoiser import MEAN, STD, TINY, Ideal, denoiser, gaussian
from tiny_model import make_denoiser

import mmgen
from mmgen.diffusion.preconditioning import DenoiserSettings, preconditioning
from mmgen.models.denoiser import Denoiser
from mmgen.errors import ConfigError, ModelError
from mmgen.models.config import ModelConfig, SamplingSettings
from mmgen.models.files import load_model
from mmgen.networks import (
    ADMSettings,
    DiffusersUNetSettings,
    DiTSettings,
    EDM2Settings,
    UNetSettings,
    UViTSettings,
    build_network,
    widen_input,
)
from mmgen.networks.conditions import Labels
from mmgen.system.random import keys, normal
from mmgen.diffusion.schedules import ScheduleSettings, make_schedule

SCHEDULES = {
    "fm": ScheduleSettings("fm"), "fm-3": ScheduleSettings("fm", 3.0), "vp_cosine": ScheduleSettings(),
    "vp_cosine-0.5": ScheduleSettings(shift=0.5), "ddpm_linear": ScheduleSettings("ddpm_linear"), "edm": ScheduleSettings("edm"),
}  # fmt: skip
DROPOUT = UNetSettings(model_channels=16, channel_mult=(1,), num_blocks=1, attn_resolutions=(), dropout=0.3)


def output_of(name: str, prediction: str):
    """The ideal network's output at its time 1000 t, by finite differences where a derivative is needed."""
    schedule = make_schedule(SCHEDULES[name])

    def output(z, time):
        t, h = time / 1000, 1e-5
        a, s = schedule.alpha(t), schedule.sigma(t)
        x = gaussian(z / a, s / a)
        e = (z - a * x) / s
        slopes = [(f(t + h) - f(t - h)) / (2 * h) for f in (schedule.alpha, schedule.sigma)]
        return {"x": x, "eps": e, "v": a * e - s * x, "velocity": slopes[0] * x + slopes[1] * e}[prediction]

    return output


def settings_of(name: str, prediction: str, **options) -> DenoiserSettings:
    return DenoiserSettings("schedule", prediction=prediction, schedule=SCHEDULES[name], **options)


@pytest.mark.parametrize("prediction", ["x", "eps", "v", "velocity"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_one_x_hat_of_every_schedule_and_prediction(name, prediction):
    """float64 throughout; the velocity's finite difference leaves 1e-7 or so, times what is divided by."""
    given = settings_of(name, prediction)
    torch.manual_seed(0)
    sigma = torch.tensor([0.01, 0.11, 0.5, 2.2, 13.3, 79.0], dtype=torch.float64)
    y = MEAN + STD * torch.randn(6, 3, 4, 4, dtype=torch.float64) + sigma[:, None, None, None] * torch.randn(6, 3, 4, 4)
    model = denoiser(given, Ideal(output_of(name, prediction)))
    expected = gaussian(y, sigma[:, None, None, None])
    torch.testing.assert_close(model.denoise(y, sigma), expected, rtol=0, atol=2e-5 if prediction == "velocity" else 1e-10)
    # and of z on any schedule
    for other in SCHEDULES.values():
        other = make_schedule(other)
        t = other.eta_inverse(sigma)
        alpha = other.alpha(t)[:, None, None, None]
        found = model.x_hat(alpha * y, t, other)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 if prediction == "velocity" else 1e-8)


@pytest.mark.parametrize("name", SCHEDULES)
def test_times_range_and_input(name):
    given, schedule = settings_of(name, "v", time_scale=250.0), make_schedule(SCHEDULES[name])
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    sigma = schedule.eta(t)
    torch.testing.assert_close(preconditioning(given).time(sigma), 250 * t, rtol=1e-12, atol=0)
    torch.testing.assert_close(preconditioning(given).sigma(250 * t), sigma, rtol=1e-12, atol=0)
    torch.testing.assert_close(preconditioning(given)(sigma)[2], schedule.alpha(t), rtol=1e-12, atol=0)
    assert preconditioning(given).range == pytest.approx((0.002, 80.0), rel=1e-9)
    wide = preconditioning(dataclasses.replace(given, sigma_min=1e-6, sigma_max=1e6)).range
    expected = {"ddpm_linear": (1e-6, 152.2), "edm": (0.002, 80.0)}.get(name, (1e-6, 1e6))
    assert wide == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("prediction", ["x", "eps", "v", "velocity"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_ends(name, prediction):
    """t = 0 and t = 1 of all schedules are finite; pure noise is the largest sigma, and c_skip y + c_out F keeps float64."""
    model = denoiser(settings_of(name, prediction), Ideal(output_of(name, "x")))
    high = preconditioning(model.settings).range[1]
    z = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    for other in SCHEDULES.values():
        schedule, t = make_schedule(other), torch.tensor([0.0, 1.0], dtype=torch.float64)
        found = model.x_hat(z, t, schedule)
        assert found.isfinite().all()
        if schedule.alpha(t[1:]) < 1e-3:
            expected = model.denoise(high * z[1:], torch.tensor([high], dtype=torch.float64))
            torch.testing.assert_close(found[1:], expected, rtol=1e-12, atol=1e-12)


def test_impossible_settings_are_refused():
    refused = [
        (DenoiserSettings("schedule"), "needs denoiser.schedule"),
        (DenoiserSettings("edm", schedule=ScheduleSettings()), "for 'schedule'"),
        (DenoiserSettings("discrete", prediction="velocity"), "precondition 'schedule'"),
        (DenoiserSettings(noise_channels=-1), "negative"), (settings_of("fm", "x", time_scale=0.0), "time_scale"),
        (settings_of("fm", "x", sigma_min=80.0), "range of sigma"),
        (DenoiserSettings(noise_dropout=True), "network with dropout"),
        (DenoiserSettings("schedule", schedule=ScheduleSettings(shift=-1.0)), "shift"),
    ]  # fmt: skip
    for given, said in refused:
        with pytest.raises(ConfigError, match=said):
            Denoiser(ModelConfig(TINY, None, 4, 3, denoiser=given))


def test_files(tmp_path):
    """A student's file: settings within settings survive, and a damaged header is the file's fault."""
    given = settings_of("vp_cosine-0.5", "velocity", noise_channels=2, noise_dropout=True)
    sampling = SamplingSettings(schedule=SCHEDULES["edm"], student_steps=4, stochasticity=0.5)
    path = make_denoiser(tmp_path / "s.safetensors", given, channels=1, sampling=sampling)
    model = mmgen.load(path)
    assert model.config.denoiser == given and model.config.sampling == sampling and model.is_random
    assert model.network.encoder["8x8_conv"].weight.shape[1] == 3
    for old, new, said in ((b"velocity", b"velocitx", "velocitx"), (b"schedule", b"discrete", "has no denoiser.schedule")):
        damaged = path.read_bytes().replace(b'\\"' + old + b'\\",', b'\\"' + new + b'\\",')
        assert damaged != path.read_bytes()
        (tmp_path / "d.safetensors").write_bytes(damaged)
        with pytest.raises(ModelError, match=said):
            load_model(tmp_path / "d.safetensors")


# A student's own randomness


def student(**options) -> Denoiser:
    config = ModelConfig(DROPOUT, None, 4, 3, 5, denoiser=settings_of("vp_cosine", "v", **options))
    torch.manual_seed(0)
    model = Denoiser(config).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    return model


OWN = [{"noise_channels": 2}, {"noise_dropout": True}, {"noise_channels": 1, "noise_dropout": True}]


@pytest.mark.parametrize("options", OWN, ids=["channels", "dropout", "both"])
@pytest.mark.parametrize("guidance", [1.0, 0.0, 1.5])
def test_x_hat_depends_on_the_images_key_alone(options, guidance):
    model, label = student(**options), Labels(torch.tensor([0, 1, 2, 3]), 5)
    y, sigma = torch.randn(4, 3, 4, 4, dtype=torch.float64), torch.tensor([0.1, 1.0, 5.0, 70.0], dtype=torch.float64)
    key = keys(0, range(4))
    with torch.no_grad():
        found = model.denoise(y, sigma, label, guidance, key)
        for part in ([2], [3, 0]):
            again = model.denoise(y[part], sigma[part], label[part], guidance, key[part])
            torch.testing.assert_close(again, found[part], rtol=1e-3, atol=1e-4)
        assert ((model.denoise(y, sigma, label, guidance, key.flip(0)) - found).abs().amax((1, 2, 3)) > 1e-3).all()
        if "noise_dropout" in options:
            assert torch.equal(model.train().denoise(y, sigma, label, guidance, key), found)
            model.eval()
        cosine = make_schedule(ScheduleSettings())
        t = cosine.eta_inverse(sigma)
        z = y * cosine.alpha(t)[:, None, None, None]
        torch.testing.assert_close(model.x_hat(z, t, cosine, label, guidance, key), found, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="key for each image"):
        model.denoise(y, sigma, label, guidance)


def test_guidance_has_one_randomness_for_both():
    """Guided x_hat is the combination of the two with the same keys."""
    for options in OWN:
        model, label, key = student(**options), Labels(torch.tensor([0, 3]), 5), keys(0, range(2))
        y, sigma = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.tensor([0.5, 3.0], dtype=torch.float64)
        with torch.no_grad():
            null, one = (model.denoise(y, sigma, label, w, key) for w in (0.0, 1.0))
            torch.testing.assert_close(model.denoise(y, sigma, label, 2.5, key), null + 2.5 * (one - null), rtol=1e-4, atol=1e-4)


def test_the_noise_is_behind_the_image():
    seen = []

    def output(z, time):
        seen.append(z)
        return z[:, :3]

    model = denoiser(settings_of("fm", "x", noise_channels=2), Ideal(output))
    y, sigma, key = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.tensor([1.0, 3.0], dtype=torch.float64), keys(0, range(2))
    model.denoise(y, sigma, noise=key)
    torch.testing.assert_close(seen[0][:, :3], y / (1 + sigma[:, None, None, None]))
    assert torch.equal(seen[0][:, 3:], normal(key, (2, 4, 4), torch.float64))
    same = denoiser(settings_of("fm", "x"), Ideal(lambda z, time: z))  # one without takes no notice of keys
    assert torch.equal(same.denoise(y, sigma, noise=key), same.denoise(y, sigma))


NETWORKS = {
    "unet": UNetSettings(
        model_channels=16, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(), encoder="residual", resample="fir"
    ),
    "adm": ADMSettings(model_channels=16, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(), channels_per_head=16),
    "dit": DiTSettings(hidden_size=32, depth=1, num_heads=2),
    "edm2": EDM2Settings(model_channels=16, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(), channels_per_head=16),
    "uvit": UViTSettings(
        model_channels=16, channel_mult=(1, 2), num_blocks=(1,), depth=1, channels_per_head=16, emb_channels=16, patch_size=2
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_a_widened_network_begins_as_the_other(name):
    """Whatever the extra channels hold, and only until it is trained: their weights get gradients."""
    torch.manual_seed(0)
    plain, wide = (
        build_network(NETWORKS[name], resolution=8, channels=3, num_classes=4, second_time=False, extra_channels=extra).eval()
        for extra in (0, 2)
    )
    for weight in plain.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    wide.load_state_dict(widen_input(plain.state_dict(), wide))
    x, t, label = torch.randn(2, 3, 8, 8), torch.tensor([10.0, 700.0], dtype=torch.float64), Labels(torch.tensor([0, 4]), 4)
    found = wide(torch.cat([x, torch.randn(2, 2, 8, 8)], 1), t, None, label)
    torch.testing.assert_close(found, plain(x, t, None, label), rtol=2e-4, atol=2e-4)
    found.square().sum().backward()
    added = [
        w.grad[:, -1:].abs().max() for w, old in zip(wide.parameters(), plain.parameters(), strict=True) if w.shape != old.shape
    ]
    assert len(added) == (2 if name == "unet" else 1) and min(added) > 0
    assert widen_input(plain.state_dict(), plain).keys() == plain.state_dict().keys()
    with pytest.raises(RuntimeError, match="size mismatch"):  # other differences are none of its business
        other = build_network(NETWORKS[name], resolution=8, channels=1, second_time=False, num_classes=4)
        other.load_state_dict(widen_input(plain.state_dict(), other))


def test_diffusers_network_takes_no_noise():
    with pytest.raises(ConfigError, match="no channels beside"):
        build_network(DiffusersUNetSettings(config="{}"), resolution=8, channels=3, second_time=False, extra_channels=1)
