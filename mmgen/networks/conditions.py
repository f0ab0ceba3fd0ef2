"""What a network is conditioned on: one frozen type for a whole batch, whatever the kind of condition.

Networks, guidance, samplers, losses and batches pass a `Condition` on without asking what it is. A kind of condition is a small
class here: its tensors are dataclass fields [N, ...], one row an image, and it says what its null is. `None` in the place of a
condition is the null for every image, or an unconditional network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ConfigError

if TYPE_CHECKING:
    from typing import Self  # from Python 3.11 on


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


def check_condition(condition: Any) -> None:
    """Raises TypeError for what is no condition, such as a tensor of labels."""
    if not isinstance(condition, Condition | None):
        raise TypeError(f"a condition is mmgen.Labels(classes, num_classes) or None, not {type(condition).__name__}")


@dataclass(frozen=True, eq=False)
class Labels(Condition):
    """Class labels.

    >>> labels = Labels(torch.tensor([3, 4]), num_classes=10)
    >>> labels[[0, 0, 1]].classes
    tensor([3, 3, 4])
    """

    classes: Tensor  # int64 [N]; num_classes: no class
    num_classes: int
    with_null: bool = False  # some were made null, known without asking the device
    guidance: Tensor | None = None  # float64 [N]: w, of a student that is told it

    def null(self) -> Labels:
        return replace(self, classes=torch.full_like(self.classes, self.num_classes), with_null=True)

    def hidden(self, where: Tensor) -> Labels:
        return replace(super().hidden(where), with_null=True)


@dataclass(frozen=True, eq=False)
class Text(Condition):
    """Texts as a network takes them: ids for an encoder of its own, or the features of a frozen one.

    >>> text = Text(torch.tensor([[1, 99]]), torch.tensor([[True, True]]), empty=Text(torch.tensor([[1, 0]]), torch.tensor([[True, False]])))
    >>> text[[0, 0]].null().tokens
    tensor([[1, 0],
            [1, 0]])
    """

    tokens: Tensor  # ids int64 [N, L], or features [N, L, D]
    mask: Tensor  # bool [N, L]: where there is a token
    pooled: Tensor | None = None  # [N, P], a vector for the whole text
    sizes: Tensor | None = None  # SDXL's [N, 6]: height and width, top and left of the crop, target's height and width
    guidance: Tensor | None = None  # float [N]: w, of a student that is told it
    empty: Text | None = None  # one row: what the null is, the encoding of "" or of a negative prompt, without sizes

    def null(self) -> Text:
        """`empty` in every row. Sizes and guidance stay: they are not of the text. Raises ValueError without one."""
        if self.empty is None:
            raise ValueError("these texts have no null: `empty` is not set")
        rows = self.empty[torch.zeros(len(self), dtype=torch.int64, device=self.empty.tokens.device)].to(self.tokens.device)
        return replace(self, tokens=rows.tokens.to(self.tokens.dtype), mask=rows.mask, pooled=rows.pooled)

    def to(self, device: str | torch.device, non_blocking: bool = False) -> Text:
        moved = super().to(device, non_blocking)
        return moved if self.empty is None else replace(moved, empty=self.empty.to(device, non_blocking))

    def pin_memory(self) -> Text:
        pinned = super().pin_memory()
        return pinned if self.empty is None else replace(pinned, empty=self.empty.pin_memory())


def concatenate(conditions: Sequence[Condition]) -> Any:
    """Conditions of one kind behind each other."""
    first = next((one for one in conditions if getattr(one, "with_null", False)), conditions[0])
    rows = [condition.tensors() for condition in conditions]
    return replace(first, **{name: torch.cat([one[name] for one in rows]) for name in rows[0]})


def has_null(condition: Condition | None) -> bool:
    """Whether some image has no class. On a CPU the labels are looked at; a GPU is not waited for: how they were made tells."""
    if not isinstance(condition, Labels):
        return condition is None
    if condition.classes.device.type == "cpu":
        return bool((condition.classes == condition.num_classes).any())
    return condition.with_null


def class_numbers(condition: Condition | None, num_classes: int, like: Tensor) -> Tensor:
    """int64 [N] for a network of `num_classes` classes: the null, num_classes, where there is no condition. `like`: any [N]."""
    if condition is None:
        return torch.full_like(like, num_classes, dtype=torch.int64)
    if not isinstance(condition, Labels) or condition.num_classes != num_classes:
        given = f"{condition.num_classes} classes" if isinstance(condition, Labels) else type(condition).__name__
        raise ConfigError(f"this network is conditioned on Labels(classes, num_classes={num_classes}), not on {given}")
    return condition.classes
