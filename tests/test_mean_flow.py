"""MeanFlow: its identity where all is known in closed form, its derivative against finite differences, its loss by the book."""

from dataclasses import replace

import pytest
import torch
from test_objective import make

import mmgen
from mmgen.config.imm import ImmConfig, resolve
from mmgen.config.sections import nest
from mmgen.errors import ConfigError
from mmgen.losses.mean_flow import MeanFlowSettings, draw_times, mean_flow_loss, velocity_and_target
from mmgen.methods.imm import flow_objective
from mmgen.models.flow_model import flow_map
from mmgen.sampling.drawing import SampleSettings, plan
from mmgen.system.random import keys, normal

DATA = 0.4  # standard deviation of normal data


def std(t, noise=1.0):
    """Of z_t, for data N(0, DATA^2)."""
    return ((1 - t) ** 2 * DATA**2 + t**2 * noise**2).sqrt()


def mean_velocity(z, s, t):
    """Exact: along a path z is proportional to its standard deviation, so (z_t - z_s) / (t - s) is known."""
    gap = torch.where(t > s, t - s, 1.0)
    slope = t - (1 - t) * DATA**2  # std d(std)/dt
    share = torch.where(t > s, (1 - std(s) / std(t)) / gap, slope / std(t) ** 2)
    return share[:, None, None, None] * z


def some(count=64, seed=0):
    torch.manual_seed(seed)
    s, t = torch.rand(2, count, dtype=torch.float64).sort(0).values
    return torch.randn(count, 1, 2, 2, dtype=torch.float64) * std(t)[:, None, None, None], s, t


def test_the_exact_mean_velocity_is_its_own_target():
    """u = v - (t - s) du/dt (eq. 6), with the marginal velocity v, which is the mean velocity from t to t."""
    z, s, t = some()
    v = mean_velocity(z, t, t)
    u, target = velocity_and_target(lambda z, t: mean_velocity(z, s, t), z, v, s, t)
    torch.testing.assert_close(u, mean_velocity(z, s, t))
    torch.testing.assert_close(target, u, rtol=1e-9, atol=1e-12)


def test_targets_of_single_images_have_that_mean():
    """With e - x in the place of v the target's mean, given z, is the same: regression on it finds u."""
    count = 400_000
    torch.manual_seed(1)
    s, t = (torch.full((count,), value, dtype=torch.float64) for value in (0.3, 0.8))
    x, e = DATA * torch.randn(count, 1, 1, 1, dtype=torch.float64), torch.randn(count, 1, 1, 1, dtype=torch.float64)
    z = 0.2 * x + 0.8 * e
    u, target = velocity_and_target(lambda z, t: mean_velocity(z, s, t), z, e - x, s, t)
    slope = ((target * z).sum() / (z * z).sum()).item()
    assert slope == pytest.approx((u / z).mean().item(), abs=5e-3)


def test_no_gradient_passes_through_the_target():
    z, s, t = some(4)
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    u, target = velocity_and_target(lambda z, t: scale * mean_velocity(z, s, t), z, mean_velocity(z, t, t), s, t)
    assert not target.requires_grad
    (found,) = torch.autograd.grad(u.sum(), scale)
    assert found.item() == pytest.approx(mean_velocity(z, s, t).sum().item())


def test_the_adaptive_weight():
    """|D|^2 / sg(|D|^2 + c)^p, and its gradient is that of the numerator alone."""
    u, target = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64)
    u.requires_grad_()
    loss = mean_flow_loss(MeanFlowSettings(power=0.75, floor=0.01), u, target)
    square = ((u - target) ** 2).sum((1, 2, 3)).detach()
    torch.testing.assert_close(loss.detach(), square / (square + 0.01) ** 0.75)
    (gradient,) = torch.autograd.grad(loss.sum(), u)
    torch.testing.assert_close(gradient, 2 * (u - target).detach() / ((square + 0.01) ** 0.75)[:, None, None, None])
    torch.testing.assert_close(mean_flow_loss(MeanFlowSettings(power=0), u, target).detach(), square)


