"""The times of IMM: the mapping r(s, t) by all four rules, and the distribution of (s, t)."""

from __future__ import annotations

import math

import pytest
import torch

from mmgen.diffusion.flow_map import FlowMapSettings
from mmgen.losses.imm import ImmSettings, documented_times, draw_times, earlier_time
from mmgen.system.random import keys

MAPPINGS = ("eta", "t", "log_snr", "inverse_eta")
SCHEDULES = ("fm", "vp_cosine")


def times(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def flow_for(mapping: str, schedule: str) -> FlowMapSettings:
    t_min, t_max = documented_times(mapping, FlowMapSettings(schedule).get_schedule().t_max)
    return FlowMapSettings(schedule, t_min=t_min, t_max=t_max)


def test_documented_times():
    """Section 2.5."""
    assert documented_times("eta", 0.994) == (0.006, 0.994)
    assert documented_times("t", 0.994) == (0.0, 1.0)
    assert documented_times("log_snr", 0.996) == (0.001, 0.996)
    assert documented_times("inverse_eta", 0.994) == (0.005, 1.0)


STEPS = {  # (k, t_min): t - r at the times below, section 2.4
    (15, 0.006): ("4.6e-3", "4.1e-3", "2.5e-3", "1.27e-3", "4.6e-4", "5.1e-5", "4.6e-6", "1.8e-7"),
    (12, 0.0): ("3.8e-2", "3.4e-2", "2.0e-2", "1.03e-2", "3.7e-3", "4.1e-4", "3.6e-5", "1.5e-6"),
}


@pytest.mark.parametrize("k, t_min", STEPS)
def test_tabulated_steps(k, t_min):
    """Each figure to one unit of its last printed digit."""
    t = times(0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97, 0.994)
    settings, flow = ImmSettings(k=k, eta_range="exact"), FlowMapSettings(t_min=t_min, t_max=0.994)
    steps = t - earlier_time(settings, flow, torch.full_like(t, t_min), t)
    for found, printed in zip(steps.tolist(), STEPS[k, t_min], strict=True):
        digits, exponent = printed.split("e")
        assert abs(found - float(printed)) <= 10.0 ** (int(exponent) - len(digits.split(".")[1])), printed


def test_step_in_eta_as_tabulated():
    """u = .005055561 for k = 15 with the exact range, .040445964 for k = 12 from 0; 160 / 2^k with the paper's range."""
    cases = [(15, "exact", 0.006, 0.005055561), (12, "exact", 0.0, 0.040445964), (15, "paper", 0.006, 160 / 2**15)]
    for k, eta_range, t_min, u in cases:
        flow, t = FlowMapSettings(t_min=t_min, t_max=0.994), times(0.5)
        r = earlier_time(ImmSettings(k=k, eta_range=eta_range), flow, times(t_min), t)
        assert abs(1 - r / (1 - r) - u) < 6e-10


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("mapping", MAPPINGS)
def test_step_is_constant_in_its_quantity(mapping, schedule):
    flow, k = flow_for(mapping, schedule), 8.0
    path, t = flow.get_schedule(), times(0.2, 0.5, 0.8, 0.95)
    r = earlier_time(ImmSettings(mapping=mapping, k=k), flow, torch.full_like(t, flow.t_min), t)
    quantity = {"eta": path.eta, "t": lambda v: v, "log_snr": path.log_snr, "inverse_eta": lambda v: 1 / path.eta(v)}[mapping]
    low, high = quantity(times(flow.t_min, flow.t_max)).tolist() if mapping != "eta" else (0.0, 160.0)
    inside = r > flow.t_min
    assert inside.sum() >= 2
    # log-SNR and 1/eta rise towards the data: the step has the sign of the whole range
    torch.testing.assert_close(
        (quantity(t) - quantity(r))[inside], times((high - low) / 2**k).expand(4)[inside], rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("eta_range", ["paper", "exact"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("mapping", MAPPINGS)
def test_r_is_between_s_and_t(mapping, schedule, eta_range):
    """For drawn times and at the ends of the range, with any step and gap: finite, s <= r <= t, r < t where there is room."""
    flow = flow_for(mapping, schedule)
    drawn = draw_times(ImmSettings(), flow, keys(0, range(2000)))
    ends = times(flow.t_min, flow.t_min, flow.t_max, 0.5), times(flow.t_min, flow.t_max, flow.t_max, 0.5)
    s, t = (torch.cat(pair) for pair in zip(drawn, ends, strict=True))
    for k in (0.0, 10.0, 15.0):
        for gap in (0.0, 1e-4):
            settings = ImmSettings(mapping=mapping, k=k, min_gap=gap, eta_range=eta_range)
            r = earlier_time(settings, flow, s, t)
            assert r.isfinite().all() and r.dtype == torch.float64
            assert (r >= s).all() and (r <= t).all()
            room = t - s > 1e-3
            if mapping != "inverse_eta":  # whose step vanishes at small t faster than float64 can hold
                assert (r[room] < t[room]).all()
            assert (t[room] - r[room] >= gap * (1 - 1e-9)).all()


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_r_rises_with_t(mapping):
    flow = flow_for(mapping, "fm")
    t = torch.linspace(flow.t_min, flow.t_max, 1001, dtype=torch.float64)[1:]
    r = earlier_time(ImmSettings(mapping=mapping), flow, torch.full_like(t, flow.t_min), t)
    assert (r.diff() >= 0).all() and r[-1] - r[0] > 0.9


def test_share_of_boundary_terms():
    """r = s for 2.4 % of uniform draws with CIFAR-10's settings, 11.6 % with ImageNet's and its gap (section 2.4).

    30,000 draws: 0.09 % and 0.18 % standard error; bounds 4 of them and the rounding of the print.
    """
    for settings, t_min, share, bound in (
        (ImmSettings(k=15, eta_range="exact"), 0.006, 0.024, 0.0041),
        (ImmSettings(k=12, eta_range="exact", min_gap=1e-4), 0.0, 0.116, 0.008),
    ):
        flow = FlowMapSettings(t_min=t_min, t_max=0.994)
        s, t = draw_times(settings, flow, keys(0, range(30000)))
        assert abs((earlier_time(settings, flow, s, t) == s).double().mean().item() - share) < bound


# The distribution of (s, t)


def kolmogorov(sample: torch.Tensor) -> float:
    """Largest distance of the empirical distribution from the uniform one, times sqrt(n): above 1.95 once in 1000 times."""
    ordered, n = sample.sort().values, len(sample)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return math.sqrt(n) * max((ordered - steps[:-1]).max().item(), (steps[1:] - ordered).max().item())


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_uniform_times(schedule):
    flow = flow_for("eta", schedule)
    s, t = draw_times(ImmSettings(), flow, keys(1, range(20000)))
    assert s.dtype == t.dtype == torch.float64 and s.shape == t.shape == (20000,)
    assert (s >= flow.t_min).all() and (s < t).all() and (t <= flow.t_max).all()
    share_t = (t - flow.t_min) / (flow.t_max - flow.t_min)
    share_s = (s - flow.t_min) / (t - flow.t_min)
    assert kolmogorov(share_t) < 1.95 and kolmogorov(share_s) < 1.95
    assert torch.corrcoef(torch.stack([share_t, share_s]))[0, 1].abs() < 4 / math.sqrt(20000)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("t_min, t_max", [(0.006, None), (0.0, None), (0.1, 0.6), (0.0, 1.0)])
def test_lognormal_times(schedule, t_min, t_max):
    """log eta is normal between the ends; given t, so is that of s between t_min and t. The distribution by math.erf."""
    t_max = FlowMapSettings(schedule).get_schedule().t_max if t_max is None else t_max
    flow = FlowMapSettings(schedule, t_min=t_min, t_max=t_max)
    settings = ImmSettings(time_distribution="lognormal", lognormal_mean=-0.5, lognormal_std=1.5)
    s, t = draw_times(settings, flow, keys(2, range(5000)))
    assert (s >= t_min).all() and (s <= t).all() and (t <= t_max).all() and s.isfinite().all() and t.isfinite().all()

    def probability(time: float) -> float:
        eta = time / (1 - time) if schedule == "fm" and time < 1 else math.tan(math.pi * time / 2) if time < 1 else math.inf
        return 0.5 * (1 + math.erf((math.log(eta) + 0.5) / 1.5 / math.sqrt(2))) if eta > 0 else 0.0

    low, high = probability(t_min), probability(t_max)
    p_s, p_t = (times(*(probability(time) for time in v.tolist())) for v in (s, t))
    assert kolmogorov((p_t - low) / (high - low)) < 1.95
    assert kolmogorov((p_s - low) / (p_t - low)) < 1.95


def test_times_belong_to_the_key():
    flow, every = flow_for("eta", "fm"), keys(3, range(100))
    for distribution in ("uniform", "lognormal"):
        settings = ImmSettings(time_distribution=distribution)
        s, t = draw_times(settings, flow, every)
        some_s, some_t = draw_times(settings, flow, every[40:50])
        assert torch.equal(s[40:50], some_s) and torch.equal(t[40:50], some_t)
