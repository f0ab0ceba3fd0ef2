"""Forward passes on CUDA tensors without a GPU: what is on the device has a shape and no content, and what a GPU would feel is counted.

Backward passes are left out: autograd asks for a real device, and their operations are torch's own.
"""

from __future__ import annotations

import contextlib
import os
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn import functional as F
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mmgen
from mmgen.methods.distill.instant import TeacherFunction
from mmgen.methods.imm.teacher import TeacherPath
from mmgen.training.batches import Batch

torch_tensor = torch.tensor
_WAIT = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_consecutive"}
# No kernels: views, empty memory, and what is asked of a tensor without its content
_VIEWS = {"view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze", "split",
          "split_with_sizes", "unbind", "detach", "alias", "as_strided", "_reshape_alias", "unfold", "diagonal", "empty", "new_empty",
          "empty_like", "_make_dual", "_unpack_dual", "_fw_primal", "to",
          "device", "is_same_size", "_has_same_storage_numel", "_efficientzerotensor"}  # fmt: skip


@dataclass
class Pass:
    """What a pass does to a GPU; `copies`, `waits` and `mismatches` name the lines of mmgen that make them."""

    kernels: int = 0  # operations that are no views
    of_objective: int = 0  # of these, for whoever counts them
    double_bytes: int = 0  # of their float64 results
    copies: list[str] = field(default_factory=list)  # between host and device
    waits: list[str] = field(default_factory=list)  # for the device
    mismatches: list[str] = field(default_factory=list)  # operations on tensors of two devices
    operations: Counter = field(default_factory=Counter)
    attention: list[tuple[torch.Tensor, ...]] = field(default_factory=list)  # (q, k, v) of each

    @property
    def faults(self) -> list[str]:
        return [*self.copies, *self.waits, *self.mismatches]


def record(run: Callable[[], Any], found: Pass | None = None) -> Pass:
    """What `run` does; tensors on the device are those of `on_device`, and what is computed from them."""
    found = found or Pass()
    with contextlib.ExitStack() as stack:
        # torch would look for a driver whenever a device is named, and copies contents to it where no dispatcher sees it
        stack.enter_context(mock.patch.object(torch.cuda, "_lazy_init", lambda: None))
        stack.enter_context(mock.patch("torch.nn.utils.clip_grad._has_foreach_support", lambda *tensors: True))  # it looks at types
        for owner, name in ((torch, "tensor"), (torch.Tensor, "new_tensor")):
            stack.enter_context(mock.patch.object(owner, name, _copying(getattr(owner, name), found)))
        attention = F.scaled_dot_product_attention
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", _attending(attention, found)))
        stack.enter_context(_Recording(found))
        run()
    return found


def _copying(make: Callable[..., torch.Tensor], found: Pass) -> Callable[..., torch.Tensor]:
    def copying(*args: Any, **kwargs: Any) -> torch.Tensor:
        own = args[0].device if isinstance(args[0], torch.Tensor) and make is not torch_tensor else "cpu"
        device = torch.device(kwargs.pop("device", None) or own)
        value = torch_tensor(*args[make is not torch_tensor :], **kwargs, device="cpu")
        if device.type != "cuda":
            return value.to(device)
        found.copies.append(f"tensor at {_place()}")
        return on_device(value)

    return copying


def _attending(attention: Callable[..., torch.Tensor], found: Pass) -> Callable[..., torch.Tensor]:
    def attending(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if q.device.type == "cuda":
            found.attention.append((q, k, v))
        return attention(q, k, v, *args, **kwargs)

    return attending


_fake = FakeTensorMode(allow_non_fake_inputs=True)


def on_device(value: torch.Tensor) -> torch.Tensor:
    with _fake:
        return _fake.from_tensor(value.detach()).to("cuda").requires_grad_(value.requires_grad)


def autocast(dtype: torch.dtype | None) -> torch.autocast:
    """Half precision on the device, which torch would switch off where there is none; None: without."""
    with mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False), mock.patch("torch.cuda.is_bf16_supported", lambda: True):
        return torch.autocast("cuda", dtype=dtype, enabled=dtype is not None)


def move(module: nn.Module) -> None:
    """In place; `Module.to` makes no fake tensors of real ones."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None and value.device.type != "cuda":
                part._parameters[name] = nn.Parameter(on_device(value), requires_grad=value.requires_grad)
        for name, value in part._buffers.items():
            if value is not None and value.device.type != "cuda":
                part._buffers[name] = on_device(value)


def moved(batch: Batch) -> Batch:
    condition = batch.condition
    if condition is not None:
        empty = getattr(condition, "empty", None)  # the null that a text has beside it
        condition = condition.map(on_device)
        condition = condition if empty is None else replace(condition, empty=empty.map(on_device))
    return replace(batch, images=on_device(batch.images), condition=condition, index=on_device(batch.index))


def move_objective(objective: Any) -> None:
    """All of it to the device: networks that it has and those that it only uses."""
    move(objective)
    if getattr(objective, "second_moments", None) is not None:
        objective.second_moments = {name: on_device(value) for name, value in objective.second_moments.items()}
    if isinstance(getattr(objective, "teacher", None), TeacherPath):
        move(objective.teacher.model)
    matching = getattr(objective, "matching", None)
    if matching is None:
        return
    for model in (matching.student, matching.teacher, *getattr(objective, "_others", ())):
        move(model)
    if matching.inner_edges.device.type != "cuda":
        matching.inner_edges = on_device(matching.inner_edges)
    if isinstance(getattr(objective, "teacher", None), TeacherFunction):
        objective.teacher.parameters = {key: value.detach() for key, value in matching.teacher.network.named_parameters()}


class _Recording(TorchDispatchMode):
    def __init__(self, found: Pass) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        here, there = (any(t.device.type == kind for t in given) for kind in ("cpu", "cuda"))
        there = there or torch.device(kwargs.get("device") or "cpu").type == "cuda"
        if not there:
            return func(*args, **kwargs)  # arithmetic of the host has its results
        try:
            out = _fake.dispatch(func, types, args, kwargs)
        except DataDependentOutputException:
            self.found.waits.append(f"{name} at {_place()}")
            return 0 if name == "_local_scalar_dense" else False
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self._judge(name, here, given, made)
        if name not in _VIEWS:
            self.found.kernels += 1
            self.found.operations[name] += 1
            self.found.double_bytes += sum(8 * t.numel() for t in made if t.dtype == torch.float64)
        return out

    def _judge(self, name: str, here: bool, given: list[torch.Tensor], made: list[torch.Tensor]) -> None:
        if name in _WAIT:
            self.found.waits.append(f"{name} at {_place()}")
        elif name in ("_to_copy", "to", "copy_", "set_") and {t.device.type for t in given + made} == {"cpu", "cuda"}:
            self.found.copies.append(f"{name} at {_place()}")
        elif here and name in ("index", "index_put_", "index_put"):  # torch copies indices to the device by itself
            self.found.copies.append(f"{name} at {_place()}")
        elif here and any(t.ndim for t in given if t.device.type == "cpu"):
            self.found.mismatches.append(f"{name} at {_place()}")


def _place() -> str:
    """The line of mmgen that is being run."""
    package = str(Path(mmgen.__file__).parent) + os.sep  # the clone, with the tests in it, may be called mmgen too
    frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(package)]
    return f"{frames[-1].filename.removeprefix(package)}:{frames[-1].lineno}: {frames[-1].line}" if frames else "torch"
