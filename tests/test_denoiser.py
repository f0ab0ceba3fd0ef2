"""Denoisers: every preconditioning against the original's formulas, one underlying x_hat in all coordinates, golden arrays."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import make_denoiser, make_model
from torch import nn

import mmgen
from mmgen.diffusion.preconditioning import DenoiserSettings, preconditioning
from mmgen.models.denoiser import Denoiser
from mmgen.errors import ConfigError, ModelError
from mmgen.models.config import ModelConfig
from mmgen.models.files import METADATA_KEY, read_config, save_model
from mmgen.models.flow_model import FlowModel
from mmgen.networks import UNetSettings, build_network
from mmgen.diffusion.schedules import COSINE, FLOW
from mmgen.networks.conditions import Labels

TINY = UNetSettings(model_channels=16, channel_mult=(1,), num_blocks=1, attn_resolutions=(), dropout=0.0)
MEAN, STD = 0.3, 0.4  # of Gaussian data, whose x_hat is known


def gaussian(y, sigma):
    """E[x | y = x + sigma e] of data N(MEAN, STD^2)."""
    return (STD**2 * y + sigma**2 * MEAN) / (STD**2 + sigma**2)


class Ideal(nn.Module):
    """`output(z, time)`, both float64 [N, C, H, W] and [N, 1, 1, 1], as a network that counts the images it sees."""

    def __init__(self, output, num_classes=0) -> None:
        super().__init__()
        self.output, self.num_classes, self.images = output, num_classes, 0
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))  # so that it is given float64

    def forward(self, x, t, s=None, condition=None, augment=None):
        assert s is None and augment is None and t.dtype == torch.float64
        self.images += len(x)
        found = self.output(x, t[:, None, None, None])
        return found if condition is None else found + (condition.classes + 1)[:, None, None, None]


def denoiser(given: DenoiserSettings, network: nn.Module, num_classes: int = 0) -> Denoiser:
    return Denoiser(ModelConfig(TINY, None, 4, 3, num_classes, denoiser=given), network)


# What the ideal network of each kind gives, in the words of the model that was trained so: float64 formulas of one line, from
# the tables of the papers, with nothing of mmgen's in them.


def alpha_bars(kind: str, start=1e-4, end=0.02) -> list[float]:
    """alpha-bar of 1000 timesteps, one product after another."""
    product, found = 1.0, []
    for t in range(1000):
        if kind == "cosine":
            now, after = (math.cos((u / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for u in (t, t + 1))
            beta = min(1 - after / now, 0.999)
        elif kind == "linear":
            beta = start + (end - start) * t / 999
        else:
            beta = (math.sqrt(start) + (math.sqrt(end) - math.sqrt(start)) * t / 999) ** 2
        product *= 1 - beta
        found.append(product)
    return found


def vp_output(bars, prediction):
    def output(z, time):
        bar = torch.tensor(bars, dtype=torch.float64)[time.round().long()]
        a, s = bar.sqrt(), (1 - bar).sqrt()
        x = gaussian(z / a, s / a)
        e = (z - a * x) / s
        return {"eps": e, "x": x, "v": a * e - s * x}[prediction]

    return output


def edm_output(z, time):
    sigma = torch.exp(4 * time)
    y = z * (sigma**2 + 0.25).sqrt()
    skip, out = 0.25 / (sigma**2 + 0.25), 0.5 * sigma / (sigma**2 + 0.25).sqrt()
    return (gaussian(y, sigma) - skip * y) / out


def cm_output(z, time, minimum=0.002):
    sigma = torch.exp(time / 250)
    y = z * (sigma**2 + 0.25).sqrt()
    skip, out = 0.25 / ((sigma - minimum) ** 2 + 0.25), 0.5 * (sigma - minimum) / (sigma**2 + 0.25).sqrt()
    return (gaussian(y, sigma) - skip * y) / out


def continuous_vp_output(z, time):
    t = time / 999
    sigma = (torch.exp(9.95 * t**2 + 0.1 * t) - 1).sqrt()
    y = z * (sigma**2 + 1).sqrt()
    return (y - gaussian(y, sigma)) / sigma


def ve_output(z, time):
    sigma = 2 * torch.exp(time)
    return (gaussian(z, sigma) - z) / sigma


def iddpm_output(z, time):
    u = torch.tensor(iddpm_levels(), dtype=torch.float64)
    sigma = u[999 - time.long()]
    y = z * (sigma**2 + 1).sqrt()
    return (y - gaussian(y, sigma)) / sigma


def iddpm_levels() -> list[float]:
    """u_0 > ... > u_1000 = 0."""
    u, bar = [0.0] * 1001, [math.sin(0.5 * math.pi * j / 1000 / 1.008) ** 2 for j in range(1001)]
    for j in range(1000, 0, -1):
        u[j - 1] = math.sqrt((u[j] ** 2 + 1) / max(bar[j - 1] / bar[j], 0.001) - 1)
    return u


def flow_output(z, tau):
    x = gaussian(z / tau, (1 - tau) / tau)
    return x - (z - tau * x) / (1 - tau)


SD = {"betas": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
KINDS = {
    "edm": (DenoiserSettings("edm"), edm_output),
    "edm_cm": (DenoiserSettings("edm_cm"), lambda z, time: cm_output(z, time, 0.0)),
    "cm": (DenoiserSettings("cm"), cm_output),
    "vp": (DenoiserSettings("vp", sigma_min=1e-3, sigma_max=152.2), continuous_vp_output),
    "ve": (DenoiserSettings("ve", sigma_min=0.02, sigma_max=100), ve_output),
    "iddpm": (DenoiserSettings("iddpm"), iddpm_output),
    "flow": (DenoiserSettings("flow"), flow_output),
    **{
        f"discrete-{word}": (DenoiserSettings("discrete", prediction=word), vp_output(alpha_bars("linear"), word))
        for word in ("eps", "x", "v")
    },
    "discrete-cosine": (DenoiserSettings("discrete", betas="cosine"), vp_output(alpha_bars("cosine"), "eps")),
    "discrete-sd": (
        DenoiserSettings("discrete", prediction="v", **SD), vp_output(alpha_bars("scaled_linear", 0.00085, 0.012), "v")
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_one_x_hat_in_all_coordinates(name):
    """The ideal networks of all kinds give the same x_hat, but for sigma times float32's rounding: 1.1e-7 measured."""
    given, output = KINDS[name]
    torch.manual_seed(0)
    low, high = preconditioning(given).range
    sigma = torch.tensor([0.0321, 0.11, 0.5, 2.2, 13.3, 79.0], dtype=torch.float64).clamp(low, high)
    if given.precondition in ("discrete", "iddpm"):
        sigma = preconditioning(given).sigma(preconditioning(given).time(sigma))  # their timesteps
    model = denoiser(given, Ideal(output))
    y = MEAN + STD * torch.randn(6, 3, 4, 4, dtype=torch.float64) + sigma[:, None, None, None] * torch.randn(6, 3, 4, 4)
    found, expected = model.denoise(y, sigma), gaussian(y, sigma[:, None, None, None])
    assert found.dtype == torch.float64
    assert ((found - expected).abs().amax((1, 2, 3)) <= 3e-7 * (1 + sigma)).all()
    single = model.denoise(y.float(), sigma)
    assert single.dtype == torch.float32 and (single - expected).abs().max() < 1e-4


