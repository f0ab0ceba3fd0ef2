"""Updates that are left out: a loss or a gradient that is not finite changes neither weights nor optimiser nor averages."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import TrainingError

MOST = 10  # in a row, of one part: then something is wrong that does not pass
MOST_SCALED = 50  # with fp16, whose scaler begins at 2^16 and halves with each


def with_its_gradient(loss: Tensor) -> Tensor:
    """The same loss, bit for bit; of one that is not finite the gradient is not either, as that of a constant would be.

    So every process learns from the sum of the gradients what one of them has met.
    """
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)


class Updates:
    """`make(...)` takes a step of an optimiser, or leaves it out: alike in all processes, which have the same gradient."""

    def __init__(self, accelerator: Any, note: Callable[[str], None], remedy: Callable[[], str]) -> None:
        """remedy: what to do about steps that are left out again and again, as the end of a sentence."""
        self.accelerator, self.note, self.remedy = accelerator, note, remedy
        self._in_a_row: Counter[str] = Counter()

    def make(self, part: str, optimizer: Any, loss: Tensor, norm: Tensor, step: int) -> bool:
        """Whether the step was made. It waits for the device once, which costs microseconds beside a whole step.

        Args:
            part: its name, as messages have it.
            optimizer: as the accelerator prepared it.
            loss, norm: of this process's share of the batch; of the whole gradient.
            step: its number, from 1 on.

        Raises TrainingError where as many as MOST were left out in a row.
        """
        scaled = self.accelerator.scaler is not None
        if scaled:  # the scaler looks at the gradients itself
            optimizer.step()
            made = not optimizer.step_was_skipped
        elif made := math.isfinite(norm.item()):
            optimizer.step()
        if made:
            self._in_a_row[part] = 0
            return True
        self._in_a_row[part] += 1
        what = f"the loss of {part} is {loss.item():.4g} and the norm of its gradient {norm.item():.4g}"
        if self._in_a_row[part] >= (MOST_SCALED if scaled else MOST):
            raise TrainingError(f"{self._in_a_row[part]} steps in a row were left out: at step {step} {what}; {self.remedy()}")
        if not scaled:
            self.note(f"step {step} was left out: {what}")
        return False
