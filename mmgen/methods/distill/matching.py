"""What both algorithms of moment matching distillation do alike in a pass: noised images, the student's answers, z_s."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...models.denoiser import Denoiser, DenoiserSettings
from ...diffusion.process import diffuse
from ...losses.denoising import DenoisingSettings, weight
from ...losses.moment_matching import MomentSettings, draw_target, draw_times
from ...networks.conditions import Condition
from ...system.random import keys, normal, uniform
from ...diffusion.schedules import ScheduleSettings, make_schedule
from ...training.batches import Batch
from ...training.inputs import Inputs
from .rollouts import Rollouts

# Purposes of random numbers, drawn with the seed and the number of the image.
_NOISE, _TIME, _TARGET, _OWN, _MOMENT_NOISE, _MOMENT_TIME, _GUIDANCE = range(140, 147)

LEVELS = 8  # noise levels that numbers are logged for
_LOWEST, _HIGHEST = 0.002, 80.0  # the levels lie between these, or the ends of the teacher's range that are within


@dataclass(frozen=True)
class Noised:
    """Images on their way. The first step of algorithms 2 and 3."""

    z_t: Tensor  # float64 [N, C, H, W]
    t: Tensor  # float64 [N]: the student is asked at t
    s: Tensor  # float64 [N]: and compared with the teacher at s
    condition: Condition | None
    index: Tensor  # int64 [N], the numbers of the images


class Matching:
    """A student and its teacher on the student's schedule. All arithmetic is float64, but for that inside the networks.

    It is no module: an objective registers the one network that it trains, and no other.
    """

    def __init__(
        self, student: Denoiser, teacher: Denoiser, schedule: ScheduleSettings, loss: MomentSettings, inputs: Inputs, *,
        steps: int, guidance: float, seed: int, half_teacher: bool = False, rollouts: Rollouts | None = None,
        guidance_range: tuple[float, ...] = (), guidance_interval: tuple[float, ...] = (),
    ) -> None:  # fmt: skip
        """steps: k. guidance: w of the teacher's classifier-free guidance, which the student learns to do without.

        half_teacher: it may be evaluated under autocast where no small difference is taken.
        rollouts: some images begin at states of the student's own.
        guidance_range: the least and largest w of a student that is told it, in place of `guidance`.
        guidance_interval: the sigma between which the teacher is guided; none: everywhere.
        """
        self.student, self.teacher, self.schedule, self.loss, self.inputs = (
            student, teacher, make_schedule(schedule), loss, inputs
        )  # fmt: skip
        self.steps, self.guidance, self.seed, self.half_teacher = steps, guidance, seed, half_teacher
        self.rollouts, self.guidance_range, self.guidance_interval = rollouts, guidance_range, guidance_interval
        self.edges = level_edges(teacher)
        self.inner_edges = self.edges[1:-1].to(teacher.device)
        self.weighting = DenoisingSettings(loss.weighting, loss.sigma_data, loss.sigmoid_bias, loss.min_snr_gamma)
        # `output` is of the teacher's coefficients; `sigmoid` of how the times are drawn, which is the student's schedule
        own = DenoiserSettings(precondition="schedule", schedule=schedule)
        self.weighed = teacher.settings if loss.weighting == "output" else own

    def noised(self, batch: Batch) -> Noised:
        """z_t of the images of a batch, each at times of its own."""
        x, _ = self.inputs.images(batch)
        condition = self.told(self.inputs.condition(batch), batch.index)
        s, t = draw_times(self.steps, keys(self.seed, batch.index, _TIME))
        noise = normal(keys(self.seed, batch.index, _NOISE), x.shape[1:], torch.float64)
        noised = Noised(diffuse(self.schedule, x.double(), noise, t), t, s, condition, batch.index)
        return noised if self.rollouts is None else self.rollouts.put(noised, self.student, self.schedule, batch.numbers)

    def noised_at_s(self, batch: Batch) -> tuple[Noised, Tensor]:
        """Images noised to s as a denoiser is trained on them (z_t is at t = s), and the images x, float64 [N, C, H, W]."""
        x, _ = self.inputs.images(batch)
        s = uniform(keys(self.seed, batch.index, _MOMENT_TIME))
        noise = normal(keys(self.seed, batch.index, _MOMENT_NOISE), x.shape[1:], torch.float64)
        condition = self.inputs.condition(batch)
        return Noised(diffuse(self.schedule, x.double(), noise, s), s, s, condition, batch.index), x.double()

    def told(self, condition: Condition | None, index: Tensor) -> Condition | None:
        """With w for each image, uniform in `guidance_range`, which student and auxiliary are told and the teacher follows."""
        if not self.guidance_range:
            return condition
        low, high = self.guidance_range
        return replace(condition, guidance=low + (high - low) * uniform(keys(self.seed, index, _GUIDANCE)))

    def guidance_of(self, noised: Noised) -> float | Tensor:
        """w of the teacher at s: one for all, or that of each image, float64 [N], which is 1 outside the interval."""
        w = noised.condition.guidance if self.guidance_range else self.guidance
        if not self.guidance_interval:
            return w
        (low, high), sigma = self.guidance_interval, self.schedule.eta(noised.s)
        return torch.where((sigma > low) & (sigma <= high), w, torch.ones_like(sigma))

    def student_x(self, noised: Noised) -> Tensor:
        """x~ = g_eta(z_t), the student's."""
        own = keys(self.seed, noised.index, _OWN) if self.student.is_random else None
        return self.student.x_hat(noised.z_t, noised.t, self.schedule, noised.condition, noise=own)

    def target(self, noised: Noised, x_tilde: Tensor) -> Tensor:
        """z_s, drawn given z_t and x~, without gradient."""
        key = keys(self.seed, noised.index, _TARGET)
        return draw_target(self.loss, self.schedule, noised.s, noised.t, noised.z_t, x_tilde, key)

    def teacher_x(self, z_s: Tensor, noised: Noised) -> Tensor:
        """g_theta(z_s), the teacher's x_hat, with its guidance."""
        return self.teacher.x_hat(z_s, noised.s, self.schedule, noised.condition, self.guidance_of(noised))

    def weight(self, s: Tensor) -> Tensor:
        """w(s), float64 [N], at the noise that the teacher is asked at: within its trained range.

        A flow's range begins at 0, where weights by SNR are infinite: then from its `sigma_min`.
        """
        low, high = self.teacher.range
        sigma = self.schedule.eta(s).clamp(max(low, self.teacher.settings.sigma_min), high)
        return weight(self.weighting, self.weighed, sigma)

    def by_level(self, values: Tensor, s: Tensor) -> Tensor:
        """Sums and counts of float64 [N] by the level of the noise at s: float64 [2, 8]."""
        level = torch.bucketize(self.schedule.eta(s).log(), self.inner_edges)
        both = torch.stack([values.detach(), torch.ones_like(values)])
        return both.new_zeros(2, LEVELS).index_add_(1, level, both)


def level_edges(teacher: Denoiser) -> Tensor:
    """log sigma, float64 [9], evenly spaced: the bounds of the levels. What lies outside counts to the first or the last."""
    low, high = teacher.range
    return torch.linspace(math.log(max(low, _LOWEST)), math.log(min(high, _HIGHEST)), LEVELS + 1, dtype=torch.float64)


def full_precision(batch: Batch) -> torch.autocast:
    """No autocast within."""
    return torch.autocast(batch.images.device.type, enabled=False)


def mean_of(values: Tensor) -> Tensor:
    """float64 [N] as a number to log: [2, 1], its sum and count."""
    return torch.stack([values.detach().sum(), values.new_full((), float(len(values)))])[:, None]
