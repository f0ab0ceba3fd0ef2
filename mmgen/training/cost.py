"""What a step costs in arithmetic and memory, without taking one: the network runs on torch's meta device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from ..config import ImmConfig
from ..models import Model, ModelConfig
from .batches import Parts


@dataclass(frozen=True)
class Cost:
    """Bytes are for one device."""

    parameters: int
    macs_per_image: int  # multiply-adds of one forward pass; papers on DiT call them FLOPs
    flops_per_step: float  # of the whole batch: two forward passes, and a backward pass that costs two more
    weights: int  # bytes: weights and gradients
    optimizer: int  # bytes
    averages: int  # bytes: all EMA
    activations: int  # bytes kept for the backward pass, for one round

    @property
    def total(self) -> int:
        return self.weights + self.optimizer + self.averages + self.activations


def estimate(config: ImmConfig, model_config: ModelConfig, parts: Parts) -> Cost:
    """Costs of a training step. Activations are those that autograd keeps, for float32 or for half precision."""
    with torch.device("meta"):
        network = Model(model_config).network
    probe = 2
    parameters = sum(p.numel() for p in network.parameters())
    flops = _forward_flops(network, model_config, probe) / probe
    saved = _saved_bytes(network, model_config, config.train.precision, probe) / probe
    averages = len(config.train.ema_betas) + len(config.train.ema_half_lives)
    return Cost(
        parameters=parameters,
        macs_per_image=int(flops / 2),
        flops_per_step=4 * flops * config.train.batch_size,
        weights=2 * 4 * parameters,
        optimizer=2 * 4 * parameters,
        averages=averages * 4 * parameters,
        activations=int(saved * parts.size),
    )


def _inputs(config: ModelConfig, count: int) -> tuple[torch.Tensor, ...]:
    with torch.device("meta"):
        x = torch.empty(count, config.channels, config.resolution, config.resolution)
        t = torch.empty(count, dtype=torch.float64)
        label = torch.zeros(count, dtype=torch.int64) if config.num_classes else None
        augment = torch.empty(count, config.augment_dim) if config.augment_dim else None
    return x, t, t, label, augment


def _forward_flops(network: nn.Module, config: ModelConfig, count: int) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network.eval()(*_inputs(config, count))
    return counter.get_total_flops()


def _saved_bytes(network: nn.Module, config: ModelConfig, precision: str, count: int) -> int:
    """Bytes of all different tensors that a forward pass keeps for the backward pass, parameters aside."""
    parameters = {id(p) for p in network.parameters()}
    kept: dict[int, torch.Tensor] = {}  # by storage; the tensors are held so that no id is used twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in parameters and not isinstance(tensor, nn.Parameter):
            base = tensor._base if tensor._base is not None else tensor
            if id(base) not in parameters:
                kept[id(base)] = base
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        output = network.train()(*_inputs(config, count))
    del output
    total = sum(t.numel() * t.element_size() for t in kept.values())
    return total // 2 if precision in ("fp16", "bf16") else total