def test_times_are_two_draws_in_order_and_equal_for_the_rest():
    settings = MeanFlowSettings(share=0.25, time_mean=-0.4, time_std=1.0)
    s, t = draw_times(settings, keys(0, range(40_000)))
    assert ((0 < s) & (s <= t) & (t < 1)).all()
    assert (s < t).double().mean().item() == pytest.approx(0.25, abs=0.01)
    both = torch.logit(torch.cat([s, t])[torch.cat([s < t, s < t])])  # the two of a pair, in whatever order, are normal
    assert both.mean().item() == pytest.approx(-0.4, abs=0.03) and both.std().item() == pytest.approx(1, abs=0.03)
    equal = torch.logit(t[s == t])  # the larger of two: mean + std / sqrt(pi)
    assert equal.mean().item() == pytest.approx(-0.4 + torch.pi**-0.5, abs=0.03)
    some_s, some_t = draw_times(settings, keys(0, range(40, 50)))
    assert torch.equal(some_s, s[40:50]) and torch.equal(some_t, t[40:50])


# ---------------------------------------------------------------------- a pass

MEAN_FLOW = {
    "loss.objective": "mean_flow", "mean_flow.share": 0.5, "flow.parametrization": "euler_fm", "flow.second_time": "t-s",
    "flow.sigma_data": 0.8, "flow.time_scale": 10.0,
}  # fmt: skip


def test_a_pass_is_algorithm_1_by_finite_differences():
    """u from the flow map, du/dt from two points a little before and after on the path."""
    objective, batch = make(**MEAN_FLOW)
    flow, loss = objective.config.flow, objective.config.mean_flow
    s, t = draw_times(loss, keys(0, batch.index, flow_objective.TIME))
    assert 4 < (s < t).sum() < 12
    x = batch.images.double() / 127.5 - 1
    e = 0.8 * normal(keys(0, batch.index, flow_objective.NOISE), x.shape[1:]).double()
    at = lambda value: value[:, None, None, None]  # noqa: E731
    z, v = (1 - at(t)) * x + at(t) * e, e - x
    ends = torch.where(s < t, s, t - 1e-6)  # of f_{t,t}, the identity, nothing of u is seen

    def u(z, t):
        return (z - flow_map(objective.network, flow, z, ends, t, objective.inputs.condition(batch))) / at(t - ends)

    with torch.no_grad():
        h = 1e-3
        along = (u(z + h * v, t + h) - u(z - h * v, t - h)) / (2 * h)
        target = torch.where(at(s < t), v - at(t - s) * along, v)
        square = ((u(z, t) - target) ** 2).sum((1, 2, 3))
        plain = ((u(z, t) - v) ** 2).sum((1, 2, 3))
        expected, other = ((each / (each + loss.floor) ** loss.power).mean().item() for each in (square, plain))
    objective.config = replace(objective.config, mean_flow=replace(loss, power=0.0))
    found, numbers = objective(batch)
    assert found.item() == pytest.approx(square.mean().item(), rel=5e-3)
    assert abs(plain.mean().item() / square.mean().item() - 1) > 0.1  # the derivative matters
    objective.config = replace(objective.config, mean_flow=loss)
    assert objective(batch)[0].item() == pytest.approx(expected, rel=5e-3)
    assert numbers["error"].shape == (2, 8) and numbers["error"][1].sum() == 16
    assert numbers["error"][0].sum().item() == pytest.approx((square / 64).sqrt().sum().item(), rel=5e-3)


@pytest.mark.slow
def test_the_preset_trains_and_is_sampled_on_its_grid(tmp_path):
    settings = {"network.model_channels": 8, "network.channel_mult": [1], "train.max_images": 512, "train.batch_size": 64, "run.eval_num": 0,
                "run.batch_per_device": 64, "run.eval_steps": [1], "optimizer.warmup_images": 0}  # fmt: skip
    run = mmgen.train_imm(preset="digits-meanflow", settings=settings, out=tmp_path, progress=False, device="cpu")
    model = run.load()
    assert run.finished and (model.config.flow.t_min, model.config.flow.t_max) == (0, 1)
    assert plan(model.config, SampleSettings(steps=4)).times == [1, 0.75, 0.5, 0.25, 0] and model.sample(2, steps=1).images.shape == (2, 1, 8, 8)


@pytest.mark.parametrize("changes, sentence", [
    ({"loss.k": 12.0}, "loss.k is of IMM's own loss"),
    ({"flow.parametrization": "simple_edm"}, "needs flow.parametrization=euler_fm"),
    ({"flow.t_max": 0.994}, "trains all times from 0 to 1"),
    ({"run.gradient_checkpointing": True}, "a derivative in forward mode"),
    ({"train.precision": "bf16"}, "a derivative in forward mode"),
    ({"mean_flow.share": 1.5}, "from 0 to 1"),
    ({"loss.objective": "imm"}, "needs loss.objective=mean_flow"),
])  # fmt: skip
def test_what_does_not_go_together_is_named(changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        resolve(nest({**MEAN_FLOW, **changes}, ImmConfig))
