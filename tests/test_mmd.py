"""The cancellation-free MMD against exact arithmetic, and differences of jumps in float32 against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from exact_mmd import exact_mmd
from test_flow_map import FLOWS

from mmgen.diffusion.process import diffuse, per_image
from mmgen.diffusion.flow_map import FlowMapSettings, coefficients
from mmgen.losses.imm import ImmSettings, earlier_time, imm_loss, jump_difference
from mmgen.losses.mmd import group_mmd

FLOOR = 1e-8
SIZES = (1e-7, 1e-5, 1e-3, 1e-1, 1.0)  # of delta, relative to the particles


def particles(size: int, dim: int, step: float, shared: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 (delta, y_r), [M, D]; shared: all particles move alike."""
    generator = torch.Generator().manual_seed(dim + size)
    y_r, move = (0.5 * torch.randn(size, dim, generator=generator) for _ in range(2))
    return step * (move[:1].repeat(size, 1) if shared else move), y_r


def value_and_gradient(difference, y_r, weight, kernel, dtype, floor=FLOOR):
    difference = difference.to(dtype)[None].requires_grad_()
    value = group_mmd(difference, y_r.to(dtype)[None], torch.tensor([weight], dtype=torch.float64), kernel, floor)
    assert value.dtype == torch.float64 and value.shape == (1,)
    (gradient,) = torch.autograd.grad(value.sum(), difference)
    assert gradient.dtype == dtype
    return value.item(), gradient[0].double().numpy()


def check(difference, y_r, weight, kernel, floor=FLOOR):
    """Both dtypes against exact arithmetic. Measured: value 2e-15, gradient 5e-14 in float64; in float32 its rounding."""
    value, gradient = exact_mmd(difference.numpy(), y_r.numpy(), weight, kernel, floor)
    # float32's smallest number is 1e-38: smaller gradients are compared absolutely
    norm = max(np.linalg.norm(gradient), 1e-30)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-7)):
        found, found_gradient = value_and_gradient(difference, y_r, weight, kernel, dtype, floor)
        assert abs(found - value) <= 1e-12 * abs(value), (dtype, found, value)
        assert np.linalg.norm(found_gradient - gradient) <= tolerance * norm, dtype


@pytest.mark.parametrize("kernel", ["laplace", "rbf"])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_small_particles(kernel, size):
    for step in SIZES:
        for weight in (1.0, 30.0, 1e3, 1e5):
            check(*particles(size, 64, step), weight, kernel)


@pytest.mark.parametrize("kernel", ["laplace", "rbf"])
@pytest.mark.parametrize("size, step", [(2, 1e-7), (2, 1.0), (4, 1e-7), (4, 1e-3), (8, 1e-7)])
def test_image_sized_particles(kernel, size, step):
    check(*particles(size, 3072, step), 2.0 if size == 8 else 1e3, kernel)


@pytest.mark.parametrize("kernel", ["laplace", "rbf"])
def test_all_particles_moving_alike(kernel):
    """Only then do the terms off the diagonal nearly cancel those on it."""
    for step in SIZES:
        for weight in (1.0, 1e3, 1e5):
            check(*particles(4, 64, step, shared=True), weight, kernel)


@pytest.mark.parametrize("kernel", ["laplace", "rbf"])
def test_particles_that_exchange_places(kernel):
    """y_t is a permutation of y_r: the MMD is 0, and expm1 of a large step must not overflow on the way.

    A squared distance of 0 comes out as the rounding of one of 64, 1e-14: a distance of 1e-7.
    """
    _, y_r = particles(4, 64, 1.0)
    for weight in (1.0, 1e3, 1e5, 1e12):
        value, gradient = value_and_gradient(y_r.roll(1, 0).double() - y_r.double(), y_r, weight, kernel, torch.float64)
        assert np.isfinite(value) and np.isfinite(gradient).all()
        if weight < 1e12:
            assert abs(value) < weight / 64 * (1e-7 if kernel == "laplace" else 1e-14)


