"""Distillation of text, exactly: a Gaussian mixture whose prompt picks the component.

With components N(m_k, v) of one variance, "" being one of them, the guided denoiser u + w (c - u) is that of N(m_0 + w (m_k - m_0), v):
its score is a sum of scores that are linear with the same slope. So a student of teachers with guidance has to draw that Gaussian,
without guidance, and both algorithms have to lead there.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from mmgen.config.sections import DataSettings
from mmgen.diffusion.preconditioning import DenoiserSettings
from mmgen.diffusion.process import per_image
from mmgen.diffusion.schedules import ScheduleSettings, make_schedule
from mmgen.losses.moment_matching import MomentSettings, forward_derivative
from mmgen.methods.distill.alternating import AuxiliaryObjective, StudentObjective
from mmgen.methods.distill.instant import InstantObjective
from mmgen.methods.distill.matching import Matching
from mmgen.models.config import ModelConfig
from mmgen.models.denoiser import Denoiser
from mmgen.networks import UNetSettings
from mmgen.networks.text import TextSettings, byte_text
from mmgen.system.random import keys, normal
from mmgen.training.batches import Batch
from mmgen.training.inputs import Inputs
from toy_distill import One

COSINE = ScheduleSettings("vp_cosine")
TEXT = TextSettings(length=4)
MEANS = torch.tensor([[0.6, -0.2], [-0.4, 0.5], [0.1, 0.2]], dtype=torch.float64)  # of "a", "b" and ""
V = 0.09
PROMPTS = ["a", "b"]


class Components(nn.Module):
    """x_hat of z = alpha x + sigma e for the component that the text picks, as a network."""

    def __init__(self, means: torch.Tensor) -> None:
        super().__init__()
        self.means, self.schedule = nn.Parameter(means.clone()), make_schedule(COSINE)

    def picked(self, text) -> torch.Tensor:
        letters = text.tokens[:, 1]
        number = torch.where(letters == 0, 2, letters - 2 - ord("a"))
        return self.means[number][:, :, None, None]

    def slope(self, t) -> torch.Tensor:
        """What of z - alpha m is taken."""
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        return alpha * V / (alpha**2 * V + sigma**2)

    def forward(self, z, t, s=None, condition=None, augment=None):
        mean = self.picked(condition)
        return mean + per_image(self.slope(t), z) * (z - per_image(self.schedule.alpha(t), z) * mean)


class Posterior(Denoiser):
    """A student with randomness: a draw of x given z_t, whose spread is known and whose means are learned."""

    is_random = True

    def x_hat(self, z, t, schedule, condition=None, guidance=1.0, noise=None):
        assert guidance == 1 and noise is not None
        spread = (V * (1 - self.network.slope(t) * schedule.alpha(t))).clamp(min=0).sqrt()
        return self.network(z, t, None, condition) + per_image(spread, z) * normal(noise, z.shape[1:], z.dtype)


class Given(Inputs):
    def images(self, batch):
        return batch.images, None


def denoiser(means, cls=Denoiser):
    settings = DenoiserSettings(precondition="schedule", prediction="x", schedule=COSINE, time_scale=1.0)
    config = ModelConfig(UNetSettings(), None, 1, 2, text=TEXT, denoiser=settings)
    return cls(config, Components(means).double())


def guided_means(w):
    return torch.cat([MEANS[2] + w * (MEANS[:2] - MEANS[2]), MEANS[2:]])


def batch(first, count, means):
    """Images of the components `means`, one prompt after the other."""
    index = torch.arange(first, first + count)
    rows = index // 2 % 2  # in pairs, as the instant method takes every second image
    noise, text = normal(keys(7, index), (2, 1, 1), torch.float64), byte_text(PROMPTS, TEXT.length)[0][rows]
    return Batch(means[rows][:, :, None, None] + math.sqrt(V) * noise, text, index, first)


def matching(method, w, student_means):
    loss = MomentSettings(method=method, weighting="uniform", reduction="mean")
    inputs = Given(DataSettings(text=True, caption_dropout=0.0), 0)
    return Matching(denoiser(student_means, Posterior), denoiser(MEANS), COSINE, loss, inputs, steps=4, guidance=w, seed=0)


@pytest.mark.parametrize("w", [1.0, 2.5, 0.0, -1.0])
def test_the_guided_teacher_is_the_gaussian_of_the_extrapolated_mean(w):
    teacher, exact = denoiser(MEANS), denoiser(guided_means(w))
    text = byte_text(["a", "b", "b"], TEXT.length)[0]
    y, sigma = torch.randn(3, 2, 1, 1, dtype=torch.float64), torch.tensor([0.05, 1.0, 20.0], dtype=torch.float64)
    torch.testing.assert_close(teacher.denoise(y, sigma, text, w), exact.denoise(y, sigma, text))
    # and by hand: the mean of a Gaussian given a noisy one
    mean = guided_means(w)[[0, 1, 1]][:, :, None, None]
    by_hand = (V * y + sigma[:, None, None, None] ** 2 * mean) / (V + sigma[:, None, None, None] ** 2)
    torch.testing.assert_close(teacher.denoise(y, sigma, text, w), by_hand)


@pytest.mark.parametrize("w", [1.0, 2.5])
def test_the_moments_of_the_exact_student_are_the_guided_teachers(w):
    """E[x~ | z_s] = g_theta(z_s): x~ - g_theta is uncorrelated with 1 and with z_s, for each prompt; for another prompt it is not."""
    exact = guided_means(w)
    used, images = matching("alternating", w, exact), batch(0, 40_000, exact)
    noised = used.noised(images)
    x = used.student_x(noised)
    z_s = used.target(noised, x)
    rest = x - used.teacher_x(z_s, noised)
    swapped = x - used.teacher_x(z_s, replace(noised, condition=byte_text([PROMPTS[1 - i // 2 % 2] for i in range(len(x))], 4)[0]))

    rows = torch.tensor([i // 2 % 2 for i in range(len(x))])

    def errors(rest):
        """The largest mean of `rest` and `rest` times z_s, of one prompt, in standard errors."""
        each = torch.cat([rest, rest * z_s], dim=1)[:, :, 0, 0]
        parts = [each[rows == k] for k in range(2)]
        return torch.stack([part.mean(0) / (part.std(0) / len(part) ** 0.5) for part in parts]).abs().max()

    assert errors(rest) < 4.5
    assert errors(swapped) > 50


def train(objective_of, steps, w, lr):
    for step in range(steps):
        objective, parameter = objective_of(step)
        images = batch(step * 256, 256, guided_means(w))
        if hasattr(objective, "prepare"):
            objective.prepare(lambda: iter([images]))
        (gradient,) = torch.autograd.grad(objective(images)[0], parameter)
        with torch.no_grad():
            parameter -= lr * (1 - step / steps) * gradient


@pytest.mark.parametrize("w", [1.0, 2.5])
def test_the_alternating_method_leads_to_the_closed_form(w):
    """From the teacher's means where there is guidance, from other ones where there is none."""
    begin = MEANS if w != 1 else MEANS.roll(1, 0)
    used, auxiliary = matching("alternating", w, begin), denoiser(begin)
    parts = AuxiliaryObjective(used, auxiliary), StudentObjective(used, auxiliary)
    student = used.student.network.means
    before = (student[:2] - guided_means(w)[:2]).abs().max().item()
    train(lambda step: (parts[step % 2], student if step % 2 else auxiliary.network.means), 300, w, 1.5)
    error = (student[:2] - guided_means(w)[:2]).abs().max().item()
    assert before > 0.4 and error < 0.05 * before, (before, error)
    assert torch.equal(used.teacher.network.means, MEANS)


@pytest.mark.slow
@pytest.mark.parametrize("w", [1.0, 2.5])
def test_the_instant_method_leads_to_the_closed_form(w):
    begin = MEANS if w != 1 else MEANS.roll(1, 0)
    used = matching("instant", w, begin)
    objective = InstantObjective(used, forward_derivative, None, One())
    student = used.student.network.means
    before = (student[:2] - guided_means(w)[:2]).abs().max().item()
    train(lambda step: (objective, student), 200, w, 1.5)
    error = (student[:2] - guided_means(w)[:2]).abs().max().item()
    assert before > 0.4 and error < 0.05 * before, (before, error)
