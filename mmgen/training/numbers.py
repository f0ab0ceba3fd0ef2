"""Losses and other numbers of the steps since the last log line, kept on the device until they are wanted."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import MmgenError


class BadLoss(MmgenError):
    """A loss is not finite: `offset` steps after the last call of `flush`, of the part `part`, with this value."""

    def __init__(self, offset: int, part: str, value: float) -> None:
        super().__init__(f"the loss of {part} is {value}")
        self.offset, self.part, self.value = offset, part, value


class Numbers:
    """`add` at every step costs no synchronisation; `flush` asks the device, once, and reduces over the processes."""

    def __init__(self, accelerator: Any, single: bool) -> None:
        """single: there is one part, whose loss is called `loss`; else each is NAME_loss."""
        self.accelerator, self.single = accelerator, single
        self._losses: list[tuple[str, Tensor]] = []
        self._sums: dict[str, Tensor] = {}  # float64 [2, K], sums and counts

    def add_loss(self, part: str, loss: Tensor) -> None:
        """The loss of one step, a scalar: the mean over this process's share of the batch."""
        self._losses.append((part, loss))

    def add(self, numbers: dict[str, Tensor]) -> None:
        """name -> [2, K], sums and counts."""
        for name, value in numbers.items():
            exact = value.detach().double()
            self._sums[name] = self._sums[name] + exact if name in self._sums else exact

    def flush(self) -> dict[str, Any]:
        """Means since the last call: the losses, then the numbers, lists where K > 1; None where nothing was counted.

        To be called in all processes, which made the same steps. Raises BadLoss for the first loss that is not finite.
        """
        if not self._losses:
            return {}
        losses = torch.stack([loss for _, loss in self._losses])
        if self.accelerator.num_processes > 1:
            losses = self.accelerator.reduce(losses, reduction="mean")
        names, values = [part for part, _ in self._losses], losses.tolist()
        self._losses.clear()
        found: dict[str, Any] = {}
        for offset, (part, value) in enumerate(zip(names, values, strict=True)):
            if not math.isfinite(value):
                raise BadLoss(offset - len(values), part, value)
            found.setdefault("loss" if self.single else f"{part}_loss", []).append(value)
        means = {name: sum(series) / len(series) for name, series in found.items()}
        return means | self._flush_sums()

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