def test_published_ranges():
    """Ends of the tables as published: sigma and, where given, alpha of the last timestep; three digits."""
    tables = {
        (1.00e-2, 157.4, 0.00635): DenoiserSettings("discrete"),
        (6.4e-3, 2.0e4, 4.9e-5): DenoiserSettings("discrete", betas="cosine"),
        (2.92e-2, 14.61, 0.0683): DenoiserSettings("discrete", **SD),
    }
    for (low, high, alpha), given in tables.items():
        ends = preconditioning(given).range
        assert ends == pytest.approx((low, high), rel=1.5e-2) and 1 / math.hypot(1, ends[1]) == pytest.approx(alpha, rel=1e-2)
    table = preconditioning(DenoiserSettings("iddpm")).table(torch.device("cpu"))
    np.testing.assert_allclose(table, iddpm_levels()[-2::-1], rtol=1e-12)
    assert table[0].item() == pytest.approx(0.0064, rel=1e-2) and 1.9e4 < table[-1] < 2.1e4
    vp = DenoiserSettings("vp")
    assert preconditioning(vp).sigma(torch.tensor(999.0).double()).item() == pytest.approx(152.17, abs=0.01)
    assert preconditioning(vp).sigma(torch.tensor(999e-5).double()).item() == pytest.approx(1.0e-3, rel=1e-2)


