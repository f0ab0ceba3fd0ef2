"""Algorithm 3 of moment matching distillation (arXiv:2406.04103): the moments are matched in the teacher's parameter space.

A global batch is two independent minibatches: A are its images of even number, B those of odd number. The gradient of the
teacher's loss on what the student makes of A is summed over the whole of A, all rounds and devices, before any pass of B: so
results do not depend on how the batch is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ...data import Dataset
from ...data.latents import LatentDataset
from ...models.denoiser import Denoiser
from ...losses.moment_matching import (
    Function,
    finite_derivative,
    forward_derivative,
    instant_loss,
    lacks_forward_mode,
    mean_squares,
    preconditioned,
    teacher_gradient,
)
from ...models.conditions import example
from ...training.batches import Batch, fetch
from .matching import Matching, Noised, full_precision
from ...training.task import TrainedNetwork

GROUP = 2  # images that stay together: one of A and one of B
MOMENT_PASS = 16  # images in a pass for them where run.batch_per_device is auto
BUCKET = 2**24  # numbers that travel between processes at once
MOMENT_BATCHES = 64  # whose squared gradients are averaged where the teacher's optimiser left nothing

Derivative = Callable[[Function, dict[str, Tensor], dict[str, Tensor]], tuple[Tensor, Tensor]]


def instant_parts(
    matching: Matching, derivative: Derivative, second_moments: dict[str, Tensor] | None, accelerator: Any
) -> dict[str, TrainedNetwork]:
    """The student's part. derivative: `forward_derivative` or `finite_derivative`; second_moments: of Adam, or None."""
    objective = InstantObjective(matching, derivative, second_moments, accelerator)
    return {"model": TrainedNetwork(matching.student.network, objective, objective.prepare, objective.rehearse)}


class InstantObjective(nn.Module):
    """`objective(batch)` is the mean loss over the images of B, a scalar float64 tensor, and for the log loss_by_noise [2, 8].

    `prepare` finds the direction nu first. The loss tells whether it works: see `losses.moment_matching.instant_loss`.
    """

    def __init__(
        self, matching: Matching, derivative: Derivative, second_moments: dict[str, Tensor] | None, accelerator: Any
    ) -> None:
        super().__init__()
        self.student, self.matching, self.derivative = matching.student, matching, derivative
        self.second_moments, self.accelerator = second_moments, accelerator
        self.teacher = TeacherFunction(matching)
        self.direction: dict[str, Tensor] | None = None  # nu, of the present step

    def prepare(self, batches: Callable[[], Iterator[Batch]]) -> None:
        """nu = -Lambda times the gradient of the teacher's mean loss on generated images, over the whole of A."""
        total = mean_over_processes(mean_gradient(map(self._gradient, batches())), self.accelerator)
        self.direction = preconditioned(total, self.second_moments)

    def rehearse(self, batch: Batch) -> None:
        """`prepare` with one batch, on this process alone; what is held while there are more batches is held here too."""
        total = mean_gradient(self._gradient(batch) for _ in range(2))
        self.direction = preconditioned(total, self.second_moments)

    def _gradient(self, batch: Batch) -> dict[str, Tensor]:
        """The gradient of the teacher's mean loss on what the student makes of A."""
        matching, half = self.matching, minibatch(batch, 0)
        with torch.no_grad():
            noised = matching.noised(half)
            with self.accelerator.autocast():  # as in the pass of B
                x_tilde = matching.student_x(noised)
            z_s = matching.target(noised, x_tilde)
        weight, function = matching.weight(noised.s), self.teacher.at(z_s, noised)
        return teacher_gradient(function, self.teacher.parameters, x_tilde, weight, matching.loss.reduction)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        matching, half = self.matching, minibatch(batch, 1)
        with full_precision(batch):
            noised = matching.noised(half)
        x_tilde = matching.student_x(noised)
        with full_precision(batch):
            z_s = matching.target(noised, x_tilde)
            g_theta, along = self.derivative(self.teacher.at(z_s, noised), self.teacher.parameters, self.direction)
        each = instant_loss(x_tilde, g_theta, along, matching.weight(noised.s), matching.loss.reduction)
        return each.mean(), {"loss_by_noise": matching.by_level(each, noised.s)}


class TeacherFunction:
    """The teacher's x_hat as a function of its parameters, which stay as they are."""

    def __init__(self, matching: Matching) -> None:
        self.matching, self.module = matching, _XHat(matching.teacher)
        self.parameters = {name: value.detach() for name, value in matching.teacher.network.named_parameters()}

    def at(self, z_s: Tensor, noised: Noised, guidance: float | None = None) -> Function:
        """parameters -> g_theta(z_s). guidance: another than that of the distillation."""
        guidance = self.matching.guidance_of(noised) if guidance is None else guidance
        arguments = z_s, noised.s, self.matching.schedule, noised.condition, guidance
        return lambda parameters: functional_call(
            self.module, {f"denoiser.network.{name}": value for name, value in parameters.items()}, arguments
        )


