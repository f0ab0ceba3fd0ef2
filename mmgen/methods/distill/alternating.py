"""Algorithm 2 of moment matching distillation (arXiv:2406.04103): the auxiliary denoiser and the student take turns.

Under autocast the network that is trained works in half precision, and so does the student in both turns: x~ is the same. What the
auxiliary learns from the teacher is in half precision with train.frozen_precision half. The small difference g_phi - g_theta that the
student follows is always computed as the accelerator's float32 is.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from ...models.denoiser import Denoiser
from ...losses.moment_matching import auxiliary_loss, distance, moment_gap, student_loss
from ...training.batches import Batch
from .matching import Matching, full_precision, mean_of
from ...training.task import TrainedNetwork


def alternating_parts(matching: Matching, auxiliary: Denoiser) -> dict[str, TrainedNetwork]:
    """The student's part, which is the model, and the auxiliary's, which begins as a copy of the teacher."""
    return {
        "student": TrainedNetwork(matching.student.network, StudentObjective(matching, auxiliary)),
        "auxiliary": TrainedNetwork(auxiliary.network, AuxiliaryObjective(matching, auxiliary)),
    }


def turn(step: int, auxiliary_updates: int = 1) -> str:
    """Whose step it is: the auxiliary's so many times, then the student's once."""
    return "student" if step % (auxiliary_updates + 1) == auxiliary_updates else "auxiliary"


class AuxiliaryObjective(nn.Module):
    """`objective(batch)`: the mean of the auxiliary's loss, a scalar float64 tensor, and `pass_numbers`."""

    def __init__(self, matching: Matching, auxiliary: Denoiser) -> None:
        super().__init__()
        self.auxiliary, self.matching = auxiliary, matching

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        matching = self.matching
        with full_precision(batch):
            noised = matching.noised(batch)
        with torch.no_grad():
            x_tilde = matching.student_x(noised)  # under autocast, as in the student's turn
            with full_precision(batch):
                z_s = matching.target(noised, x_tilde)
            with contextlib.nullcontext() if matching.half_teacher else full_precision(batch):
                g_theta = matching.teacher_x(z_s, noised)
        g_phi = self.auxiliary.x_hat(z_s, noised.s, matching.schedule, noised.condition)
        loss = auxiliary_loss(x_tilde, g_phi, g_theta, matching.weight(noised.s), matching.loss.reduction)
        return loss.mean(), pass_numbers(matching, noised.s, x_tilde, g_phi, g_theta)


class StudentObjective(nn.Module):
    """`objective(batch)`: the mean of the student's loss, which is no measure of progress, and `pass_numbers`, which are."""

    def __init__(self, matching: Matching, auxiliary: Denoiser) -> None:
        super().__init__()
        self.student, self.matching = matching.student, matching
        self._others = (auxiliary,)  # in a tuple, so that it is no part of this module

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        matching, (auxiliary,) = self.matching, self._others
        with full_precision(batch):
            noised = matching.noised(batch)
        x_tilde = matching.student_x(noised)
        with full_precision(batch), torch.no_grad():
            z_s = matching.target(noised, x_tilde)
            g_theta = matching.teacher_x(z_s, noised)
            g_phi = auxiliary.x_hat(z_s, noised.s, matching.schedule, noised.condition)
        loss = student_loss(x_tilde, g_phi, g_theta, matching.weight(noised.s), matching.loss.reduction)
        return loss.mean(), pass_numbers(matching, noised.s, x_tilde, g_phi, g_theta)


def pass_numbers(matching: Matching, s: Tensor, x_tilde: Tensor, g_phi: Tensor, g_theta: Tensor) -> dict[str, Tensor]:
    """What tells whether it works; all are root mean squares over the pixels.

    moment_gap             [2, 1] of E[x~ | z_s] - g_theta(z_s), as the auxiliary sees it: this is what should fall
    moment_gap_by_noise    [2, 8] the same by the level of sigma at s, from the least noise to the most
    auxiliary_to_teacher   [2, 1]
    auxiliary_to_student   [2, 1] to its outputs x~, whose own spread about their mean it contains
    """
    gap = moment_gap(g_phi, g_theta)
    return {
        "moment_gap": mean_of(gap),
        "moment_gap_by_noise": matching.by_level(gap, s),
        "auxiliary_to_teacher": mean_of(distance(g_phi, g_theta)),
        "auxiliary_to_student": mean_of(distance(g_phi, x_tilde)),
    }
