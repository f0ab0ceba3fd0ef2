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
        self._skipped: list[str] = []  # the part of each step that was left out
        self._sums: dict[str, Tensor] = {}  # float64 [2, K], sums and counts

    def add_step(self, part: str, loss: Tensor, gradient_norm: Tensor) -> None:
        """A step's loss (a scalar, the mean over this process's share of the batch) and the norm of its whole gradient."""
        self._losses.append((part, loss))
        self._norms.append(gradient_norm)

    def skip_step(self, part: str) -> None:
        """A step that was left out, in all processes: it is counted, and nothing else of it."""
        self._skipped.append(part)

    def add(self, numbers: dict[str, Tensor]) -> None:
        """name -> [2, K], sums and counts."""
        for name, value in numbers.items():
            exact = value.detach().double()
            self._sums[name] = self._sums[name] + exact if name in self._sums else exact

    def flush(self) -> dict[str, Any]:
        """Since the last call: means of the losses, then of the numbers, lists where K > 1, None where nothing was counted; and

            loss_max        the largest loss of a step: a spike, which the mean hides
            gradient_norm   the mean
            skipped_steps   how many were left out, where any was, and always with fp16, whose scaler leaves out some

        each of the last two for each part. To be called in all processes, which made the same steps.
        """
        if not self._losses and not self._skipped:
            return {}
        losses = torch.stack([loss for _, loss in self._losses]) if self._losses else torch.zeros(0)
        if self.accelerator.num_processes > 1 and self._losses:
            losses = self.accelerator.reduce(losses, reduction="mean")
        parts, values = [part for part, _ in self._losses], losses.tolist()
        norms = torch.stack([norm.double() for norm in self._norms]).tolist() if self._norms else []
        found: dict[str, Any] = {}
        for part in dict.fromkeys(parts + self._skipped):
            name = "" if self.single else f"{part}_"
            own = [value for of, value in zip(parts, values, strict=True) if of == part]
            taken = [norm for of, norm in zip(parts, norms, strict=True) if of == part]
            found |= {f"{name}loss": sum(own) / len(own) if own else None, f"{name}loss_max": max(own, default=None)}
            found[f"{name}gradient_norm"] = sum(taken) / len(taken) if taken else None
            skipped = self._skipped.count(part)
            if skipped or self.accelerator.scaler is not None:
                found[f"{name}skipped_steps"] = skipped
        self._losses.clear()
        self._norms.clear()
        self._skipped.clear()
        return found | self._flush_sums()

    def _flush_sums(self) -> dict[str, Any]:
        if not self._sums:
            return {}
        widths = [value.shape[1] for value in self._sums.values()]
        everything = torch.cat(list(self._sums.values()), dim=1)
        if self.accelerator.num_processes > 1:
            everything = self.accelerator.reduce(everything, reduction="sum")
        names = list(self._sums)
        self._sums.clear()
        found: dict[str, Any] = {}
        for name, (sums, counts) in zip(names, everything.cpu().split(widths, dim=1), strict=True):
            means = [s / c if c and math.isfinite(s) else None for s, c in zip(sums.tolist(), counts.tolist(), strict=True)]
            found[name] = means[0] if len(means) == 1 else means
        return found
