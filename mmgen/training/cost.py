"""What a step costs in arithmetic and memory, without taking one: the network runs on torch's meta device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from ..config.sections import TrainSettings
from ..models.build import build_model
from ..models.config import ModelConfig
from ..networks import blocks, checkpoint_blocks
from ..models.conditions import example
from ..networks.conditions import Condition
from ..networks.empty import without_weights
from ..networks.lora import LoraBase
from .batches import BatchSplit
from .meta_autocast import MetaAutocast


@dataclass(frozen=True)
class Work:
    """What a step of a method does, in passes of networks of the model's size."""

    forward: float  # passes for each image of the batch
    backward: float
    trained: int = 1  # networks with gradients and an optimiser
    frozen: int = 0  # as many weights besides: a teacher
    whole: int = 0  # likewise, what is never sharded: of the instant method the teacher, its gradient and the direction
    back: int = 2  # forward passes that one back costs; of adapters 1: the weights below get no gradient

    def __str__(self) -> str:
        return f"{self.forward:g} pass{'es' * (self.forward > 1)} forward, {self.backward:g} back"


IMM = Work(forward=2, backward=1)  # the student, the target
DENOISING = Work(forward=1, backward=1)
ALTERNATING = Work(forward=3, backward=1, trained=2, frozen=1)  # student, auxiliary, teacher; one of the first two is updated
# One half of the batch takes a pass of the student, and one of the teacher with its gradient; the other half a pass of the
# student with its gradient, and one of the teacher with a derivative, which is twice as much.
INSTANT = Work(forward=2.5, backward=1, whole=3)


@dataclass(frozen=True)
class Adapters:
    """LoRA in place of networks of their own: the rank of each that is trained, the layers (`networks.lora.target_names`), and
    whether the weights below are kept in half precision."""

    ranks: tuple[int, ...]
    targets: tuple[str, ...] = ()
    half: bool = False


@dataclass(frozen=True)
class Cost:
    """Bytes are for one device."""

    parameters: int  # of one network
    trained: int  # of them, or of adapters, in all networks that are trained
    macs_per_image: int  # multiply-adds of one forward pass; papers on DiT call them FLOPs
    flops_per_step: float  # of the whole batch
    weights: int  # bytes: weights and gradients of what is trained, weights of what is frozen
    optimizer: int  # bytes
    averages: int  # bytes: all EMA
    copies: int  # bytes: weights in half precision, which autocast keeps for the time of a pass
    activations: int  # bytes kept for the backward pass, for one round

    @property
    def total(self) -> int:
        return self.weights + self.optimizer + self.averages + self.copies + self.activations


@dataclass(frozen=True)
class PassCost:
    """One pass of the network, for one image."""

    parameters: int
    flops: float  # forward: two to a multiply-add
    bytes: float  # activations that autograd keeps for the backward pass
    fixed: int = 0  # bytes that it keeps whatever the number of images: normalised weights of EDM2
    adapters: tuple[int, ...] = ()  # parameters of each adapter
    halved: int = 0  # of the parameters under them, those that `LoraBase.halve` keeps in half precision


def pass_cost(model_config: ModelConfig, precision: str, checkpointing: bool = False, adapters: Adapters | None = None) -> PassCost:
    """checkpointing: run.gradient_checkpointing; the network's own setting counts as well. adapters: the pass is of the first.

    Raises ConfigError for a network that has no place for adapters.
    """
    with without_weights():
        network = build_model(model_config).network.to("meta")  # its constants are on the CPU
        parameters = sum(p.numel() for p in network.parameters())
        called, views, halved = network, [], 0
        if adapters is not None:
            base = LoraBase(network, adapters.targets)
            halved = sum(module.weight.numel() for module in base.halvable())
            views = [base.add(str(number), rank) for number, rank in enumerate(adapters.ranks)]
            called = views[0]
    checkpointing = checkpointing or has_checkpointing(model_config)
    if checkpointing:
        checkpoint_blocks(network)  # which refuses where it must
        network.settings = replace(network.settings, gradient_checkpointing=False)  # so that all tensors are seen
    again = recomputed(network) if checkpointing else []
    one, two = (_saved_bytes(called, again, model_config, precision, count) for count in (1, 2))
    flops = _forward_flops(called, model_config, 1)
    sizes = tuple(sum(p.numel() for p in view.parameters()) for view in views)
    return PassCost(parameters, flops, two - one, 2 * one - two, sizes, halved)


def recomputed(network: nn.Module) -> list[nn.Module]:
    """The modules that gradient checkpointing computes again: our blocks; of diffusers' networks what it does it to itself."""
    if not network.settings.kind.startswith("diffusers"):
        return blocks(network)
    lists = [m for name, m in network.named_modules() if name.rpartition(".")[2] in ("resnets", "transformer_blocks")]
    return [block for one in lists for block in one.children()]


def has_checkpointing(model_config: ModelConfig) -> bool:
    """Whether the network recomputes its blocks of its own accord."""
    return getattr(model_config.network, "gradient_checkpointing", False)


