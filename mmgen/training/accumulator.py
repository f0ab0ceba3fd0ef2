"""Losses, gradient norms and other numbers of the steps since the last log line, kept on the device until they are wanted."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class MetricAccumulator:
    """`add` at every step costs no synchronisation; `flush` asks the device, once, and reduces over the processes."""

    def __init__(self, accelerator: Any, single: bool) -> None:
        """single: there is one part, whose loss is called `loss`; else each is NAME_loss. So are the other numbers of a part."""
        self.accelerator, self.single = accelerator, single
        self._losses: list[tuple[str, Tensor]] = []
        self._norms: list[Tensor] = []  # of the same steps
        self._sums: dict[str, Tensor] = {}  # float64 [2, K], sums and counts

    def add_step(self, part: str, loss: Tensor, gradient_norm: Tensor) -> None:
        """A step's loss (a scalar, the mean over this process's share of the batch) and the norm of its whole gradient.

        Of a step that was left out the norm is not finite, in all processes: it is counted, and nothing else of it.
        """
        self._losses.append((part, loss))
        self._norms.append(gradient_norm)

    def add(self, numbers: dict[str, Tensor], gradient_norm: Tensor) -> None:
        """name -> [2, K], sums and counts, of a step with that norm."""
        for name, value in numbers.items():
            exact = torch.where(torch.isfinite(gradient_norm), value.detach().double(), 0.0)
            self._sums[name] = self._sums[name] + exact if name in self._sums else exact

    def flush(self) -> dict[str, Any]:
        """Since the last call: means of the losses, then of the numbers, lists where K > 1, None where nothing was counted; and

            loss_max        the largest loss of a step: a spike, which the mean hides
            gradient_norm   the mean
            skipped_steps   how many were left out, where any was, and always with fp16, whose scaler leaves out some

        each of the last two for each part. To be called in all processes, which made the same steps.
        """
        if not self._losses:
            return {}
        losses, norms = torch.stack([loss.double() for _, loss in self._losses]), torch.stack([norm.double() for norm in self._norms])
        sums = torch.cat(list(self._sums.values()), dim=1) if self._sums else losses.new_zeros(2, 0)
        if self.accelerator.num_processes > 1:  # all at once
            flat = self.accelerator.reduce(torch.cat([losses, sums.flatten()]), reduction="sum")
            losses, sums = flat[: len(losses)] / self.accelerator.num_processes, flat[len(losses) :].view_as(sums)
        values = torch.cat([losses, norms, sums.flatten()]).tolist()  # the device is asked once
        count, parts = len(self._losses), [part for part, _ in self._losses]
        found: dict[str, Any] = {}
        for part in dict.fromkeys(parts):
            name = "" if self.single else f"{part}_"
            steps = [(values[i], values[count + i]) for i in range(count) if parts[i] == part]
            made = [(loss, norm) for loss, norm in steps if math.isfinite(norm)]
            own = [loss for loss, _ in made]
            found |= {f"{name}loss": sum(own) / len(own) if own else None, f"{name}loss_max": max(own, default=None)}
            found[f"{name}gradient_norm"] = sum(norm for _, norm in made) / len(made) if made else None
            if len(made) < len(steps) or self.accelerator.scaler is not None:
                found[f"{name}skipped_steps"] = len(steps) - len(made)
        found |= self._means(values[2 * count :])
        self._losses.clear()
        self._norms.clear()
        self._sums.clear()
        return found

    def _means(self, values: list[float]) -> dict[str, Any]:
        """Of the sums, then the counts, of all numbers one after the other."""
        found, start, width = {}, 0, len(values) // 2
        for name, value in self._sums.items():
            end = start + value.shape[1]
            pairs = zip(values[start:end], values[width + start : width + end], strict=True)
            means = [s / c if c and math.isfinite(s) else None for s, c in pairs]
            found[name], start = means[0] if len(means) == 1 else means, end
        return found
