"""q(z_s | z_t, x): by simulation, by the product of two normals, in EDM's coordinates, and at the ends."""

from __future__ import annotations

import math

import pytest
import torch

from mmgen.diffusion.process import ddim_coefficients, posterior, unconditional
from mmgen.diffusion.schedules import ScheduleSettings, make_schedule

SCHEDULES = {
    word + ("" if shift == 1 else f"-{shift}"): make_schedule(ScheduleSettings(word, shift))
    for word, shift in (("fm", 1), ("fm", 3), ("vp_cosine", 1), ("vp_cosine", 0.5), ("ddpm_linear", 1), ("edm", 1))
}
schedules = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """All s < t from 0.05 to 0.95."""
    times = torch.arange(1, 20, dtype=torch.float64) / 20
    s, t = torch.meshgrid(times, times, indexing="ij")
    return s[s < t], t[s < t]


@schedules
def test_is_the_product_of_the_two_normals(schedule):
    """1/var = 1/sigma_s^2 + a^2/v and mean/var = a z_t/v + alpha_s x/sigma_s^2, where z_t = a z_s + sqrt(v) e."""
    s, t = pairs()
    a = schedule.alpha(t) / schedule.alpha(s)
    v = schedule.sigma(t) ** 2 - a**2 * schedule.sigma(s) ** 2
    var = 1 / (1 / schedule.sigma(s) ** 2 + a**2 / v)
    on_z, on_x, std = posterior(schedule, s, t)
    torch.testing.assert_close(std**2, var, rtol=1e-10, atol=0)
    torch.testing.assert_close(on_z, var * a / v, rtol=1e-10, atol=0)
    torch.testing.assert_close(on_x, var * schedule.alpha(s) / schedule.sigma(s) ** 2, rtol=1e-10, atol=1e-14)


@schedules
@pytest.mark.parametrize(("s", "t"), [(0.2, 0.3), (0.5, 0.9), (0.75, 1.0)])
def test_simulated(schedule, s, t):
    """400,000 pairs (z_s, z_t) from the forward process at x = 0.7: the regression of z_s on z_t, and what it leaves."""
    generator, count, x = torch.Generator().manual_seed(0), 400_000, 0.7
    e, more = torch.randn(2, count, dtype=torch.float64, generator=generator)
    (alpha_s, alpha_t), (sigma_s, sigma_t) = schedule.alpha(f64(s, t)).tolist(), schedule.sigma(f64(s, t)).tolist()
    z_s = alpha_s * x + sigma_s * e
    z_t = alpha_t / alpha_s * z_s + math.sqrt(sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2) * more
    on_z, on_x, std = (value.item() for value in posterior(schedule, f64(s), f64(t)))
    slope = ((z_s - z_s.mean()) * (z_t - z_t.mean())).mean() / z_t.var()
    left = z_s - z_s.mean() - slope * (z_t - z_t.mean())
    error = 5 / math.sqrt(count)
    assert slope.item() == pytest.approx(on_z, abs=error * std / sigma_t)
    assert left.std().item() == pytest.approx(std, rel=error)
    assert (z_s - on_z * z_t).mean().item() == pytest.approx(on_x * x, abs=error * std)


def test_in_edms_coordinates():
    edm, (s, t) = SCHEDULES["edm"], pairs()
    sigma_s, sigma_t = edm.sigma(s), edm.sigma(t)
    ratio = (sigma_s / sigma_t) ** 2
    on_z, on_x, std = posterior(edm, s, t)
    torch.testing.assert_close(on_z, ratio, rtol=1e-12, atol=0)
    torch.testing.assert_close(on_x, 1 - ratio, rtol=1e-12, atol=0)
    torch.testing.assert_close(std**2, sigma_s**2 * (sigma_t**2 - sigma_s**2) / sigma_t**2, rtol=1e-12, atol=0)


def test_the_case_that_others_got_wrong():
    """Linear path, t = 1/2 and s = 3/8: by hand. With sigma_{t|s} = sigma_t / sigma_s it would be 0.06, 0.60 and 0.37."""
    found = torch.stack(posterior(SCHEDULES["fm"], f64(0.375), f64(0.5)))[:, 0]
    torch.testing.assert_close(found, f64(0.45, 0.40, 0.30), rtol=1e-14, atol=0)


@schedules
@pytest.mark.parametrize("stochasticity", [0.0, 0.3, 0.5, 1.0])
def test_z_s_keeps_its_distribution_given_x(schedule, stochasticity):
    """Whatever the stochasticity: mean alpha_s x, variance sigma_s^2; and it scales the standard deviation."""
    s, t = pairs()
    s, t = torch.cat([s, f64(0.0, 0.3, 0.9)]), torch.cat([t, f64(1.0, 1.0, 1.0)])
    on_z, on_x, std = posterior(schedule, s, t, stochasticity=stochasticity)
    torch.testing.assert_close(on_z * schedule.alpha(t) + on_x, schedule.alpha(s), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close((on_z * schedule.sigma(t)) ** 2 + std**2, schedule.sigma(s) ** 2, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(std, stochasticity * posterior(schedule, s, t)[2], rtol=1e-15, atol=0)


@schedules
def test_without_stochasticity_it_is_ddim(schedule):
    s, t = pairs()
    on_z, on_x, std = posterior(schedule, s, t, stochasticity=0.0)
    expected = ddim_coefficients(schedule, s, t)
    torch.testing.assert_close((on_z, on_x), expected, rtol=1e-12, atol=1e-14)
    assert (std == 0).all()


@schedules
@pytest.mark.parametrize("stochasticity", [0.0, 0.5, 1.0])
def test_at_the_ends(schedule, stochasticity):
    """s = t is z_t; sigma_s = 0 is x; all finite, float64; from t = 1 with alpha 0 z_t, pure noise, is forgotten."""
    same = f64(0.0, 1e-9, 0.5, 1 - 1e-9, 1.0)
    on_z, on_x, std = posterior(schedule, same, same, stochasticity=stochasticity)
    torch.testing.assert_close(on_z, torch.ones(5, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close((on_x, std), (torch.zeros(5, dtype=torch.float64),) * 2, rtol=0, atol=1e-7)
    data = f64(0.0, 0.0, 0.0)
    on_z, on_x, std = posterior(schedule, data, f64(1e-6, 0.5, 1.0), stochasticity=stochasticity)
    if schedule.name != "edm":  # whose t = 0 is sigma_min
        assert on_z.tolist() == std.tolist() == [0.0] * 3 and on_x.tolist() == [1.0] * 3
    s = f64(0.25, 0.999)
    found = posterior(schedule, s, torch.ones_like(s), stochasticity=stochasticity)
    assert all(value.isfinite().all() and value.dtype == torch.float64 for value in found)
    if stochasticity == 1 and schedule.name in ("fm", "vp_cosine"):
        torch.testing.assert_close(found, unconditional(schedule, s), rtol=1e-12, atol=1e-10)


@schedules
def test_unconditional(schedule):
    s = f64(0.0, 0.3, 1.0)
    on_z, on_x, std = unconditional(schedule, s)
    assert (on_z == 0).all() and torch.equal(on_x, schedule.alpha(s)) and torch.equal(std, schedule.sigma(s))