@pytest.mark.parametrize("name", KINDS)
def test_times_and_sigmas_are_inverse(name):
    given = KINDS[name][0]
    if given.precondition in ("discrete", "iddpm"):
        time = torch.arange(1000, dtype=torch.float64)
        assert torch.equal(preconditioning(given).time(preconditioning(given).sigma(time)), time)  # exactly, so that whole timesteps stay whole
        return
    sigma = torch.logspace(-1.5, 1, 40, dtype=torch.float64)
    torch.testing.assert_close(preconditioning(given).sigma(preconditioning(given).time(sigma)), sigma, rtol=2e-12, atol=0)


def test_between_timesteps():
    """Linear in log sigma, or the nearest; beyond the ends the last."""
    given = DenoiserSettings("discrete")
    table = preconditioning(given).table(torch.device("cpu"))
    middle = (table[500] ** 0.75 * table[501] ** 0.25)[None]
    assert preconditioning(given).time(middle).item() == pytest.approx(500.25, abs=1e-9)
    rounding = dataclasses.replace(given, round_time=True)
    assert preconditioning(rounding).time(middle).item() == 500 and preconditioning(rounding).rounded(middle.item()) == table[500]
    assert preconditioning(given).rounded(middle.item()) == middle.item()
    outside = torch.tensor([1e-5, 1e5], dtype=torch.float64)
    assert preconditioning(given).time(outside).tolist() == [0, 999]
    iddpm = DenoiserSettings("iddpm")
    levels = preconditioning(iddpm).table(torch.device("cpu"))
    near = levels[300:302].mean() + torch.tensor([-1e-9, 1e-9], dtype=torch.float64)
    assert preconditioning(iddpm).time(near).tolist() == [300, 301]


def test_learned_variances_are_left_out():
    def output(z, time):
        return torch.cat([vp_output(alpha_bars("linear"), "eps")(z, time), torch.full_like(z, 1e3)], 1)

    given, y = DenoiserSettings("discrete"), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    sigma = preconditioning(given).sigma(torch.tensor([100.0, 900.0]))
    expected = denoiser(given, Ideal(vp_output(alpha_bars("linear"), "eps"))).denoise(y, sigma)
    assert torch.equal(denoiser(given, Ideal(output)).denoise(y, sigma), expected)


