"""Samplers of denoisers: exact solutions for Gaussian data, the papers' own formulas in their own coordinates, and the plan."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusion_tools import MEAN, SHAPE, STD
from test_denoiser import KINDS, Ideal, alpha_bars, denoiser, gaussian, vp_output

from mmgen.diffusion.preconditioning import DenoiserSettings, preconditioning
from mmgen.errors import ConfigError
from mmgen.sampling.denoiser_samplers import (
    Churn,
    ancestral,
    ddim,
    heun,
    restart,
    start,
)
from mmgen.sampling.sigma_grids import sigma_grid


class Exact:
    """x_hat of Gaussian data in float64, with the interface that samplers use."""

    settings = DenoiserSettings("edm")

    def denoise(self, y, sigma, condition=None, guidance=1.0):
        return gaussian(y, sigma[:, None, None, None])


class Bent(Exact):
    """An x_hat that is not linear, so that no error cancels."""

    def denoise(self, y, sigma, condition=None, guidance=1.0):
        sigma = sigma[:, None, None, None]
        return torch.tanh(y / (1 + sigma)) * 0.7 + 0.1 * torch.sin(3 * sigma)


def noises(steps: int, count: int = 2, shape=SHAPE) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(count, *shape, dtype=torch.float64, generator=generator) for _ in range(steps + 1)]


def none(step: int) -> torch.Tensor:
    raise AssertionError("this sampler draws no noise")


# Grids
def test_edms_grid():
    """t_0, t_1, t_2, ... of 18 steps, by equation 5 in NumPy; the ends exactly."""
    sigmas = sigma_grid(DenoiserSettings(), 18)
    i = np.arange(18)
    expected = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(sigmas[:-1], expected, rtol=1e-12)
    assert (sigmas[0], sigmas[-2], sigmas[-1], len(sigmas)) == (80.0, 0.002, 0.0, 19)
    assert sigma_grid(DenoiserSettings(), 1) == [80.0, 0.0]
    # Models that know other ranges are sampled from what both have
    assert sigma_grid(DenoiserSettings("ve", sigma_min=0.02, sigma_max=100.0), 5)[:5:4] == [80.0, 0.02]
    for kind in ("discrete", "iddpm", "vp", "flow"):
        assert 79 < sigma_grid(DenoiserSettings(kind), 5, "edm")[0] <= 80.5


def test_timesteps_are_trailing():
    """Lin et al., table 2, of 10 of 1000: 999, 899, ..., 99; and other numbers."""
    given = DenoiserSettings("discrete")
    bars = alpha_bars("linear")
    for steps, expected in ((10, list(range(999, 0, -100))), (3, [999, 666, 332]), (1, [999]), (1000, list(range(999, -1, -1)))):
        sigmas = sigma_grid(given, steps)
        np.testing.assert_allclose(sigmas[:-1], [math.sqrt((1 - bars[t]) / bars[t]) for t in expected], rtol=1e-9)
        assert sigmas[-1] == 0.0
    with pytest.raises(ConfigError, match="1000 timesteps, so that 1001 steps"):
        sigma_grid(given, 1001)


def test_uniform_in_the_models_own_time():
    flow = sigma_grid(DenoiserSettings("flow"), 4)
    np.testing.assert_allclose([1 / (1 + s) for s in flow], [0, 0.25, 0.5, 0.75, 1], atol=1e-8)
    ve = sigma_grid(DenoiserSettings("ve", sigma_min=0.02, sigma_max=100.0), 3, "uniform")
    np.testing.assert_allclose(ve, [100, math.sqrt(2), 0.02, 0], rtol=1e-12)
    vp = sigma_grid(DenoiserSettings("vp", sigma_min=1e-3, sigma_max=152.17), 5, "uniform")
    t = [(math.sqrt(0.01 + 39.8 * math.log1p(s**2)) - 0.1) / 19.9 for s in vp[:-1]]
    np.testing.assert_allclose(np.diff(t), np.diff(t)[0], rtol=1e-9)
    assert sigma_grid(DenoiserSettings("cm"), 2)[::2] == [80.0, 0.002]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("grid", ["default", "uniform", "edm"])
def test_grids_descend_within_the_range(name, grid):
    given = KINDS[name][0]
    low, high = preconditioning(given).range
    for steps in (1, 2, 3, 18, 100):
        sigmas = sigma_grid(given, steps, grid)
        assert len(sigmas) == steps + 1 and all(b < a or (b == a and name == "iddpm") for a, b in pairwise(sigmas))
        inside = sigmas if name == "cm" else sigmas[:-1]
        bound = 0.01 if name == "iddpm" else 1e-9  # the nearest of its levels
        assert inside[0] <= high * (1 + bound) and inside[-1] >= low * (1 - bound)


def test_impossible_grids_are_refused():
    given = DenoiserSettings()
    assert sigma_grid(given, 3, "eta", (10.0, 1.0)) == [80.0, 10.0, 1.0, 0.0]
    for etas in ((1.0, 10.0), (100.0, 1.0), (1.0, 1e-3), (1.0, -1.0), (math.nan, 1.0)):
        with pytest.raises(ConfigError, match="must descend between 80 and 0.002"):
            sigma_grid(given, 3, "eta", etas)
    with pytest.raises(ConfigError, match="2 intermediate"):
        sigma_grid(given, 3, "eta", (1.0,))
    with pytest.raises(ConfigError, match="at least 1"):
        sigma_grid(given, 0)
    with pytest.raises(ConfigError, match="at most 1000"):
        sigma_grid(DenoiserSettings("iddpm"), 1001)


# Steps
@pytest.mark.parametrize(("sampler", "order"), [(ddim, 1), (heun, 2)])
def test_order_of_convergence(sampler, order):
    """Against the exact solution y(sigma) = mean + (y_0 - mean) sqrt((STD^2 + sigma^2) / (STD^2 + sigma_0^2))."""
    y = MEAN + 20 * noises(0)[0]
    errors = []
    for steps in (40, 80, 160):
        fraction = torch.arange(steps + 1, dtype=torch.float64) / steps
        sigmas = ((20 ** (1 / 7) + fraction * (0.05 ** (1 / 7) - 20 ** (1 / 7))) ** 7).tolist()
        exact = MEAN + (y - MEAN) * math.sqrt((STD**2 + sigmas[-1] ** 2) / (STD**2 + sigmas[0] ** 2))
        errors.append((sampler(Exact(), y, sigmas, None, 1.0, none) - exact).abs().max().item())
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert orders == pytest.approx([order] * 2, abs=0.15), orders


def test_to_the_end_the_distribution_is_the_datas():
    """64 steps of heun and 200 of the others; 24,000 numbers, whose standard deviation is known to 0.5%."""
    noise = noises(200, count=500)
    for sampler, steps, bound in ((heun, 64, 0.02), (ddim, 200, 0.02), (ancestral, 200, 0.04)):
        sigmas = sigma_grid(DenoiserSettings(), steps)
        x = sampler(Exact(), 80 * noise[0], sigmas, None, 1.0, noise.__getitem__)
        assert x.mean().item() == pytest.approx(MEAN, abs=0.015) and x.std().item() == pytest.approx(STD, rel=bound), sampler
    churned = heun(Exact(), 80 * noise[0], sigma_grid(DenoiserSettings(), 64), None, 1.0, noise.__getitem__, Churn(20.0))
    assert churned.std().item() == pytest.approx(STD, rel=0.02)
    # and with the churn other images come out, not those of the same noise
    assert (churned - heun(Exact(), 80 * noise[0], sigma_grid(DenoiserSettings(), 64), None, 1.0, none)).std() > 0.05


@pytest.mark.parametrize("churn", [Churn(), Churn(30.0), Churn(5.0, 0.05, 10.0, 1.003)], ids=["none", "all", "between"])
def test_heun_is_algorithm_2(churn):
    """Karras et al., algorithm 2, line by line in NumPy."""
    noise, sigmas = noises(10), sigma_grid(DenoiserSettings(), 10)

    def denoised(x, t):
        return np.tanh(x / (1 + t)) * 0.7 + 0.1 * np.sin(3 * t)

    x = 80 * noise[0].numpy()
    for i in range(10):
        t, following = sigmas[i], sigmas[i + 1]
        inside = churn.s_tmin <= t <= (math.inf if churn.s_tmax is None else churn.s_tmax)
        gamma = min(churn.amount / 10, math.sqrt(2) - 1) if inside else 0
        t_hat = t + gamma * t
        x_hat = x + math.sqrt(t_hat**2 - t**2) * churn.s_noise * noise[i + 1].numpy()
        d = (x_hat - denoised(x_hat, t_hat)) / t_hat
        x = x_hat + (following - t_hat) * d
        if following != 0:
            d_prime = (x - denoised(x, following)) / following
            x = x_hat + (following - t_hat) * (d / 2 + d_prime / 2)
    found = heun(Bent(), 80 * noise[0], sigmas, None, 1.0, none if churn.amount == 0 else noise.__getitem__, churn)
    np.testing.assert_allclose(found.numpy(), x, rtol=0, atol=1e-12)


def test_ancestral_is_ddpms_posterior():
    """All timesteps of a short DDPM by Ho et al., equations 6 and 7, with their betas and in their z; exactly."""
    given = DenoiserSettings("discrete", beta_start=0.01, beta_end=0.3, num_timesteps=20)
    betas = np.linspace(0.01, 0.3, 20)
    bars = np.cumprod(1 - betas)
    noise, model = noises(20), Bent()
    z = noise[0]
    for i, t in enumerate(range(19, -1, -1)):
        before = bars[t - 1] if t else 1.0
        sigma = math.sqrt((1 - bars[t]) / bars[t])
        x = model.denoise(z / math.sqrt(bars[t]), torch.full((2,), sigma, dtype=torch.float64))
        mean = math.sqrt(before) * betas[t] / (1 - bars[t]) * x
        mean = mean + math.sqrt(1 - betas[t]) * (1 - before) / (1 - bars[t]) * z
        z = mean + math.sqrt((1 - before) / (1 - bars[t]) * betas[t]) * (noise[i + 1] if t else 0)
    sigmas = sigma_grid(given, 20)
    found = ancestral(model, start(given, sigmas[0], noise[0]), sigmas, None, 1.0, noise.__getitem__)
    torch.testing.assert_close(found, z, rtol=0, atol=1e-12)


def test_ddim_is_equation_12():
    """Song et al. in their own coordinates, with the network's eps; 20 of 1000 timesteps."""
    given, bars = DenoiserSettings("discrete"), alpha_bars("linear")
    network = Ideal(vp_output(bars, "eps"))
    z = noise = noises(0)[0]
    steps = list(range(999, 0, -50))
    for t, before in zip(steps, [*steps[1:], None], strict=True):
        a, following = bars[t], 1.0 if before is None else bars[before]
        eps = network.output(z, torch.full((2, 1, 1, 1), float(t), dtype=torch.float64))
        x = (z - math.sqrt(1 - a) * eps) / math.sqrt(a)
        z = math.sqrt(following) * x + math.sqrt(1 - following) * eps
    sigmas = sigma_grid(given, 20)
    with torch.no_grad():
        found = ddim(denoiser(given, network), start(given, sigmas[0], noise), sigmas, None, 1.0, none)
    torch.testing.assert_close(found, z, rtol=0, atol=2e-5)  # eps is float32, times sigma = 157


