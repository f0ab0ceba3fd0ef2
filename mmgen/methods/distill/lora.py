"""Distillation by LoRA: one frozen network in memory, with adapters for the student and the auxiliary; without them it is the teacher.

The alternating method trains both adapters. The instant one has the teacher as a function of an adapter's parameters: its gradient
and the direction nu are in the matrices B of the auxiliary's, which are zero (in A the gradient is zero). So moments are matched in
as many directions of every layer as that adapter's rank, which are drawn at random and stay, and not in all of the teacher's weights.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...config.distill import StudentSettings
from ...errors import ConfigError
from ...models.config import ModelConfig
from ...models.denoiser import Denoiser
from ...models.files import save_model
from ...models.lora_files import lora_file, save_lora
from ...networks import without_augment
from ...networks.lora import LoraBase, merged
from ...training.sharding import is_sharded


class LoraNetworks:
    """The teacher's network with adapters in it, and the networks that they make of it."""

    def __init__(self, network: nn.Module, settings: StudentSettings, accelerator: Any, half: torch.dtype | None = None) -> None:
        """network: the teacher's, which is changed. half: what its weights are kept in; None: float32.

        Raises ConfigError where it has no layers for adapters.
        """
        if is_sharded(accelerator):
            raise ConfigError(
                "student.lora cannot be sharded: its networks share one set of weights, which each device holds; leave --use_fsdp out"
            )
        self.base = LoraBase(network, settings.lora_targets)
        self.rank, self.half = settings.lora, half
        self.student = self.base.add("student", self.rank)
        self.auxiliary = self.base.add("auxiliary", settings.lora_auxiliary or self.rank)
        if half is not None:
            self.base.halve(half)

    @property
    def description(self) -> str:
        count = sum(parameter.numel() for parameter in self.student.parameters())
        return (
            f"LoRA of rank {self.rank} in {len(self.base.names)} layers, {count / 1e6:.2f}M parameters; student, auxiliary and teacher "
            "share the teacher's weights" + (f", kept in {str(self.half).removeprefix('torch.')}" if self.half is not None else "")
        )

    def save(self, file: Path, model_config: ModelConfig, state: dict[str, Tensor]) -> None:
        """A model file like any other, the adapter merged into the weights, and the adapter alone beside it. state: the adapter's."""
        whole = merged(self.base.network, state)
        save_model(file, model_config, whole if model_config.augment_dim else without_augment(whole))
        save_lora(lora_file(file), self.rank, model_config, state)

    def averaged(self, model_config: ModelConfig) -> Callable[[dict[str, Tensor]], Denoiser]:
        """state -> the student with an adapter of these values, in one further set of adapters, added when it is first asked for."""
        found: list[Denoiser] = []

        def model(state: dict[str, Tensor]) -> Denoiser:
            if not found:
                with torch.random.fork_rng():
                    found.append(Denoiser(model_config, self.base.add("average", self.rank)).eval().requires_grad_(False))
            found[0].network.load_state_dict(state)
            return found[0]

        return model
