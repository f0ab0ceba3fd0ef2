"""Consistency training as IMM with groups of one particle whose jumps all end at t_min."""

import pytest
import torch
from test_objective import make, textbook_loss

from mmgen.config.imm import ImmConfig, resolve
from mmgen.config.sections import nest, read_preset
from mmgen.diffusion.flow_map import coefficients
from mmgen.errors import ConfigError
from mmgen.losses.imm import draw_times, earlier_time
from mmgen.methods.imm import flow_objective as imm
from mmgen.models.flow_model import flow_map
from mmgen.system.random import keys, normal

ONE = {"loss.group_size": 1, "loss.jump": "end", "loss.weighting": "none", "loss.time_distribution": "lognormal", "data.label_dropout": 0.0}


def test_a_pass_is_consistency_training_by_the_book():
    """E d(f(x_t, t), sg f(x_r, r)) with f the jump to t_min and d = 2 - 2 exp(-|.| / (|c_out| D)), from x_t and x_r of one x and noise."""
    objective, batch = make(**ONE)
    flow, loss = objective.config.flow, objective.config.loss
    s, t = draw_times(loss, flow, keys(0, batch.index, imm.TIME))
    r = earlier_time(loss, flow, s, t)
    assert (s == flow.t_min).all() and t.min() > flow.t_min
    x = batch.images.double() / 127.5 - 1
    noise = flow.sigma_data * normal(keys(0, batch.index, imm.NOISE), x.shape[1:]).double()
    schedule, found = flow.get_schedule(), []
    for time in (t, r):
        noised = schedule.alpha(time)[:, None, None, None] * x + schedule.sigma(time)[:, None, None, None] * noise
        found.append(flow_map(objective.network, flow, noised, s, time, batch.condition))
    distance = (found[0] - found[1].detach()).flatten(1).norm(dim=1)
    expected = (2 - 2 * torch.exp(-distance / coefficients(flow, s, t)[1].abs() / 64)).mean()
    value, _ = objective(batch)
    assert value.item() == pytest.approx(expected.item(), rel=1e-4)
    assert value.item() == pytest.approx(textbook_loss(objective, batch).item(), rel=1e-4)
    parameters = list(objective.network.parameters())
    gradients = [torch.cat([g.flatten() for g in torch.autograd.grad(one, parameters)]) for one in (value, expected)]
    assert (gradients[0] - gradients[1]).norm() < 1e-3 * gradients[1].norm()


def test_steps_are_constant_in_eta_so_that_its_weight_is():
    """Improved consistency training weighs with 1 / (eta_t - eta_r) (arXiv:2310.14189, section 3.1): here a constant."""
    config = resolve(nest(ONE, ImmConfig))
    s, t = draw_times(config.loss, config.flow, keys(0, range(5000)))
    r, eta = earlier_time(config.loss, config.flow, s, t), config.flow.get_schedule().eta
    inside = r > s
    assert inside.double().mean() > 0.5
    torch.testing.assert_close((eta(t) - eta(r))[inside], torch.full((int(inside.sum()),), 160 / 2**config.loss.k, dtype=torch.float64), rtol=1e-4, atol=0)


def test_it_is_sampled_by_jumps_to_the_end():
    preset = resolve(read_preset("digits-consistency"))
    assert (preset.loss.group_size, preset.loss.jump, preset.sampling.sampler) == (1, "end", "restart")
    assert resolve(nest(ONE, ImmConfig)).sampling.sampler == "restart" and resolve(nest({}, ImmConfig)).sampling.sampler == "default"
    with pytest.raises(ConfigError, match="leave sampling.sampler out"):
        resolve(nest({**ONE, "sampling.sampler": "pushforward"}, ImmConfig))
