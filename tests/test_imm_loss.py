"""IMM's loss against arrays of the public training code, its tabulated weights, and the rules it is made of."""

from __future__ import annotations

import math

import pytest
import torch
from golden import arrays

from mmgen.diffusion.flow_map import FlowMapSettings
from mmgen.losses import imm
from mmgen.losses.imm import ImmSettings, imm_loss, kernel_weight, loss_weight

GOLDEN = arrays("imm_loss")
CASES = sorted({key.rsplit("/", 1)[0] for key in GOLDEN})
every_case = pytest.mark.parametrize("case", CASES)


def times(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(found, expected, rtol=1e-10, atol=0.0):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=torch.float64), rtol=rtol, atol=atol)


def golden_case(case: str) -> tuple[ImmSettings, FlowMapSettings, dict[str, torch.Tensor]]:
    schedule, parametrization, a, b, k, gap = case.split("-")
    gap = 0.0 if gap == "gapNone" else float(gap[3:])
    t_max = 0.994 if schedule == "fm" else 0.996
    settings = ImmSettings(distance_floor=1e-4, a=float(a[1:]), b=float(b[1:]), k=float(k[1:]), eta_range="exact", min_gap=gap)
    t_min = 0.0 if parametrization == "euler_fm" else 0.006  # latents and pixels
    flow = FlowMapSettings(schedule, parametrization, t_min=t_min, t_max=t_max)
    return settings, flow, {key.rsplit("/", 1)[1]: value for key, value in GOLDEN.items() if key.startswith(case + "/")}


def loss_and_gradient(settings, flow, s, r, t, y_t, y_r, dtype=torch.float64):
    difference = (y_t - y_r).to(dtype).flatten(0, 1).requires_grad_()
    loss = imm_loss(settings, flow, s, r, t, difference, y_r.to(dtype).flatten(0, 1))
    (gradient,) = torch.autograd.grad(loss.sum(), difference)
    return loss.detach(), gradient.reshape(y_t.shape)


