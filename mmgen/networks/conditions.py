"""What a network is conditioned on: one frozen type for a whole batch, whatever the kind of condition.

Networks, guidance, samplers, losses and batches pass a `Condition` on without asking what it is. A kind of condition is a small
class here: its tensors are dataclass fields [N, ...], one row an image, and it says what its null is. `None` in the place of a
condition is the null for every image, or an unconditional network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from ..errors import ConfigError


@dataclass(frozen=True, eq=False)
class Condition:
    """One condition an image. `len(c)` is the number of images, `c[rows]` takes, reorders or repeats them as a tensor's would."""

    def null(self) -> Self:
        """The unconditional condition, for as many images."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """The fields [N, ...] that have a row for each image."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        return replace(self, **{name: function(value) for name, value in self.tensors().items()})

    def __len__(self) -> int:
        return len(next(iter(self.tensors().values())))

    def __getitem__(self, rows: slice | Sequence[int] | Tensor) -> Self:
        return self.map(lambda value: value[rows])

    def to(self, device: str | torch.device, non_blocking: bool = False) -> Self:
        return self.map(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        return self.map(Tensor.pin_memory)

    def hidden(self, where: Tensor) -> Self:
        """The null where `where`, bool [N], is true."""
        null = self.null().tensors()
        chosen = {
            name: torch.where(where.reshape(-1, *[1] * (value.ndim - 1)), null[name], value)
            for name, value in self.tensors().items()
        }
        return replace(self, **chosen)


@dataclass(frozen=True, eq=False)
class Labels(Condition):
    """Class labels.

    >>> labels = Labels(torch.tensor([3, 4]), num_classes=10)
    >>> labels[[0, 0, 1]].classes
    tensor([3, 3, 4])
    """

    classes: Tensor  # int64 [N]; num_classes: no class
    num_classes: int

    def null(self) -> Labels:
        return replace(self, classes=torch.full_like(self.classes, self.num_classes))


def concatenate(conditions: Sequence[Condition]) -> Any:
    """Conditions of one kind behind each other."""
    first, rows = conditions[0], [condition.tensors() for condition in conditions]
    return replace(first, **{name: torch.cat([one[name] for one in rows]) for name in rows[0]})


def class_numbers(condition: Condition | None, num_classes: int, like: Tensor) -> Tensor:
    """int64 [N] for a network of `num_classes` classes: the null, num_classes, where there is no condition. `like`: any [N]."""
    if condition is None:
        return torch.full_like(like, num_classes, dtype=torch.int64)
    if not isinstance(condition, Labels) or condition.num_classes != num_classes:
        given = f"{condition.num_classes} classes" if isinstance(condition, Labels) else type(condition).__name__
        raise ConfigError(f"this network is conditioned on Labels(classes, num_classes={num_classes}), not on {given}")
    return condition.classes
