"""IMM's flow map: its coefficients against tabulated values and definitions, and against an exactly solvable process."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from mmgen.diffusion.process import ddim_coefficients, diffuse
from mmgen.diffusion.flow_map import FlowMapSettings, coefficients, input_scale, network_times
from mmgen.models.flow_model import flow_map, guided_output
from mmgen.losses.imm import kernel_weight
from mmgen.networks.conditions import Labels
from mmgen.sampling.flow_map_samplers import pushforward, time_grid

SCHEDULES = ("fm", "vp_cosine")
FLOWS = [
    ("fm", "identity"),
    ("fm", "simple_edm"),
    ("fm", "euler_fm"),
    ("vp_cosine", "identity"),
    ("vp_cosine", "simple_edm"),
]
every_flow = pytest.mark.parametrize("schedule, parametrization", FLOWS)
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)


def times(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


S, R, T = times(0.001, 0.2, 0.5, 0.29, 0.9), times(0.006, 0.4, 0.6, 0.295, 0.98), times(0.5, 0.7, 0.97, 0.3, 0.994)

TABLE = [  # c_skip, c_out, w~ at (t, s) = (.7, .2), (.994, .006), (.3, .29)
    ("fm", "identity", [(0.285714, 0.714286, 1.4), (0.006036, 0.993964, 1.006073), (0.966667, 0.033333, 30.0)]),
    ("fm", "simple_edm", [(0.655172, -0.328266, 3.046309), (0.012072, -0.496973, 2.012182), (1.006897, -0.006565, 152.315462)]),
    ("fm", "euler_fm", [(1, -0.25, 4.0), (1, -0.494, 2.024291), (1, -0.005, 200.0)]),
    ("vp_cosine", "simple_edm",
     [(0.707107, -0.353553, 2.828427), (0.018848, -0.499911, 2.000355), (0.999877, -0.007854, 127.329191)]),
]  # fmt: skip


@pytest.mark.parametrize("schedule, parametrization, rows", TABLE, ids=[f"{s}-{p}" for s, p, _ in TABLE])
def test_tabulated_values(schedule, parametrization, rows):
    flow = FlowMapSettings(schedule, parametrization)
    s, t = times(0.2, 0.006, 0.29), times(0.7, 0.994, 0.3)
    found = torch.stack([*coefficients(flow, s, t), kernel_weight(flow, s, t)], 1)
    torch.testing.assert_close(found, torch.tensor(rows, dtype=torch.float64), rtol=0, atol=6e-7)  # six printed decimals


@every_flow
def test_staying_is_the_identity(schedule, parametrization):
    c_skip, c_out = coefficients(FlowMapSettings(schedule, parametrization), T, T)
    torch.testing.assert_close(c_skip, torch.ones_like(T), rtol=0, atol=1e-15)
    torch.testing.assert_close(c_out, torch.zeros_like(T), rtol=0, atol=1e-16)


@pytest.mark.parametrize("schedule, parametrization", [("fm", "simple_edm"), ("fm", "euler_fm"), ("vp_cosine", "simple_edm")])
def test_ends_of_the_path(schedule, parametrization):
    """s = t = 0 is the identity too; from t = 1 to s = 0 nothing is divided by alpha."""
    c_skip, c_out = coefficients(FlowMapSettings(schedule, parametrization), times(0, 0), times(0, 1))
    torch.testing.assert_close(c_skip, times(1, 1 if parametrization == "euler_fm" else 0), rtol=0, atol=1e-15)
    torch.testing.assert_close(c_out, times(0, -0.5), rtol=0, atol=1e-15)


@every_flow
@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_definition_by_g_and_ddim(schedule, parametrization, sigma_data):
    """f = DDIM(x_t, g(x_t), s, t) of eq. 11, with g's own c_skip and c_out; numbers, so rounding only."""
    flow = FlowMapSettings(schedule, parametrization, sigma_data=sigma_data)
    path = flow.get_schedule()
    alpha, sigma, x_t, output = path.alpha(T), path.sigma(T), times(1, -2, 0.3, 0.7, 5), times(0.4, 3, -1, 2, 0.1)
    power = alpha**2 + sigma**2
    g = {
        "identity": output,
        "simple_edm": alpha / power * x_t - sigma_data * sigma / power.sqrt() * output,
        "euler_fm": x_t - T * sigma_data * output,
    }[parametrization]
    ratio = path.sigma(S) / sigma
    expected = (path.alpha(S) - ratio * alpha) * g + ratio * x_t
    c_skip, c_out = coefficients(flow, S, T)
    torch.testing.assert_close(c_skip * x_t + c_out * output, expected, rtol=1e-12, atol=1e-14)


