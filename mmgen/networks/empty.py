"""Networks built without weights: their shapes alone, or to be filled from a file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# What `nn.init` is made of. On the meta device it has no effect, but `normal_` there imports torch's compiler, for seconds
_FILLS = {"uniform_", "normal_", "zero_", "fill_", "erfinv_", "mul_", "add_", "clamp_"}


class _SkipInitialisers(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        filled = args[0] if args else kwargs.get("tensor")
        if getattr(func, "__name__", "") in _FILLS and isinstance(filled, Tensor) and filled.is_meta:
            return filled
        return func(*args, **kwargs)


@contextlib.contextmanager
def without_weights() -> Iterator[None]:
    """What is built in here has parameters on the meta device, which take no memory; nothing initialises them."""
    with torch.device("meta"), _SkipInitialisers():
        yield


def fill(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Gives a network built `without_weights` copies of these, in its own types. Raises RuntimeError unless they are all."""
    own = network.state_dict()
    network.load_state_dict({k: v.to(own[k].dtype, copy=True) if k in own else v for k, v in state.items()}, assign=True)
    if left := [name for name, tensor in [*network.named_parameters(), *network.named_buffers()] if tensor.is_meta]:
        raise RuntimeError(f"no values for {', '.join(left)}")