@pytest.mark.parametrize("name", ["edm", "vp", "flow", "discrete-v"])
def test_guidance_on_the_output_is_guidance_on_x_hat(name):
    given, output = KINDS[name]
    network = Ideal(output, num_classes=5)
    model, label = denoiser(given, network, 5), Labels(torch.tensor([0, 4]), 5)
    y, sigma = (
        torch.randn(2, 3, 4, 4, dtype=torch.float64),
        preconditioning(given).sigma(preconditioning(given).time(torch.tensor([0.5, 3.0]).double())),
    )
    null = model.denoise(y, sigma, label.null())
    one = model.denoise(y, sigma, label)
    network.images = 0
    assert torch.equal(model.denoise(y, sigma, label, 0.0), null) and network.images == 2
    torch.testing.assert_close(model.denoise(y, sigma, label, 2.5), null + 2.5 * (one - null), rtol=1e-5, atol=1e-5)
    assert network.images == 6
    clipped = denoiser(dataclasses.replace(given, clip=True), network, 5)
    torch.testing.assert_close(
        clipped.denoise(y, sigma, label, 2.5), (null + 2.5 * (one - null)).clamp(-1, 1), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("schedule", [FLOW, COSINE], ids=["fm", "vp_cosine"])
@pytest.mark.parametrize("name", ["edm", "ve", "flow"])
def test_x_hat_of_any_schedule(schedule, name):
    given, output = KINDS[name]
    model, t = denoiser(given, Ideal(output)), torch.tensor([0.1, 0.5, 0.95], dtype=torch.float64)
    alpha, sigma = schedule.alpha(t)[:, None, None, None], schedule.sigma(t)[:, None, None, None]
    x, noise = torch.randn(2, 3, 3, 4, 4, dtype=torch.float64)
    z = alpha * x + sigma * noise
    found = model.x_hat(z, t, schedule)
    torch.testing.assert_close(found, gaussian(z / alpha, sigma / alpha), rtol=1e-4, atol=1e-5)
    assert model.x_hat(z.float(), t, schedule).dtype == torch.float32


def test_x_hat_at_the_ends():
    """Pure noise is the largest sigma that the model knows; data, the smallest."""
    model, z = denoiser(KINDS["edm"][0], Ideal(edm_output)), torch.randn(1, 3, 4, 4, dtype=torch.float64)

    def full(value: float) -> torch.Tensor:
        return torch.full((1,), value, dtype=torch.float64)

    for schedule in (FLOW, COSINE):
        for t in (1.0, 0.9999):
            expected = model.denoise(80.0 * z / schedule.sigma(full(t)), full(80.0))
            torch.testing.assert_close(model.x_hat(z, full(t), schedule), expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(model.x_hat(z, full(0.0), schedule), model.denoise(z, full(0.002)), rtol=0, atol=1e-12)


def test_files(tmp_path):
    path = make_denoiser(tmp_path / "d.safetensors", DenoiserSettings("vp", sigma_max=152.0), channels=1, num_classes=3)
    model = mmgen.load(path)
    assert isinstance(model, Denoiser) and model.config.denoiser == DenoiserSettings("vp", sigma_max=152.0)
    assert not model.training and model.range == (0.002, 152.0) and model.image_shape == (1, 8, 8)
    assert json.loads(open_header(path))["kind"] == "denoiser"
    assert model.sample(2, steps=2).images.shape == (2, 1, 8, 8)
    old = make_model(tmp_path / "old.safetensors", channels=1)
    assert json.loads(open_header(old))["kind"] == "imm" and isinstance(mmgen.load(old), FlowModel)


def open_header(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()[METADATA_KEY]


def test_files_from_before_there_were_denoisers_load(tmp_path):
    path = make_model(tmp_path / "old.safetensors", channels=1)
    header = json.loads(open_header(path))
    for key in ("denoiser", "latents"):
        del header["config"][key]
    header["config"]["sampling"] = {"sampler": "restart", "grid": "uniform", "guidance": 1.0}
    save_file(load_file(path), path, {METADATA_KEY: json.dumps(header)})
    assert mmgen.load(path).sample(1, steps=2).images.shape == (1, 1, 8, 8)


def test_a_model_is_one_of_both(tmp_path):
    path = make_model(tmp_path / "m.safetensors", channels=1)
    header, tensors = json.loads(open_header(path)), load_file(path)
    for changes, said in (({"flow": None}, "neither"), ({"denoiser": dataclasses.asdict(DenoiserSettings())}, "both")):
        changed = {**header, "config": {**header["config"], **changes}}
        save_file(tensors, path, {METADATA_KEY: json.dumps(changed)})
        with pytest.raises(ModelError, match=said):
            read_config(path)
    with pytest.raises(ConfigError, match="neither"):
        save_model(path, ModelConfig(TINY, None, 8, 1), {})


def test_networks_have_no_second_time():
    config = ModelConfig(TINY, None, 8, 3, denoiser=DenoiserSettings())
    expected = build_network(TINY, resolution=8, channels=3, second_time=False).state_dict().keys()
    assert Denoiser(config).network.state_dict().keys() == expected
