"""Networks whose parameters, gradients and optimiser states are spread over the devices: torch's FSDP2, where accelerate asks.

`accelerate launch --use_fsdp --fsdp_version 2 ...` (or its configuration file) shards every network of a method: IMM's one;
the student, the auxiliary and the teacher of a distillation. Files are the same as without: whole tensors, so that a run goes on
with another number of devices, sharded or not.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..networks import blocks


def is_sharded(accelerator: Any) -> bool:
    """Whether networks are sharded: accelerate is asked for it, and there are processes to share them."""
    return accelerator.num_processes > 1 and asks_for_shards()


def asks_for_shards(precision: str = "fp32") -> bool:
    """What accelerate was told. Raises ConfigError for what it can be told and this cannot do."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise ConfigError("DeepSpeed is not supported: shard with accelerate launch --use_fsdp --fsdp_version 2 instead")
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError("only the second version of FSDP is supported: accelerate launch --use_fsdp --fsdp_version 2")
    if os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
        raise ConfigError("parameters on the CPU (FSDP_OFFLOAD_PARAMS) are not supported: leave --fsdp_offload_params off")
    if precision == "fp16":
        raise ConfigError("train.precision fp16 cannot be sharded: use bf16")
    return True


def shard(network: nn.Module) -> nn.Module:
    """In place, each block (element of a list or table of modules) by itself and the rest together; all processes call it.

    accelerate's --fsdp_reshard_after_forward (default true) holds; its wrapping policy, which is for other networks, does not.
    Raises ConfigError for a network with parameters that FSDP2 cannot shard.
    """
    from torch.distributed.fsdp import fully_shard

    if any(parameter.ndim == 0 for parameter in network.parameters()):
        raise ConfigError(
            f"a network of kind {network.settings.kind!r} cannot be sharded, because some of its parameters are single numbers: leave out --use_fsdp"
        )
    reshard = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false"
    for block in blocks(network):
        fully_shard(block, reshard_after_forward=reshard)
    return fully_shard(network, reshard_after_forward=reshard)


def synchronise_gradients(network: nn.Module, wanted: bool) -> None:
    """Sharded networks only: whether the next backward pass adds up the gradients of all devices."""
    network.set_requires_gradient_sync(wanted)


def own(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This device's pieces; a tensor that is not sharded is its own."""
    return [tensor.to_local() if _is_spread(tensor) else tensor for tensor in tensors]


def whole(tensor: Tensor) -> Tensor:
    """The tensor put together from its pieces. All processes must ask, in the same order."""
    return tensor.full_tensor() if _is_spread(tensor) else tensor


def gathered(state: Mapping[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """A state dict of whole tensors, those that are sharded on the CPU, put together one after the other by all processes.

    What is not sharded is not copied. A process that does not `keep` them gives its pieces, and gets {}.
    """
    found = {}
    for key, value in state.items():
        value = whole(value.detach()).cpu() if _is_spread(value) else value.detach()
        if keep:
            found[key] = value.contiguous()
    return found


@torch.no_grad()
def put(value: Tensor, target: Tensor) -> None:
    """Copies a whole tensor, the same on all processes, into one that may be sharded."""
    target.copy_(as_spread(value, target))


def as_spread(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same on all processes, sharded as another of its shape is."""
    if not _is_spread(like) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def _is_spread(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")
