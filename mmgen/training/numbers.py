"""Losses, gradient norms and other numbers of the steps since the last log line, kept on the device until they are wanted."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import MmgenError


class BadLoss(MmgenError):
    """A loss or a gradient's norm (`what`) of the part `part` is not finite: `offset` steps (-1: the last) before `flush`."""

    def __init__(self, offset: int, part: str, value: float, what: str = "loss") -> None:
        super().__init__(f"the {what} of {part} is {value}")
        self.offset, self.part, self.value, self.what = offset, part, value, what


class Numbers:
    """`add` at every step costs no synchronisation; `flush` asks the device, once, and reduces over the processes."""

    def __init__(self, accelerator: Any, single: bool) -> None:
        """single: there is one part, whose loss is called `loss`; else each is NAME_loss. So are the other numbers of a part.

        With fp16 the accelerator has a scaler, which leaves out steps whose gradients are not finite.
        """
        self.accelerator, self.single = accelerator, single
        self._losses: list[tuple[str, Tensor]] = []
        self._norms: list[Tensor] = []  # of the same steps
        self._sums: dict[str, Tensor] = {}  # float64 [2, K], sums and counts

    def add_step(self, part: str, loss: Tensor, gradient_norm: Tensor) -> None:
        """Of one step: the loss, a scalar, the mean over this process's share of the batch; the whole gradient's norm."""
        self._losses.append((part, loss))
        self._norms.append(gradient_norm)

    def add(self, numbers: dict[str, Tensor]) -> None:
        """name -> [2, K], sums and counts."""
        for name, value in numbers.items():
            exact = value.detach().double()
            self._sums[name] = self._sums[name] + exact if name in self._sums else exact

    def flush(self) -> dict[str, Any]:
        """Since the last call: means of the losses, then of the numbers, lists where K > 1, None where nothing was counted; and

            loss_max        the largest loss of a step: a spike, which the mean hides
            gradient_norm   the mean; of steps that an fp16 scaler left out, nothing
            skipped_steps   with fp16, how many those are

        each of the last two for each part. To be called in all processes, which made the same steps. Raises BadLoss for the first
        loss that is not finite, or the first gradient, unless a scaler left its step out.
        """
        if not self._losses:
            return {}
        losses = torch.stack([loss for _, loss in self._losses])
        if self.accelerator.num_processes > 1:
            losses = self.accelerator.reduce(losses, reduction="mean")
        parts, values = [part for part, _ in self._losses], losses.tolist()
        norms = torch.stack([norm.double() for norm in self._norms]).tolist()
        self._losses.clear()
        self._norms.clear()
        scaled = self.accelerator.scaler is not None
        for offset, (part, value, norm) in enumerate(zip(parts, values, norms, strict=True)):
            if not math.isfinite(value):
                raise BadLoss(offset - len(values), part, value)
            if not math.isfinite(norm) and not scaled:
                raise BadLoss(offset - len(values), part, norm, "gradient's norm")
        found = {}
        for part in dict.fromkeys(parts):
            name = "" if self.single else f"{part}_"
            own = [value for of, value in zip(parts, values, strict=True) if of == part]
            taken = [norm for of, norm in zip(parts, norms, strict=True) if of == part and math.isfinite(norm)]
            found |= {f"{name}loss": sum(own) / len(own), f"{name}loss_max": max(own)}
            found[f"{name}gradient_norm"] = sum(taken) / len(taken) if taken else None
            if scaled:
                found[f"{name}skipped_steps"] = len(own) - len(taken)
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
