"""A pass as a GPU would make it, on tensors of the meta device: fused attention, and autocast, which torch has for real devices only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# What networks use of torch's lists for CUDA (its documentation of torch.amp)
_HALF = {"linear", "conv1d", "conv2d", "conv_transpose2d", "matmul", "__matmul__", "bmm", "baddbmm", "addmm", "einsum",
         "scaled_dot_product_attention"}  # fmt: skip
_FULL = {"layer_norm", "group_norm", "softmax", "exp", "pow", "__pow__", "rsqrt", "sum", "norm", "interpolate"}


class MetaAutocast(TorchFunctionMode):
    """dtype: of half precision; None: autocast is off."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.dtype = dtype
        self._cast: dict[tuple[int, torch.dtype], Tensor] = {}  # weights in half precision, kept by autocast to the end of the pass
        self._ids: set[int] = set()  # of these

    def __enter__(self) -> MetaAutocast:
        """Whoever switches CUDA's autocast off (`networks.half`) does so here too."""
        self._before = torch.is_autocast_enabled("cuda")
        torch.set_autocast_enabled("cuda", self.dtype is not None)
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        torch.set_autocast_enabled("cuda", self._before)

    def is_weight(self, tensor: Tensor) -> bool:
        """Whether it is a parameter, or one that was cast."""
        return isinstance(tensor, nn.Parameter) or id(tensor) in self._ids

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        named, name = kwargs or {}, getattr(func, "__name__", "")
        if name == "to" and isinstance(args[0], nn.Parameter):
            return self._kept(args[0], func(*args, **named))
        dtype = self.dtype if name in _HALF else torch.float32 if name in _FULL else None
        if dtype is not None and torch.is_autocast_enabled("cuda"):
            args = tuple(self._as(value, dtype) for value in args)
            named = {key: self._as(value, dtype) for key, value in named.items()}
        if func is F.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args)) | named
            return FusedAttention.apply(named["query"], named["key"], named["value"])
        return func(*args, **named)

    def _as(self, value: Any, dtype: torch.dtype) -> Any:
        if isinstance(value, list):  # the operands of einsum
            return [self._as(each, dtype) for each in value]
        if not isinstance(value, Tensor) or value.dtype not in (torch.float32, self.dtype) or value.dtype == dtype:
            return value
        return self._kept(value, value.to(dtype)) if isinstance(value, nn.Parameter) else value.to(dtype)

    def _kept(self, weight: nn.Parameter, cast: Tensor) -> Tensor:
        cast = self._cast.setdefault((id(weight), cast.dtype), cast)
        self._ids.add(id(cast))
        return cast


class FusedAttention(torch.autograd.Function):
    """It keeps what a fused kernel does: q, k, v and what comes out. On the meta device torch takes the plain one."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out)
        return out
