"""Exponential moving averages of a network's parameters, several at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ..config.sections import TrainSettings
from ..models.power_function import average_name, power_decay
from .sharding import own, put


Decay = Callable[[int], float]  # images seen -> the decay of the step that follows


def ema_decays(train: TrainSettings) -> dict[str, Decay]:
    """Name -> decay per step. A half-life of h images at batch size B decays by 0.5^(B / h) a step; a length is that of a power function.

    The first is the one that previews, scores and model.safetensors use; where there is none, they use the weights.
    """
    constant = {f"{beta:g}": beta for beta in train.ema_betas}
    constant |= {f"{images}img": 0.5 ** (train.batch_size / images) for images in train.ema_half_lives}
    decays: dict[str, Decay] = {name: partial(_ramped, train, decay) for name, decay in constant.items()}
    return decays | {
        average_name(length): partial(power_decay, length, batch_size=train.batch_size) for length in train.ema_lengths
    }


def _ramped(train: TrainSettings, decay: float, images: int) -> float:
    return min(decay, ramp_up(train, images))


def ramp_up(train: TrainSettings, images: int) -> float:
    """The largest decay of the step after `images` images: EDM's ramp-up, so that the initial weights do not stay in an average.

    The half-life is at most train.ema_rampup times the images seen (Karras et al., arXiv:2206.00364: training_loop.py of its code,
    ema_rampup_ratio = 0.05). Decays rise with half-lives, so the lesser half-life is the lesser decay.
    """
    if train.ema_rampup == 0:
        return 1.0
    return 0.5 ** (train.batch_size / max(images * train.ema_rampup, 1e-8))


class EMA:
    """averages[name][parameter] <- decay averages + (1 - decay) parameter at every update. Buffers are not averaged.

    Where a network is sharded, every process has the averages of its own pieces.
    """

    def __init__(self, network: nn.Module, decays: dict[str, Decay]) -> None:
        self.decays = decays
        self.parameters = dict(network.named_parameters())
        self.network = network
        self.averages = {name: {k: p.detach().clone() for k, p in self.parameters.items()} for name in decays}

    @torch.no_grad()
    def update(self, images: int) -> None:
        """After the step that follows `images` images."""
        current = own(self.parameters.values())
        for name, decay in self.decays.items():
            torch._foreach_lerp_(own(self.averages[name].values()), current, 1 - decay(images))

    @property
    def first(self) -> str | None:
        return next(iter(self.decays), None)

    def state_dict(self, name: str | None) -> dict[str, Tensor]:
        """The network's state dict with averaged parameters; None: with its own."""
        return {**self.network.state_dict(), **(self.averages[name] if name is not None else {})}

    def load(self, name: str, state: dict[str, Tensor]) -> None:
        """Restores one average from a state dict with the same keys."""
        for key, average in self.averages[name].items():
            put(state[key], average)
