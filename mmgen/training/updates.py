"""Updates that are left out: a loss or a gradient that is not finite changes neither weights nor optimiser.

On a GPU nothing waits for it: whether a step counts is decided on the device, and the host reads of it when it is long done.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import TrainingError
from .sharding import own

MOST = 10  # in a row, of one part: then something is wrong that does not pass
MOST_SCALED = 50  # with fp16, whose scaler begins at 2^16 and halves with each
LAG = 2  # steps after which the host reads what a GPU made of one: the same in all processes, so that they end together


def with_its_gradient(loss: Tensor) -> Tensor:
    """The same loss, bit for bit; of one that is not finite the gradient is not either, as that of a constant would be.

    So every process learns from the sum of the gradients what one of them has met.
    """
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)


class Updates:
    """`make(...)` takes a step of an optimiser, or leaves it out: alike in all processes, which have the same gradient."""

    def __init__(self, accelerator: Any, note: Callable[[str], None], remedy: Callable[[], str], lag: int | None = None) -> None:
        """remedy: what to do about steps that are left out again and again, as the end of a sentence.
        lag: steps until the host reads of one; unset: none on a CPU, where reading is free."""
        self.accelerator, self.note, self.remedy = accelerator, note, remedy
        self.lag = (0 if accelerator.device.type == "cpu" else LAG) if lag is None else lag
        self._in_a_row: Counter[str] = Counter()
        self._unread: deque[tuple[str, int, Any, Tensor, Any]] = deque()

    def make(self, part: str, optimizer: torch.optim.Optimizer, loss: Tensor, norm: Tensor, step: int) -> None:
        """The step of one part, made where the norm of its gradient is finite.

        Args:
            part: its name, as messages have it.
            optimizer: torch's own, not as the accelerator prepared it; the gradients are unscaled.
            loss, norm: of this process's share of the batch; of the whole gradient.
            step: its number, from 1 on.

        Raises TrainingError where as many as MOST were left out in a row, as soon as the host reads of them.
        """
        made = torch.isfinite(norm)
        if self.lag:
            step_where(made, optimizer)
        elif made:
            optimizer.step()
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()
        both, copied = torch.stack([loss.double(), norm.double()]).to("cpu", non_blocking=True), None
        if norm.device.type == "cuda" and torch.cuda.is_available():
            copied = torch.cuda.Event()
            copied.record()
        self._unread.append((part, step, optimizer, both, copied))
        self._read(self.lag)

    def read_all(self) -> None:
        """Before anything is logged or saved."""
        self._read(0)

    def _read(self, left: int) -> None:
        while len(self._unread) > left:
            part, step, optimizer, both, copied = self._unread.popleft()
            if copied is not None:
                copied.synchronize()  # the device is `lag` steps further
            self._judge(part, step, optimizer, *both.tolist())

    def _judge(self, part: str, step: int, optimizer: torch.optim.Optimizer, loss: float, norm: float) -> None:
        if math.isfinite(norm):
            self._in_a_row[part] = 0
            return
        if self.lag:
            take_back_count(optimizer)
        scaled = self.accelerator.scaler is not None
        self._in_a_row[part] += 1
        what = f"the loss of {part} is {loss:.4g} and the norm of its gradient {norm:.4g}"
        if self._in_a_row[part] >= (MOST_SCALED if scaled else MOST):
            raise TrainingError(f"{self._in_a_row[part]} steps in a row were left out: at step {step} {what}; {self.remedy()}")
        if not scaled:
            self.note(f"step {step} was left out: {what}")


@torch.no_grad()
def step_where(made: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """optimizer.step(), which changes nothing where `made`, a bool on the device, is false. The host does not learn which.

    Fused optimisers look at it themselves, as they do for torch's GradScaler. Of the others all is put back, but for the counts of
    steps that some keep on the host: those run on until the host reads of it and takes them back.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.grad_scale, optimizer.found_inf = None, (~made).float()
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
        return
    tensors = _tensors(optimizer, made.device)
    before = dict(zip(tensors, torch._foreach_mul(list(tensors.values()), 1.0), strict=True))  # copies, by a few kernels for all
    _clear(made, own(p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None))
    optimizer.step()
    after, kept = _tensors(optimizer, made.device), made.float()
    torch._foreach_mul_(list(after.values()), kept)  # a moment that this step began is 0 again
    torch._foreach_mul_(list(before.values()), 1 - kept)
    torch._foreach_add_([after[key] for key in before], list(before.values()))


_BITS = {torch.float32: torch.int32, torch.float64: torch.int64, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def _clear(made: Tensor, gradients: list[Tensor]) -> None:
    """Sets gradients to 0 where `made` is false, not-a-number and infinity too: so that all that follows is finite.

    As whole numbers, times 0 or 1: a product of floats would leave what is not finite, and choosing one by one takes two kernels each.
    """
    for kind in {gradient.dtype for gradient in gradients}:
        bits = [gradient.view(_BITS[kind]) for gradient in gradients if gradient.dtype == kind]
        torch._foreach_mul_(bits, made.to(_BITS[kind]))


def take_back_count(optimizer: torch.optim.Optimizer) -> None:
    """One step less in the counts that are kept on the host."""
    for parameter, state in optimizer.state.items():
        if "step" in state and state["step"].device != parameter.device:
            state["step"] -= 1


def _tensors(optimizer: torch.optim.Optimizer, device: torch.device) -> dict[tuple[int, str], Tensor]:
    """What a step changes: the parameters and all of the state that is on the device; pieces of what is sharded."""
    found = {}
    for number, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
        values = {"": parameter, **{k: v for k, v in optimizer.state.get(parameter, {}).items() if isinstance(v, Tensor)}}
        found |= {(number, name): tensor for name, tensor in zip(values, own(values.values()), strict=True) if tensor.device == device}
    return found
