"""LoRA (Hu et al., arXiv:2106.09685): several trained networks on the weights of one, each by low-rank changes of its own. By peft.

A layer's weights W become W + B A, with A of `rank` rows drawn at random and B of `rank` columns, zero at first: an adapter begins as
the base itself. The scale alpha / rank is 1.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError, shortened

# Of diffusers' networks: those of its example train_lcm_distill_lora_sd_wds.py, and SD3's layers of the text's side
DIFFUSERS_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut",
    "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
    "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff_context.net.0.proj", "ff_context.net.2",
)  # fmt: skip
_NEVER_CALLED = ("augment_embed",)  # by a student, which draws images as they are


class LoraBase:
    """A frozen network with adapters in its layers, of which at most one is switched on: `active`, None for the base itself."""

    def __init__(self, network: nn.Module, targets: tuple[str, ...] = ()) -> None:
        """targets: ends of the names of the layers that get adapters; none: see `target_names`. Raises ConfigError."""
        self.network = network.requires_grad_(False)
        self.names = target_names(network, targets)
        self.layers: dict[str, Any] = {}
        self.active: str | None = None

    def add(self, adapter: str, rank: int) -> Adapted:
        """An adapter of this name in all layers, with fresh weights, which are drawn from torch's generator."""
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise ConfigError("student.lora needs the package peft, which is not installed: pip install 'mmgen[lora]'") from error
        pattern = "|".join(map(re.escape, self.names))
        # peft looks into a model's `config`; a folder of weights that is saved, which it warns of, is none of ours
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=pattern), self.network, adapter)
        self.layers = {name: self.network.get_submodule(name) for name in self.names}
        for layer in self.layers.values():
            layer.requires_grad_(False)
            layer.forward = partial(_adapted, layer)
            for matrices in (layer.lora_A, layer.lora_B):
                matrices.float().requires_grad_(True)  # peft gives them the type of the layer's weights
        self.switch(self.active)
        return Adapted(self, adapter)

    def halve(self, dtype: torch.dtype) -> None:
        """Keeps the weights of linear and convolution layers in half precision, as they are in passes under autocast.

        In others they are rounded too, but computed with in their input's precision: see `_widened`. All networks on this base
        have the same weights, so that their differences are no less exact.
        """
        for module in self.halvable():
            module.weight.data = module.weight.data.to(dtype)
            module.forward = partial(_widened, module)

    def halvable(self) -> list[nn.Module]:
        """The linear and convolution layers of the base, but the first: its type is taken for that of the network's inputs."""
        layers = [module for name, module in self.network.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d)) and ".lora_" not in name]
        return layers[1:]

    def itself(self) -> Adapted:
        """The base as a network of its own, whichever adapter is switched on."""
        return Adapted(self, None)

    def switch(self, adapter: str | None) -> None:
        """Not by peft's `set_adapter`, which takes the gradient from the other adapters: DistributedDataParallel waits for it."""
        self.active = adapter
        for layer in self.layers.values():
            layer._disable_adapters = adapter is None
            layer._active_adapter = [adapter or next(iter(layer.lora_A))]


class Adapted(nn.Module):
    """The base with one adapter, or with none, called as the base is. Its parameters, and so its state dict, are the adapter's:
    `blocks.0.fc1.lora_A.weight`, as peft and diffusers name them. Without an adapter they are all of the base's.

    A pass that records a graph leaves its adapter switched on, for the blocks that the backward pass computes again; after
    another that of before is on again. So there may be graphs of one adapter at a time.
    """

    def __init__(self, base: LoraBase, adapter: str | None) -> None:
        super().__init__()
        self._base, self.adapter = (base,), adapter  # in a tuple: no module of this one's
        if adapter is None:
            self.network = base.network
        for name, layer in base.layers.items() if adapter is not None else ():
            _put(self, f"{name}.lora_A", layer.lora_A[adapter])
            _put(self, f"{name}.lora_B", layer.lora_B[adapter])

    @property
    def base(self) -> LoraBase:
        return self._base[0]

    @property
    def settings(self) -> Any:
        return self.base.network.settings

    @settings.setter
    def settings(self, value: Any) -> None:
        self.base.network.settings = value

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        before = self.base.active
        self.base.switch(self.adapter)
        try:
            return self.base.network(*args, **kwargs)
        finally:
            if not torch.is_grad_enabled():
                self.base.switch(before)


def _adapted(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer of peft's as peft computes it, without a scale of 1 and without copies of x in float32 under autocast."""
    result = layer.base_layer(x)
    if layer._disable_adapters:
        return result
    (adapter,) = layer._active_adapter
    return result + layer.lora_B[adapter](layer.lora_A[adapter](x))


def _widened(layer: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
    """A layer whose weights are kept in half precision, in the precision of x; autocast chooses its own."""
    weight = layer.weight if torch.is_autocast_enabled(x.device.type) else layer.weight.to(x.dtype)
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, layer.bias)
    return layer._conv_forward(x, weight, layer.bias)


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    """The module at a dotted path below the root, with what is needed between."""
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = root._modules[parent]
    root.add_module(name, module)


def target_names(network: nn.Module, targets: tuple[str, ...] = ()) -> list[str]:
    """The names of the linear and convolution layers that get adapters: those that end in one of `targets`.

    No targets: of diffusers' networks DIFFUSERS_TARGETS; of others all, but for what a student never calls. Raises ConfigError
    where there are none, or a target that was asked for is of none.
    """
    layers = [
        name for name, module in network.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
    ]  # fmt: skip
    layers = [name for name in layers if not any(part in _NEVER_CALLED for part in name.split("."))]
    found = {target: [name for name in layers if f".{name}".endswith(f".{target}")] for target in targets}
    if missing := next((target for target, names in found.items() if not names), None):
        raise ConfigError(f"student.lora_targets: {shortened(missing)} is the end of no linear or convolution layer's name")
    if not targets and getattr(network.settings, "kind", "").startswith("diffusers"):
        found = {target: [name for name in layers if f".{name}".endswith(f".{target}")] for target in DIFFUSERS_TARGETS}
    wanted = {name for names in found.values() for name in names}
    names = [name for name in layers if name in wanted] if found else layers
    if not names:
        raise ConfigError(
            f"student.lora: a network of kind {network.settings.kind!r} has no plain linear or convolution layers for it: train "
            "all weights, with student.lora=0"
        )
    return names


def merged(network: nn.Module, adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the base without adapters, W + B A in the layers of one: a network's as any other's, float32 on the CPU.

    network: with adapters in it; adapter: the state dict of an `Adapted`.
    """
    state = {}
    for key, value in network.state_dict().items():
        if ".lora_" in key:
            continue
        name, _, last = key.rpartition(".base_layer.")
        plain = f"{name}.{last}" if name else key
        value = value.detach().cpu()
        value = value.float() if value.is_floating_point() else value  # what is added is small beside steps of half precision
        if name and last == "weight":
            a, b = (adapter[f"{name}.lora_{letter}.weight"].detach().cpu() for letter in "AB")
            value = value + product(a, b)
        state[plain] = value
    return state


def product(a: Tensor, b: Tensor) -> Tensor:
    """B A: of a linear layer [out, rank] [rank, in]; of a convolution [out, rank, 1, 1] [rank, in, k, k] -> [out, in, k, k]."""
    return torch.einsum("or,r...->o...", b.flatten(1).float(), a.float())
