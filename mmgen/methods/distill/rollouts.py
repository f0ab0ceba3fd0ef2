"""States of the student's own in place of noised data: what it meets when it is sampled, and training on data never shows it.

Bartosh et al. (Dual-Rate Diffusion, arXiv:2605.18190) draw z_t so. Here it is a share of the images, from the student's own sampler.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...diffusion.process import per_image, posterior
from ...models.denoiser import Denoiser
from ...networks.conditions import Condition
from ...system.random import keys, normal, uniform
from ...diffusion.schedules import Schedule

_START, _STEP, _OWN, _TIME = range(150, 154)  # purposes of random numbers, drawn with the seed and the number of the image


@dataclass(frozen=True)
class Rollouts:
    """Which images of a training begin at states of the student's own, and how these are drawn.

    share: of the images, from 0 to 1. after: no image whose number in the training is less.
    stochasticity: of the student's sampler.
    """

    share: float
    after: int
    steps: int  # k of the student
    stochasticity: float
    seed: int

    def levels(self, numbers: Tensor) -> Tensor:
        """j of the images with these numbers, int64 [N]: they begin at t = j / k, or where it is 0 at noised data. j falls from k to 1 in turn.

        Images are taken in pairs, so that both minibatches of the instant method get their share, and evenly: after n pairs
        floor(n share) have been taken.
        """
        before, after = ((pairs.double() * self.share).long() for pairs in (numbers // 2, numbers // 2 + 1))
        return torch.where((numbers >= self.after) & (after > before), self.steps - before % self.steps, 0)

    @torch.no_grad()
    def states(
        self, student: Denoiser, schedule: Schedule, shape: torch.Size, condition: Condition | None, index: Tensor, levels: list[int]
    ) -> Tensor:
        """z at t = levels[i] / k, float64 [N, *shape], by the student's sampler from pure noise.

        condition, index int64 [N]: of the images. levels: ascending. Costs k - j evaluations for an image at level j.
        """
        one = torch.ones(1, dtype=torch.float64, device=index.device)
        alpha, sigma = schedule.alpha(one), schedule.sigma(one)
        scale = (alpha**2 + sigma**2).sqrt() if schedule.keeps == "variance" else sigma
        z = scale.reshape(-1, *[1] * len(shape)) * normal(keys(self.seed, index, _START), shape, torch.float64)
        for level in range(self.steps, 1, -1):
            if not (going := sum(goal < level for goal in levels)):
                break
            own = None if condition is None else condition[:going]
            z[:going] = self._step(student, schedule, z[:going], own, index[:going], level)
        return z

    def _step(
        self, student: Denoiser, schedule: Schedule, z: Tensor, condition: Condition | None, index: Tensor, level: int
    ) -> Tensor:
        """From t = level / k to the next of the grid."""
        t = torch.full((len(z),), level / self.steps, dtype=torch.float64, device=z.device)
        s = torch.full_like(t, (level - 1) / self.steps)
        own = keys(self.seed + level, index, _OWN) if student.is_random else None
        x = student.x_hat(z, t, schedule, condition, noise=own)
        on_z, on_x, std = posterior(schedule, s, t, stochasticity=self.stochasticity)
        noise = normal(keys(self.seed + level, index, _STEP), z.shape[1:], torch.float64)
        return per_image(on_z, z) * z + per_image(on_x, z) * x + per_image(std, z) * noise

    def put(self, noised, student: Denoiser, schedule: Schedule, numbers: range):
        """`noised` (see `matching.Noised`), with the chosen images' z_t, t and s: t = j / k and s ~ U((j - 1) / k, j / k).

        numbers: those of the images, which the host counts by: it need not ask the device.
        """
        there = sorted(level for level in self.levels(torch.tensor(numbers)).tolist() if level)
        if not there:
            return noised
        levels = self.levels(noised.index)
        rows = torch.where(levels == 0, self.steps + 1, levels).argsort(stable=True)[: len(there)]
        index, condition = noised.index[rows], noised.condition
        condition = None if condition is None else condition[rows]
        z = self.states(student, schedule, noised.z_t.shape[1:], condition, index, there)
        t = levels[rows].double() / self.steps
        s = t - uniform(keys(self.seed, index, _TIME)) / self.steps
        return replace(
            noised, z_t=noised.z_t.index_copy(0, rows, z), t=noised.t.index_copy(0, rows, t), s=noised.s.index_copy(0, rows, s)
        )
