"""The baseline `digits-flow`: the loss of flow matching (arXiv:2210.02747), and Euler's method on an even grid."""

import numpy as np
import pytest
import torch
from torch import nn

from mmgen.config.sections import read_preset
from mmgen.config.teacher import resolve
from mmgen.data import load
from mmgen.methods.teacher import objective as teacher
from mmgen.models.denoiser import Denoiser
from mmgen.sampling import denoiser_samplers
from mmgen.sampling.drawing import SampleSettings, plan
from mmgen.system.random import keys, normal, uniform
from mmgen.training.batches import fetch

CONFIG = resolve(read_preset("digits-flow"))


class Velocity(nn.Module):
    """A velocity that is known: 0.3 z - 0.2 t, and what it was asked."""

    def __init__(self):
        super().__init__()
        self.weight, self.asked = nn.Parameter(torch.zeros(())), []

    def forward(self, z, t, s=None, condition=None, augment=None):
        self.asked.append((z, t))
        return 0.3 * z - 0.2 * (t / CONFIG.denoiser.time_scale).view(-1, 1, 1, 1).to(z)


def test_the_loss_is_the_mean_square_of_the_velocitys_error():
    """|v(z_t, t) - (e - x)|^2 with z_t = (1 - t) x + t e and t uniform between the ends of sigma = t / (1 - t), in float64 by hand."""
    batch, seed = fetch(load("digits"), 0, 64, CONFIG.train.seed, torch.device("cpu")), CONFIG.train.seed
    network = Velocity()
    found = teacher.DenoisingObjective(network, CONFIG)(batch)[0]
    x = torch.from_numpy(np.asarray(batch.images)).double() / 127.5 - 1
    e = normal(keys(seed, batch.index, teacher._NOISE), x.shape[1:]).double()
    least, most = (sigma / (1 + sigma) for sigma in (CONFIG.denoiser.sigma_min, CONFIG.denoiser.sigma_max))
    t = least + (most - least) * uniform(keys(seed, batch.index, teacher._TIME))
    z = (1 - t).view(-1, 1, 1, 1) * x + t.view(-1, 1, 1, 1) * e
    torch.testing.assert_close(network.asked[0][0].double(), z, rtol=1e-4, atol=1e-5)
    v = 0.3 * z - 0.2 * t.view(-1, 1, 1, 1)
    assert found.item() == pytest.approx((v - (e - x)).square().mean().item(), rel=1e-5)


def test_it_is_sampled_by_eulers_method_on_an_even_grid():
    model_config = teacher.teacher_model_config(CONFIG, load("digits").shape)
    times = plan(model_config, SampleSettings(steps=5)).times
    t = torch.tensor(times, dtype=torch.float64)
    t = t / (1 + t)  # of sigma = t / (1 - t)
    torch.testing.assert_close(t, torch.linspace(1, 0, 6, dtype=torch.float64), rtol=0, atol=2e-3)  # sigma ends at 1e3
    model = Denoiser(model_config)
    model.network = Velocity()
    noise = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    z = noise * t[0]  # at sigma = 1e3 nothing else is left
    for now, after in zip(t[:-1], t[1:], strict=True):
        z = z + (after - now) * (0.3 * z - 0.2 * now)
    found = denoiser_samplers.ddim(model, noise * times[0], times, None, 1.0, None)
    torch.testing.assert_close(found.double(), z, rtol=1e-3, atol=1e-3)
