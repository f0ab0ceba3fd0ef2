"""Schedules against their definitions, finite differences and the values that follow from the IMM paper."""

from __future__ import annotations

import math

import pytest
import torch

from mmgen.errors import ConfigError
from mmgen.diffusion.schedules import COSINE, FLOW, SCHEDULES, ScheduleSettings, make_schedule

TIMES = torch.tensor([1e-4, 0.006, 0.05, 0.3, 0.5, 0.7, 0.9, 0.99, 0.994, 0.996], dtype=torch.float64)
both = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
MADE = {
    f"{word}-{shift:g}": make_schedule(ScheduleSettings(word, shift))
    for word in ("fm", "vp_cosine", "ddpm_linear", "edm") for shift in (1.0, 0.5, 4.0)
}  # fmt: skip
made = pytest.mark.parametrize("name", MADE)


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def same(found, expected, rtol=1e-12, atol=0.0):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=torch.float64), rtol=rtol, atol=atol)


def test_definitions():
    same(FLOW.alpha(t(0.3)), [0.7])
    same(FLOW.sigma(t(0.3)), [0.3])
    same(COSINE.alpha(t(0.3)), [math.cos(0.15 * math.pi)])
    same(COSINE.sigma(t(0.3)), [math.sin(0.15 * math.pi)])


def test_largest_times_and_their_eta():
    """T and eta(T) as tabulated: 0.994 with 165.667, 0.996 with 159.15."""
    assert (FLOW.t_max, COSINE.t_max) == (0.994, 0.996)
    same(FLOW.eta(t(0.994)), [165.667], rtol=3e-6)  # half a unit of the last printed digit
    same(COSINE.eta(t(0.996)), [159.15], rtol=4e-5)


def test_two_step_times():
    same(FLOW.eta_inverse(t(1.4)), [0.583333], atol=5e-7, rtol=0)
    same(COSINE.eta_inverse(t(1.4)), [0.605137], atol=5e-7, rtol=0)


def test_log_snr_formulas():
    """The columns lambda_t and -d lambda/dt of the table of schedules."""
    same(FLOW.log_snr(TIMES), 2 * ((1 - TIMES).log() - TIMES.log()))
    same(FLOW.d_log_snr(TIMES), -2 / (TIMES * (1 - TIMES)))
    same(COSINE.log_snr(TIMES), -2 * torch.tan(0.5 * math.pi * TIMES).log(), atol=1e-13)  # 0 at t = 1/2
    same(COSINE.d_log_snr(TIMES), -2 * math.pi / torch.sin(math.pi * TIMES), rtol=1e-11)


@both
def test_inverses(schedule):
    """Near t = 1, d t/d log eta = t (1 - t): the round trip is better conditioned than t itself."""
    same(schedule.eta_inverse(schedule.eta(TIMES)), TIMES, rtol=1e-13)
    same(schedule.log_snr_inverse(schedule.log_snr(TIMES)), TIMES, rtol=1e-13)
    etas = t(1e-6, 0.01, 1.0, 160.0, 1e6)
    same(schedule.eta(schedule.eta_inverse(etas)), etas, rtol=1e-9)  # conditioned by eta: 1e6 times 1e-16


@both
def test_neighbouring_times_stay_apart(schedule):
    """IMM's smallest step, t - r = 1.8e-7 at T, survives eta and back to 1e-6 of itself."""
    late, gap = t(schedule.t_max), 1.8e-7
    back = schedule.eta_inverse(schedule.eta(late)) - schedule.eta_inverse(schedule.eta(late - gap))
    same(back, [gap], rtol=1e-6)


@pytest.mark.parametrize("schedule", MADE.values(), ids=MADE)
@pytest.mark.parametrize("function, derivative", [("alpha", "d_alpha"), ("sigma", "d_sigma"), ("log_snr", "d_log_snr")])
def test_derivatives(schedule, function, derivative):
    """Fourth-order central differences; step h relative to the distance to the ends: error h^4 + 1e-16 / h, about 1e-11."""
    h = 1e-3 * torch.minimum(TIMES, 1 - TIMES)
    f = getattr(schedule, function)
    slope = (8 * (f(TIMES + h) - f(TIMES - h)) - (f(TIMES + 2 * h) - f(TIMES - 2 * h))) / (12 * h)
    # atol: where h is 1e-7, a difference of numbers of order 10 is known to 1e-15 / 1e-7
    same(getattr(schedule, derivative)(TIMES), slope, rtol=1e-8, atol=2e-8)