def test_cosine_simple_edm_is_a_rotation():
    c_skip, c_out = coefficients(FlowMapSettings("vp_cosine", "simple_edm"), S, T)
    torch.testing.assert_close(c_skip, torch.cos(math.pi / 2 * (T - S)), rtol=1e-12, atol=0)
    torch.testing.assert_close(c_out, -0.5 * torch.sin(math.pi / 2 * (T - S)), rtol=1e-12, atol=0)


@every_flow
def test_perfect_output_is_what_g_is_said_to_approximate(schedule, parametrization):
    """With the exact x (one data point), sigma_d G is (alpha eps - sigma x) / root, eps - x, or G is x: f is then x_s."""
    flow = FlowMapSettings(schedule, parametrization)
    path, x, eps = flow.get_schedule(), times(0.3, -1, 0.5, 2, 0), times(0.2, 0.1, -0.4, 0.6, 1)
    alpha, sigma = path.alpha(T), path.sigma(T)
    output = {
        "identity": x,
        "simple_edm": (alpha * eps - sigma * x) / (alpha**2 + sigma**2).sqrt() / 0.5,
        "euler_fm": (eps - x) / 0.5,
    }[parametrization]
    c_skip, c_out = coefficients(flow, S, T)
    arrived = c_skip * (alpha * x + sigma * eps) + c_out * output
    torch.testing.assert_close(arrived, path.alpha(S) * x + path.sigma(S) * eps, rtol=1e-12, atol=1e-14)


@every_schedule
def test_ddim_is_self_consistent(schedule):
    """t -> r -> s is t -> s for a fixed x; and DDIM from x_t with its own x is x_s."""
    path = FlowMapSettings(schedule).get_schedule()
    to_r, to_s, direct = (ddim_coefficients(path, *pair) for pair in ((R, T), (S, R), (S, T)))
    torch.testing.assert_close(to_s[0] * to_r[0], direct[0], rtol=1e-13, atol=0)
    torch.testing.assert_close(to_s[0] * to_r[1] + to_s[1], direct[1], rtol=1e-12, atol=1e-15)
    x, eps = torch.randn(2, 5, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    on_z, on_x = (c.reshape(-1, 1, 1, 1) for c in direct)
    torch.testing.assert_close(on_z * diffuse(path, x, eps, T) + on_x * x, diffuse(path, x, eps, S), rtol=1e-12, atol=1e-14)


@every_schedule
def test_network_input_has_unit_variance(schedule):
    """c_in^2 (alpha^2 + sigma^2) sigma_d^2 = 1."""
    flow = FlowMapSettings(schedule, sigma_data=0.7)
    path = flow.get_schedule()
    variance = (path.alpha(T) ** 2 + path.sigma(T) ** 2) * 0.7**2
    torch.testing.assert_close(input_scale(flow, T) ** 2 * variance, torch.ones_like(T))


def test_network_times():
    flow = FlowMapSettings(time_scale=100.0)
    assert [v.tolist() for v in network_times(flow, times(0.25), times(0.75))] == [[75.0], [25.0]]
    flow = FlowMapSettings(time_scale=100.0, second_time="t-s")
    assert [v.tolist() for v in network_times(flow, times(0.25), times(0.75))] == [[75.0], [50.0]]


# A solvable process: pixels are independent, x ~ N(MEAN, STD^2), eps ~ N(0, 0.5^2)

MEAN, STD, NOISE_STD = 0.3, 0.2, 0.5


def variance(path, t):
    return (path.alpha(t) * STD) ** 2 + (path.sigma(t) * NOISE_STD) ** 2


class ExactNetwork(nn.Module):
    """The raw output for which f_{s,t} is the probability-flow ODE's own map, which for a Gaussian is linear."""

    num_classes = 0

    def __init__(self, flow: FlowMapSettings) -> None:
        super().__init__()
        self.flow, self.config = flow, self
        self.seen = []

    def forward(self, scaled, time, second, condition=None):
        assert scaled.dtype == torch.float32
        flow, path = self.flow, self.flow.get_schedule()
        t = time / flow.time_scale
        s = second / flow.time_scale if flow.second_time == "s" else t - second / flow.time_scale
        self.seen.append((s[0].item(), t[0].item()))
        z = scaled.double() / input_scale(flow, t).reshape(-1, 1, 1, 1)
        (alpha_t, alpha_s, root) = (
            v.reshape(-1, 1, 1, 1) for v in (path.alpha(t), path.alpha(s), (variance(path, s) / variance(path, t)).sqrt())
        )
        arrived = alpha_s * MEAN + root * (z - alpha_t * MEAN)
        c_skip, c_out = (c.reshape(-1, 1, 1, 1) for c in coefficients(flow, s, t))
        return (arrived - c_skip * z) / c_out

    def f(self, x, s, t, label, guidance):
        return flow_map(self, self.flow, x, s, t, label, guidance)


def integrate(path, z, start: float, end: float, steps: int = 2000):
    """The ODE dz/dt = alpha' E[x|z] + sigma' E[eps|z], by the classical fourth-order method in float64."""

    def velocity(t, z):
        time = times(t)
        alpha, sigma, total = path.alpha(time), path.sigma(time), variance(path, time)
        residual = z - alpha * MEAN
        data, noise = MEAN + alpha * STD**2 / total * residual, sigma * NOISE_STD**2 / total * residual
        return path.d_alpha(time) * data + path.d_sigma(time) * noise

    h = (end - start) / steps
    for i in range(steps):
        t = start + i * h
        k1 = velocity(t, z)
        k2 = velocity(t + h / 2, z + h / 2 * k1)
        k3 = velocity(t + h / 2, z + h / 2 * k2)
        z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + velocity(t + h, z + h * k3))
    return z