class _XHat(nn.Module):
    """`functional_call` calls modules."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, *arguments: Any) -> Tensor:
        return self.denoiser.x_hat(*arguments)


def minibatch(batch: Batch, which: int) -> Batch:
    """A (0), the images of even number, or B (1), those of odd number; a batch begins with an even one."""
    condition = None if batch.condition is None else batch.condition[which::2]
    return Batch(batch.images[which::2], condition, batch.index[which::2], batch.first + which, stride=2)


def choose_derivative(matching: Matching) -> tuple[Derivative, str | None]:
    """Forward-mode AD or finite differences, as the settings say or as the network can; in the latter case why, in words."""
    if matching.loss.jvp != "auto":
        return {"forward": forward_derivative, "finite": finite_derivative}[matching.loss.jvp], None
    teacher = matching.teacher
    z_s = torch.zeros(1, *teacher.image_shape, dtype=torch.float64, device=teacher.device)
    middle = torch.full((1,), 0.5, dtype=torch.float64, device=teacher.device)
    index = torch.zeros(1, dtype=torch.int64, device=teacher.device)
    condition = matching.told(example(teacher.config, 1, teacher.device), index)
    function = TeacherFunction(matching)
    reason = lacks_forward_mode(function.at(z_s, Noised(z_s, middle, middle, condition, index)), function.parameters)
    if reason is None:
        return forward_derivative, None
    return finite_derivative, f"Jacobian-vector products by finite differences: the network has no forward mode ({reason})"


def data_second_moments(
    matching: Matching, dataset: Dataset | LatentDataset, accelerator: Any, batch_size: int, at_most: int,
    tell: Callable[[float], None] = lambda done: None,
) -> dict[str, Tensor]:
    """Mean squared gradients of the teacher's loss on the data, as Adam would have them at rest: name -> [...].

    The loss is that of the distillation, w(s) ||x - g_theta(z_s)||^2 with s ~ U(0, 1), without guidance; the mean is over
    MOMENT_BATCHES batches of `batch_size` images, shared by the processes, in passes of `at_most`. A function of data and seed.
    """
    count = -(-MOMENT_BATCHES // accelerator.num_processes) * accelerator.num_processes
    size = next(n for n in range(min(at_most, batch_size), 0, -1) if batch_size % n == 0)
    teacher = TeacherFunction(matching)

    def gradient(first: int) -> dict[str, Tensor]:
        batch = fetch(dataset, first, size, matching.seed, accelerator.device)
        noised, x = matching.noised_at_s(batch)
        function = teacher.at(noised.z_t, noised, guidance=1.0)
        return teacher_gradient(function, teacher.parameters, x, matching.weight(noised.s), matching.loss.reduction)

    def of_batch(number: int) -> dict[str, Tensor]:
        tell(number)
        return mean_gradient(gradient(start) for start in range(number * batch_size, (number + 1) * batch_size, size))

    squares = mean_squares(map(of_batch, range(accelerator.process_index, count, accelerator.num_processes)))
    tell(count)
    return mean_over_processes(squares, accelerator)


def mean_gradient(gradients: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of gradients of parts of the same size."""
    total: dict[str, Tensor] = {}
    count = 0
    for count, gradient in enumerate(gradients, start=1):
        total = {name: total[name] + value for name, value in gradient.items()} if total else gradient
    return {name: value / count for name, value in total.items()}


def mean_over_processes(tensors: dict[str, Tensor], accelerator: Any) -> dict[str, Tensor]:
    """In few collectives: many tensors travel as one."""
    if accelerator.num_processes == 1:
        return tensors
    found: dict[str, Tensor] = {}
    for names in _buckets(tensors):
        flat = accelerator.reduce(torch.cat([tensors[name].flatten() for name in names]), reduction="mean")
        parts = flat.split([tensors[name].numel() for name in names])
        found |= {name: part.view_as(tensors[name]) for name, part in zip(names, parts, strict=True)}
    return found


def _buckets(tensors: dict[str, Tensor]) -> Iterator[list[str]]:
    """The names, in order, in lists of one type and of at most BUCKET numbers, or of one tensor that has more."""
    names, size = [], 0
    for name, tensor in tensors.items():
        if names and (size + tensor.numel() > BUCKET or tensor.dtype != tensors[names[0]].dtype):
            yield names
            names, size = [], 0
        names, size = [*names, name], size + tensor.numel()
    if names:
        yield names