@both
def test_ends(schedule):
    ends = t(0.0, 1.0)
    same(schedule.alpha(ends), [1.0, 0.0], atol=1e-15)  # cos(pi / 2) is 6e-17
    same(schedule.sigma(ends), [0.0, 1.0])
    assert schedule.eta(ends)[0] == 0 and schedule.eta(ends)[1] > 1e15
    same(schedule.eta_inverse(t(0.0, math.inf)), [0.0, 1.0])
    same(schedule.eta_inverse(schedule.eta(ends)), [0.0, 1.0])
    assert schedule.log_snr(ends)[0] == math.inf and schedule.log_snr(ends)[1] < -70
    same(schedule.log_snr_inverse(t(math.inf, -math.inf)), [0.0, 1.0])


@both
def test_order_and_dtype(schedule):
    dense = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    assert (schedule.eta(dense).diff() > 0).all() and (schedule.log_snr(dense).diff() < 0).all()
    assert (schedule.d_log_snr(dense) < 0).all()
    for name in (
        "alpha",
        "sigma",
        "d_alpha",
        "d_sigma",
        "eta_inverse",
        "eta",
        "log_snr",
        "log_snr_inverse",
        "d_log_snr",
    ):
        value = getattr(schedule, name)(dense.reshape(9, 111))
        assert value.dtype == torch.float64 and value.shape == (9, 111), name


def test_made_of_a_name():
    assert make_schedule(ScheduleSettings("fm")) is FLOW and make_schedule(ScheduleSettings()) is COSINE
    assert make_schedule(ScheduleSettings("edm")) is make_schedule(ScheduleSettings("edm"))
    for wrong in ({"shift": 0.0}, {"shift": math.nan}, {"sigma_min": 80.0}, {"sigma_min": 0.0}, {"sigma_max": math.inf}):
        with pytest.raises(ConfigError, match="schedule"):
            make_schedule(ScheduleSettings("edm", **wrong))


@made
def test_made_keep_their_kind(name):
    schedule, times = MADE[name], torch.cat([TIMES, t(0.0, 1.0)])
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    kind = {"fm": alpha + sigma, "edm": alpha}.get(schedule.name, (alpha**2 + sigma**2).sqrt())
    same(kind, torch.ones_like(times))
    assert (sigma > 0)[:-2].all() and (alpha > 0)[:-1].all()


@made
def test_made_inverses_and_shift(name):
    """The log-SNR is lower by 2 log shift; times and eta are inverse."""
    schedule, shift = MADE[name], float(name.rsplit("-", 1)[1])
    base = make_schedule(ScheduleSettings(schedule.name))
    same(schedule.log_snr(TIMES), base.log_snr(TIMES) - 2 * math.log(shift), atol=1e-11, rtol=1e-11)
    same(schedule.eta_inverse(schedule.eta(TIMES)), TIMES, rtol=1e-11)
    assert (schedule.eta(torch.linspace(0.001, 1, 500, dtype=torch.float64)).diff() > 0).all()
    same(schedule.eta_inverse(t(0.0, 1e30)), [0.0, 1.0], atol=1e-12)
    for function in (schedule.alpha, schedule.sigma, schedule.d_alpha, schedule.d_sigma, schedule.eta_inverse):
        value = function(TIMES.reshape(2, 5))
        assert value.dtype == torch.float64 and value.shape == (2, 5)


def test_ddpm_linear_is_the_limit_of_ddpms_betas():
    """beta = 0.1/N to 20/N over N steps, N = 200,000: alpha-bar is the product of 1 - beta; an error of order 1/N. And the
    end is DDPM's, 0.0064, of 1000 betas from 1e-4 to 0.02."""
    schedule, n = MADE["ddpm_linear-1"], 200_000
    betas = torch.linspace(0.1, 20, n, dtype=torch.float64) / n
    bars = (1 - betas).log().cumsum(0).exp()
    at = torch.tensor([0.1, 0.37, 0.5, 0.9, 1.0], dtype=torch.float64)
    same(schedule.alpha(at) ** 2, bars[(at * n).long() - 1], rtol=2e-3)
    thousand = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).neg().log1p().sum().mul(0.5).exp()
    same(schedule.alpha(t(1.0)), thousand[None], rtol=0.05)


def test_edms_times():
    """The sigmas of eight steps as Moment Matching Distillation takes them, to the digits written down."""
    sigma = MADE["edm-1"].sigma(1 - torch.arange(8, dtype=torch.float64) / 8)
    same(sigma, [80, 39.02, 17.53, 7.10, 2.515, 0.743, 0.170, 0.0261], rtol=2.5e-3)
    same(MADE["edm-1"].sigma(t(0.0, 1.0)), [0.002, 80.0])