def test_ddim_is_eulers_method_on_a_flow():
    """SiT: z' = z + (tau' - tau) output, from noise at tau = 0 to data at 1."""
    given, noise = DenoiserSettings("flow"), noises(0)[0]

    def output(z, tau):
        return torch.tanh(z * (1 + tau)) - 0.3 * tau

    z = noise
    for i in range(8):
        z = z + output(z, torch.tensor(i / 8, dtype=torch.float64)) / 8
    sigmas = sigma_grid(given, 8)
    with torch.no_grad():
        found = ddim(denoiser(given, Ideal(output)), start(given, sigmas[0], noise), sigmas, None, 1.0, none)
    torch.testing.assert_close(found, z, rtol=0, atol=1e-6)


def test_restart_of_a_consistency_model():
    """Song et al., arXiv:2303.01469, algorithm 1."""
    noise, sigmas = noises(3), [80.0, 5.0, 0.6, 0.002]
    model = Bent()
    x = model.denoise(80 * noise[0], torch.full((2,), 80.0, dtype=torch.float64))
    for i, sigma in enumerate((5.0, 0.6)):
        x = model.denoise(x + math.sqrt(sigma**2 - 0.002**2) * noise[i + 1], torch.full((2,), sigma, dtype=torch.float64))
    found = restart(model, 80 * noise[0], sigmas, None, 1.0, noise.__getitem__)
    torch.testing.assert_close(found, x, rtol=0, atol=1e-12)


def test_models_with_timesteps_start_from_pure_noise():
    """z = alpha y = noise, of standard deviation 1; y of the others has sigma."""
    noise = noises(0)[0]
    sigma = preconditioning(DenoiserSettings("discrete", betas="scaled_linear", beta_start=0.00085, beta_end=0.012)).range[1]
    y = start(DenoiserSettings("discrete"), sigma, noise)
    torch.testing.assert_close(y / math.sqrt(1 + sigma**2), noise)
    assert torch.equal(start(DenoiserSettings(), 80.0, noise), 80 * noise)