def forward_flops(model_config: ModelConfig) -> float:
    """One pass of the network forward, for one image; two to a multiply-add."""
    with without_weights():
        network = build_model(model_config).network.to("meta")
    return _forward_flops(network, model_config, 1)


def estimate(
    train: TrainSettings, model_config: ModelConfig, parts: BatchSplit, work: Work, sharded: bool = False,
    checkpointing: bool = False, one: PassCost | None = None, *, moments: int = 2, adapters: Adapters | None = None,
) -> Cost:  # fmt: skip
    """Costs of a training step. Activations are those that autograd keeps, for float32 or for half precision.

    sharded: weights, gradients, optimiser states and averages are spread over the devices; what a block needs whole for a moment
    is not counted. checkpointing: blocks are computed again in the backward pass, which costs a third forward pass. one:
    of `pass_cost`, where it is known already. moments: numbers that the optimiser keeps for each parameter (`optim.moments`).
    adapters: there is one set of weights, frozen, whose gradient costs nothing.

    Networks take turns, so that the gradient of one at a time is there; DistributedDataParallel keeps a copy of each network's.
    """
    shards = parts.processes if sharded else 1
    one = one or pass_cost(model_config, train.precision, checkpointing, adapters)
    again = checkpointing or has_checkpointing(model_config)
    trained = one.adapters if adapters is not None else (one.parameters,) * work.trained
    frozen = one.parameters * (1 if adapters is not None else work.frozen)
    gradients = max(trained) + (sum(trained) if parts.processes > 1 and not sharded else 0)
    # of the instant method's teacher, its gradient and the direction; by adapters the last two are of one
    whole = (work.whole - 1) * trained[-1] if adapters is not None and work.whole else work.whole * one.parameters
    half = train.precision in ("fp16", "bf16") and not sharded
    halved = one.halved if adapters is not None and adapters.half else 0
    copied = sum(trained) if adapters is None else 0 if again else one.parameters - halved
    averages = len(train.ema_betas) + len(train.ema_half_lives) + len(train.ema_lengths)
    back = (1 if adapters is not None else 2) + again
    return Cost(
        parameters=one.parameters,
        trained=sum(trained),
        macs_per_image=int(one.flops / 2),
        flops_per_step=(work.forward + back * work.backward) * one.flops * train.batch_size,
        weights=4 * (sum(trained) + gradients + frozen) // shards + 4 * whole - 2 * halved,
        optimizer=4 * moments * sum(trained[: work.trained]) // shards,
        averages=4 * averages * trained[0] // shards,
        copies=2 * copied if half else 0,
        activations=int(one.bytes * parts.size + one.fixed),
    )


def _inputs(config: ModelConfig, count: int) -> tuple[torch.Tensor | Condition | None, ...]:
    """What a network of this model is called with; a denoiser has no second time, unless it is told w."""
    own_noise = config.denoiser.noise_channels if config.denoiser is not None else 0
    with torch.device("meta"):
        x = torch.empty(count, config.channels + own_noise, config.resolution, config.resolution)
        t = torch.empty(count, dtype=torch.float64)
        augment = torch.empty(count, config.augment_dim) if config.augment_dim else None
    condition = example(config, count, "meta")
    return x, t, t if config.denoiser is None or config.denoiser.told_guidance else None, condition, augment


def _forward_flops(network: nn.Module, config: ModelConfig, count: int) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network.eval()(*_inputs(config, count))
    return counter.get_total_flops()


def _saved_bytes(network: nn.Module, again: list[nn.Module], config: ModelConfig, precision: str, count: int) -> int:
    """Bytes of all different tensors that a forward pass keeps for the backward pass, parameters aside.

    again: blocks that are computed again: of each what goes into it, and of one at a time, the largest, what is inside.
    """
    autocast = MetaAutocast({"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision))
    kept: dict[int, torch.Tensor] = {}  # by storage; the tensors are held so that no address is used twice
    inside: list[dict[int, torch.Tensor]] = []  # of each block
    places = [kept]

    def put(tensor: torch.Tensor, into: dict[int, torch.Tensor]) -> None:
        base = tensor._base if tensor._base is not None else tensor
        if not autocast.is_weight(base):
            into[base.untyped_storage()._cdata] = base

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        put(tensor, places[-1])
        return tensor

    def enter(block: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        for value in (*inputs, *named.values()):
            if isinstance(value, torch.Tensor):  # blocks of diffusers are given sizes and None too
                put(value, kept)
        inside.append({})
        places.append(inside[-1])

    def leave(*_: object) -> None:
        places.pop()

    hooks = [block.register_forward_pre_hook(enter, with_kwargs=True) for block in again]
    hooks += [block.register_forward_hook(leave) for block in again]
    with saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        output = network.train()(*_inputs(config, count))
    del output
    for hook in hooks:
        hook.remove()
    within = [_bytes(tensor for key, tensor in block.items() if key not in kept) for block in inside]
    return _bytes(kept.values()) + max(within, default=0)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