@every_flow
@pytest.mark.parametrize("second_time", ["s", "t-s"])
def test_exact_flow_map_reaches_the_data(schedule, parametrization, second_time):
    """Pushforward in 1, 2, 4 steps: where the ODE goes, and with the data's mean and variance at t = 0.

    The network's float32 limits a jump to about 1e-7 of the values, which the last jump multiplies by up to 1 / 0.2.
    """
    t_max = 0.994 if schedule == "fm" else 0.996
    flow = FlowMapSettings(schedule, parametrization, second_time, t_min=0.0, t_max=t_max)
    path, end = flow.get_schedule(), times(t_max)
    quantiles = torch.special.ndtri((torch.arange(256, dtype=torch.float64) + 0.5) / 256)
    spread = variance(path, end).sqrt() / quantiles.std(correction=0)  # exactly the variance at T
    z = (path.alpha(end) * MEAN + spread * quantiles).reshape(4, 1, 8, 8)
    expected = integrate(path, z, t_max, 0.0)
    assert abs(expected.mean() - MEAN) < 1e-9 and abs(expected.std(correction=0) - STD) < 1e-9  # the formulas agree
    for steps in (1, 2, 4):
        network = ExactNetwork(flow)
        grid = time_grid(flow, steps)
        found = pushforward(network, z, grid, None, 1.0, None)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
        torch.testing.assert_close(torch.tensor(network.seen), torch.tensor(list(zip(grid[1:], grid, strict=False))))


# Guidance


class Labelled(nn.Module):
    """Output: the input times one more than the label, plus the second time."""

    num_classes = 3

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def forward(self, x, t, s, condition=None):
        self.calls.append(None if condition is None else condition.classes.tolist())
        classes = torch.full((len(x),), self.num_classes) if condition is None else condition.classes
        return x * (1 + classes).reshape(-1, 1, 1, 1) + s.reshape(-1, 1, 1, 1)


def test_guidance_on_the_raw_output():
    flow, network = FlowMapSettings(time_scale=1.0), Labelled()
    x, label = torch.randn(5, 1, 2, 2, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 3])
    scaled = input_scale(flow, T).reshape(-1, 1, 1, 1) * x
    second = S.reshape(-1, 1, 1, 1)
    conditional, unconditional = scaled * (1 + label).reshape(-1, 1, 1, 1) + second, scaled * 4 + second
    null = [3] * 5
    for w, calls in (
        (1.0, [label.tolist()]),
        (0.0, [null]),
        (1.5, [null + label.tolist()]),
        (-1.0, [null + label.tolist()]),
    ):
        network.calls.clear()
        found = guided_output(network, flow, x, S, T, Labels(label, 3), w)
        expected = w * conditional + (1 - w) * unconditional
        assert found.dtype == torch.float32 and network.calls == calls
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
        c_skip, c_out = (c.reshape(-1, 1, 1, 1) for c in coefficients(flow, S, T))
        jump = flow_map(network, flow, x, S, T, Labels(label, 3), w)
        torch.testing.assert_close(jump, c_skip * x + c_out * expected, rtol=1e-5, atol=1e-5)


def test_without_labels_guidance_has_no_effect():
    network, x = Labelled(), torch.randn(5, 1, 2, 2)
    assert torch.equal(
        guided_output(network, FlowMapSettings(), x, S, T, None, 1.5),
        guided_output(network, FlowMapSettings(), x, S, T, None, 1.0),
    )
    assert network.calls == [None, None]
    assert flow_map(network, FlowMapSettings(), x, S, T).dtype == torch.float32