def worst(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest relative error of a group."""
    error = (found.double() - expected).reshape(len(expected), -1).norm(dim=1)
    return (error / expected.reshape(len(expected), -1).norm(dim=1)).max().item()


def test_golden_cases_are_all_here():
    assert len(CASES) == 8 and all(sum(key.startswith(case + "/") for key in GOLDEN) == 9 for case in CASES)


@every_case
def test_golden_loss(case):
    """float64: 1e-10. float32 images: their own rounding, 6e-8, which the loss does not enlarge."""
    settings, flow, g = golden_case(case)
    s, t, r = g["s"], g["t"], g["r"]
    close(imm.earlier_time(settings, flow, s, t), r, rtol=1e-14)
    close(kernel_weight(flow, s, t), g["kernel_weight"])
    close(loss_weight(settings, flow, t), g["loss_weight"])
    loss, gradient = loss_and_gradient(settings, flow, s, r, t, g["y_t"], g["y_r"])
    assert loss.dtype == torch.float64
    assert worst(loss, g["loss"]) < 1e-10 and worst(gradient, g["grad_y_t"]) < 1e-10
    loss, gradient = loss_and_gradient(settings, flow, s, r, t, g["y_t"], g["y_r"], torch.float32)
    assert loss.dtype == torch.float64 and gradient.dtype == torch.float32
    assert worst(loss, g["loss"]) < 1e-6 and worst(gradient, g["grad_y_t"]) < 1e-6


MISTAKES = {  # of published re-implementations, and others; each must be seen by the comparison above
    "kernel weight of another t": lambda m: m.setattr(imm, "kernel_weight", lambda f, s, t: kernel_weight(f, s, 0.9 * t + 0.1 * s)),
    "no sigma_d": lambda m: m.setattr(imm, "kernel_weight", lambda f, s, t: 1 / (t - s)),
    "kernel weight 1": lambda m: m.setattr(imm, "kernel_weight", lambda f, s, t: torch.ones_like(t)),
    "|c_out| not inverted": lambda m: m.setattr(imm, "kernel_weight", lambda f, s, t: 1 / kernel_weight(f, s, t)),
    "kernel weight of t": lambda m: m.setattr(imm, "kernel_weight", lambda f, s, t: kernel_weight(f, 0 * s, t)),
    "sign of w~": lambda m: m.setattr(imm, "kernel_weight", lambda f, s, t: -kernel_weight(f, s, t)),
    "squared distance": lambda m: m.setattr(imm, "group_mmd", lambda *a: GROUP_MMD(*a[:3], "rbf", a[4])),
    "weight of another t": lambda m: m.setattr(imm, "loss_weight", lambda c, f, t: loss_weight(c, f, 0.9 * t)),
    "sum instead of mean": lambda m: m.setattr(imm, "group_mmd", lambda *a: 4 * GROUP_MMD(*a)),
    "distance not divided by D": lambda m: m.setattr(imm, "group_mmd", lambda d, y, w, *a: GROUP_MMD(d, y, w * 192, *a)),
}  # fmt: skip
GROUP_MMD = imm.group_mmd


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_noticed(mistake, monkeypatch):
    MISTAKES[mistake](monkeypatch)
    settings, flow, g = golden_case("fm-simple_edm-a1-b5-k15-gapNone")
    loss, _ = loss_and_gradient(settings, flow, g["s"], g["r"], g["t"], g["y_t"], g["y_r"])
    assert not worst(loss, g["loss"]) < 1e-3  # ten million times the tolerance


def test_exchanged_arguments_are_noticed():
    settings, flow, g = golden_case("fm-simple_edm-a1-b5-k15-gapNone")
    s, r, t, y_t, y_r = (g[name] for name in ("s", "r", "t", "y_t", "y_r"))
    assert worst(loss_and_gradient(settings, flow, t, r, s, y_t, y_r)[0], g["loss"]) > 1e-2  # target time last
    assert worst(loss_and_gradient(settings, flow, s, r, t, y_r, y_t)[1], g["grad_y_t"]) > 1e-2  # gradient to the target
    shuffled = y_t[:, [1, 2, 3, 0]]  # particles matched with others
    assert worst(loss_and_gradient(settings, flow, s, r, t, shuffled, y_r)[0], g["loss"]) < 1e-6  # a set has no order
    for changed in (ImmSettings(b=4.0), ImmSettings(a=2.0), ImmSettings(kernel="rbf"), ImmSettings(weighting="none")):
        assert worst(loss_and_gradient(changed, flow, s, r, t, y_t, y_r)[0], g["loss"]) > 1e-3
    with pytest.raises(RuntimeError):  # groups of two from a batch of fours
        loss_and_gradient(ImmSettings(group_size=2), flow, s, r, t[:5], y_t, y_r)


def test_distance_floor():
    """The public code's floor, 1e-4, counts where the jumps end within it; far away it does not."""
    flow, (s, r, t) = FlowMapSettings(), (times(0.2), times(0.4), times(0.5))
    y_r = torch.randn(1, 4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    near, far = y_r + 1e-6, y_r + 0.1
    losses = [[loss_and_gradient(ImmSettings(distance_floor=floor), flow, s, r, t, y_t, y_r)[0].item() for floor in (1e-8, 1e-4)]
              for y_t in (near, far)]  # fmt: skip
    assert losses[0][1] < 0.01 * losses[0][0]
    assert abs(losses[1][1] / losses[1][0] - 1) < 1e-4  # floor / distance = 1e-4 / 1.4


WEIGHTS = {  # (schedule, a, b): w(t) at the times below, section 2.3
    ("fm", 1, 4): (0.33489, 2.90326, 4.91033, 5.22600, 3.92806, 2.45480, 1.35471, 1.03050, 1.01818),
    ("fm", 1, 5): (0.90724, 6.43848, 7.88933, 5.54376, 3.97323, 2.46001, 1.35490, 1.03050, 1.01818),
    ("fm", 2, 4): (0.33288, 2.75810, 4.41929, 3.65820, 1.96403, 0.73644, 0.13547, 0.01031, 0.00611),
    ("vp_cosine", 1, 4): (0.80445, 5.05951, 5.80377, 3.23196, 2.18149, 1.75460, 1.58965, 1.57098, 1.57086),
}
WEIGHT_TIMES = times(0.006, 0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.994)


@pytest.mark.parametrize("schedule, a, b", WEIGHTS)
def test_tabulated_weights(schedule, a, b):
    found = loss_weight(ImmSettings(a=a, b=b), FlowMapSettings(schedule), WEIGHT_TIMES)
    close(found, WEIGHTS[schedule, a, b], rtol=0, atol=6e-6)  # five printed decimals


@pytest.mark.parametrize("schedule", ["fm", "vp_cosine"])
@pytest.mark.parametrize("a, b", [(1.0, 4.0), (2.0, 5.0), (1.5, -2.0), (0.0, 0.0)])
def test_weight_is_equation_13(schedule, a, b):
    """Term by term, and the terms of the ablation: 1, ELBO, with alpha^a, with 1 / (alpha^2 + sigma^2)."""
    flow, t = FlowMapSettings(schedule), WEIGHT_TIMES
    path = flow.get_schedule()
    elbo = 0.5 * torch.sigmoid(b - path.log_snr(t)) * -path.d_log_snr(t)
    alpha, power = path.alpha(t), path.alpha(t) ** 2 + path.sigma(t) ** 2
    expected = {
        "none": torch.ones_like(t),
        "elbo": elbo,
        "elbo_alpha": elbo * alpha**a,
        "full": elbo * alpha**a / power,
    }
    for weighting, value in expected.items():
        close(loss_weight(ImmSettings(a=a, b=b, weighting=weighting), flow, t), value, rtol=1e-12)


@pytest.mark.parametrize("schedule", ["fm", "vp_cosine"])
def test_weight_at_the_ends_of_the_path(schedule):
    for a, limit in ((1.0, 1.0 if schedule == "fm" else math.pi / 2), (2.0, 0.0)):
        close(
            loss_weight(ImmSettings(a=a), FlowMapSettings(schedule), times(0.0, 1.0)),
            [0.0, limit],
            rtol=1e-12,
            atol=1e-15,
        )


def test_kernel_weight_stays_finite_where_nothing_moves():
    assert kernel_weight(FlowMapSettings(), times(0.3), times(0.3)).isfinite().all()


@pytest.mark.parametrize("group_size", [1, 2, 4])
def test_no_difference_gives_no_loss_and_no_gradient(group_size):
    y = torch.randn(2, group_size, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for s, t in ((times(0.1, 0.2), times(0.5, 0.9)), (times(0.5, 0.9), times(0.5, 0.9))):  # also with s = r = t
        for kernel in ("laplace", "rbf"):
            settings = ImmSettings(group_size=group_size, kernel=kernel)
            loss, gradient = loss_and_gradient(settings, FlowMapSettings(), s, s, t, y, y, torch.float32)
            assert (loss == 0).all() and (gradient == 0).all()


def test_identical_particles_give_no_nan():
    y_r = torch.ones(2, 4, 3, 4, 4)
    for y_t in (y_r + 1e-3, y_r, torch.randn(2, 4, 3, 4, 4)):
        loss, gradient = loss_and_gradient(ImmSettings(), FlowMapSettings(), *(times(v, v) for v in (0.1, 0.4, 0.5)), y_t, y_r)
        assert loss.isfinite().all() and gradient.isfinite().all()


def test_one_particle_is_a_consistency_loss():
    """M = 1: w 2 (k(0) - k(|y_t - y_r|))."""
    flow, s, r, t = FlowMapSettings(), times(0.1, 0.3), times(0.4, 0.6), times(0.5, 0.9)
    generator = torch.Generator().manual_seed(0)
    y_t, y_r = (torch.randn(2, 1, 3, 4, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    w = kernel_weight(flow, s, t)
    distance = (y_t - y_r).flatten(1).norm(dim=1)
    kernels = {
        "laplace": (torch.exp(-w * 1e-8 / 48), torch.exp(-w * distance / 48)),
        "rbf": (1, torch.exp(-w * distance**2 / 96)),
    }
    for kernel, (self_kernel, cross) in kernels.items():
        settings = ImmSettings(group_size=1, kernel=kernel)
        loss, _ = loss_and_gradient(settings, flow, s, r, t, y_t, y_r)
        close(loss, loss_weight(settings, flow, t) * 2 * (self_kernel - cross), rtol=1e-12)


@pytest.mark.parametrize("kernel", ["laplace", "rbf"])
def test_descending_the_gradient_lowers_the_loss(kernel):
    """At the rate that the gradient promises, to first order in the step."""
    settings, flow = ImmSettings(kernel=kernel), FlowMapSettings()
    s, r, t = times(0.1, 0.5), times(0.4, 0.7), times(0.5, 0.8)
    generator = torch.Generator().manual_seed(0)
    y_t, y_r = (torch.randn(2, 4, 3, 4, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    before, gradient = loss_and_gradient(settings, flow, s, r, t, y_t, y_r)
    squared = gradient.flatten(1).pow(2).sum(1)
    step = (1e-4 * before / squared).reshape(2, 1, 1, 1, 1)
    after, _ = loss_and_gradient(settings, flow, s, r, t, y_t - step * gradient, y_r)
    close(before - after, 1e-4 * before, rtol=1e-2)
