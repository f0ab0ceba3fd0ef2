"""Dropout as a student's own randomness: masks that depend on a key per image, in training and in sampling alike.

Jacq et al., arXiv:2606.30414, leave a distilled student's dropout on when it samples, so that few steps need not make do with
the randomness of the first noise. torch's own masks depend on the batch; these are functions of (key of the image, number of
the module), so that image i is the same in any batch and a resumed run draws what the interrupted one would have drawn.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from ..system.random import bits
from ..system.random import keys as derive

Keys = dict[nn.Dropout, Tensor]


@contextlib.contextmanager
def keyed_dropout(network: nn.Module, keys: Tensor) -> Iterator[None]:
    """Within, every nn.Dropout of the network drops by `keys` int64 [N], one per image, in train and eval mode.

    What goes through them has the N images in its first dimension, in the order of `keys`; else ValueError. Other kinds of
    dropout are left alone.
    """
    random: Keys = {}
    for number, module in enumerate(m for m in network.modules() if isinstance(m, nn.Dropout)):
        if module.p > 0:
            random[module] = derive(0, keys, number + 1)
    with _keyed(random):
        yield


def dropouts(network: nn.Module) -> int:
    """How many modules of the network `keyed_dropout` makes random."""
    return sum(isinstance(module, nn.Dropout) and module.p > 0 for module in network.modules())


def run_block(block: nn.Module, again: bool, *inputs: Tensor) -> Tensor:
    """block(*inputs); `again`: computed once more in the backward pass instead of kept (gradient checkpointing).

    With the same masks and the same parameters, also where `functional_call` has put others in the place of the block's own.
    """
    if not (again and torch.is_grad_enabled()):
        return block(*inputs)
    foreign = {name: value for name, value in block.named_parameters() if not isinstance(value, nn.Parameter)}
    run = (lambda *inputs: functional_call(block, foreign, inputs)) if foreign else block
    random: Keys = {m: m.image_keys for m in block.modules() if isinstance(m, KeyedDropout)}
    if not random:
        return checkpoint(run, *inputs, use_reentrant=False)
    # By the backward pass `keyed_dropout` is over
    contexts = lambda: (contextlib.nullcontext(), _keyed(random))  # noqa: E731
    return checkpoint(run, *inputs, use_reentrant=False, context_fn=contexts)


class KeyedDropout(nn.Dropout):
    """What an nn.Dropout is for the time being: its class is changed, so that a compiled network knows it again."""

    image_keys: Tensor  # int64 [N]

    def forward(self, x: Tensor) -> Tensor:
        return _drop(x, self.p, self.image_keys)


@contextlib.contextmanager
def _keyed(random: Keys) -> Iterator[None]:
    """Modules with keys; what they were before they are again, even if that had other keys."""
    before = {module: (type(module), module.__dict__.get("image_keys")) for module in random}
    for module, keys in random.items():
        module.__class__, module.image_keys = KeyedDropout, keys
    try:
        yield
    finally:
        for module, (kind, keys) in before.items():
            module.__class__, module.image_keys = kind, keys


def _drop(x: Tensor, p: float, key: Tensor) -> Tensor:
    """x [N, ...], each number 0 with probability p, else divided by 1 - p. Two numbers share a random word."""
    if len(x) != len(key):
        raise ValueError(f"{len(key)} keys for {len(x)} images: keyed dropout needs one each")
    count = x[0].numel()
    word = bits(key, ((count + 1) // 2,)).view(torch.int32)[:, :count].reshape(x.shape)
    return torch.where(word >= round(p * 2**32) - 2**31, x / (1 - p), 0.0)