@pytest.mark.parametrize("kernel", ["laplace", "rbf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_difference_no_loss(kernel, dtype):
    _, y_r = particles(4, 64, 1.0)
    y_r[3] = y_r[0]  # two of the targets are one
    for weight in (1.0, 1e5, 1e12):
        value, gradient = value_and_gradient(torch.zeros_like(y_r), y_r, weight, kernel, dtype)
        assert value == 0 and (gradient == 0).all()


@pytest.mark.parametrize("kernel", ["laplace", "rbf"])
@pytest.mark.parametrize("step", [1e-6, 1e-3, 1.0])
def test_identical_particles(kernel, step):
    """Identical targets, and then identical outputs too: right and finite, as the distance has a floor."""
    difference, y_r = particles(4, 64, step)
    y_r[:] = y_r[0]
    value, gradient = exact_mmd(difference.numpy(), y_r.numpy(), 30.0, kernel, FLOOR)
    found, found_gradient = value_and_gradient(difference, y_r, 30.0, kernel, torch.float64)
    allowed = 30 * FLOOR / 64 if kernel == "laplace" else 0  # stated in group_mmd
    assert abs(found - value) <= allowed + 1e-12 * value
    # the floor adds in quadrature to distances of sqrt(64) / 2 step
    assert np.linalg.norm(found_gradient - gradient) <= (FLOOR / (4 * step)) ** 2 * 2 * np.linalg.norm(gradient) + 1e-12
    difference[:] = difference[0]
    found, found_gradient = value_and_gradient(difference, y_r, 30.0, kernel, torch.float32)
    value, gradient = exact_mmd(difference.numpy(), y_r.numpy(), 30.0, kernel, FLOOR)
    assert abs(found - value) <= 4 * allowed + 1e-12 * value and np.isfinite(found_gradient).all()


def test_groups_do_not_mix():
    first, second = particles(4, 64, 0.1), particles(4, 64, 1e-3, shared=True)
    both = group_mmd(*map(torch.stack, zip(first, second, strict=True)), torch.tensor([2.0, 90.0]).double(), "laplace", FLOOR)
    for group, weight, value in zip((first, second), (2.0, 90.0), both, strict=True):
        alone = group_mmd(group[0][None], group[1][None], torch.tensor([weight]).double(), "laplace", FLOOR)
        torch.testing.assert_close(alone[0], value, rtol=1e-13, atol=0)


# Differences of jumps: y_t - y_r without subtracting y_r from y_t


def jump_inputs(gap: float, dtype: torch.dtype):
    """Times, data, noise and outputs that change smoothly with the time; the same numbers, float32, in either dtype."""
    generator = torch.Generator().manual_seed(0)
    t = torch.tensor([0.99, 0.7, 0.3, 0.2], dtype=torch.float64)
    x, noise, level, slope = (0.5 * torch.randn(4, 3, 8, 8, generator=generator) for _ in range(4))
    r = t - gap
    outputs = [(level.double() + per_image(time, slope.double()) * slope).float() for time in (t, r)]
    return 0.3 * r, r, t, *(v.to(dtype) for v in (x, noise, *outputs))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


def plain_jumps(flow, s, r, t, x, noise, out_t, out_r):
    """f_{s,t}(x_t) and f_{s,r}(x_r) by the definition."""
    jumps = []
    for time, output in ((t, out_t), (r, out_r)):
        c_skip, c_out = coefficients(flow, s, time)
        z = diffuse(flow.get_schedule(), x, noise, time)
        jumps.append(per_image(c_skip, z) * z + per_image(c_out, z) * output)
    return jumps


@pytest.mark.parametrize("schedule, parametrization", FLOWS)
def test_jump_difference(schedule, parametrization):
    """float64: the definition, to the 1e-16 / gap that subtracting costs it. float32: 1e-6 for every gap (measured: 2e-7),
    where subtracting float32 jumps leaves nothing right at 1e-7."""
    flow = FlowMapSettings(schedule, parametrization, t_min=0.0, t_max=0.994)
    for gap in (1e-1, 1e-3, 1e-5, 1e-7):
        exact = jump_inputs(gap, torch.float64)
        difference, y_r = jump_difference(flow, *exact)
        y_t, plain_y_r = plain_jumps(flow, *exact)
        assert relative(y_r, plain_y_r) < 1e-14
        assert relative(difference, y_t - plain_y_r) < 1e-15 / gap + 1e-13
        single = jump_difference(flow, *jump_inputs(gap, torch.float32))
        assert all(part.dtype == torch.float32 for part in single)
        assert relative(single[0], difference) < 1e-6 and relative(single[1], y_r) < 1e-6
        naive_t, naive_r = plain_jumps(flow, *jump_inputs(gap, torch.float32))
        if gap == 1e-7:
            assert relative(naive_t - naive_r, difference) > 0.1


@pytest.mark.parametrize("schedule, parametrization", FLOWS)
@pytest.mark.parametrize("kernel", ["laplace", "rbf"])
def test_loss_in_float32(schedule, parametrization, kernel):
    """The whole loss and its gradient in the output, float32 against float64 at the same inputs, at IMM's own steps back."""
    flow = FlowMapSettings(schedule, parametrization, t_min=0.006, t_max=0.994)
    settings, results = ImmSettings(kernel=kernel, group_size=2), []
    for dtype in (torch.float64, torch.float32):
        s, _, t, x, noise, out_t, out_r = jump_inputs(1e-3, dtype)
        s, t = s[::2], t[::2]  # two groups of two
        r = earlier_time(settings, flow, s, t)
        each = [time.repeat_interleave(2) for time in (s, r, t)]
        out_t.requires_grad_()
        loss = imm_loss(settings, flow, s, r, t, *jump_difference(flow, *each, x, noise, out_t, out_r))
        results.append((loss.detach(), *torch.autograd.grad(loss.sum(), out_t)))
    assert relative(results[1][0], results[0][0]) < 1e-6  # measured: 1e-7
    assert relative(results[1][1], results[0][1]) < 1e-6
