"""From the tensors of a file to those of a network and back, with nothing guessed: every tensor has its place or is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, ModelError, nearest
from ..models.config import ModelConfig
from ..networks import build_network
from ..networks.empty import without_weights
from .reading import Found

_BOUNDS = {  # argument: least and largest value, of each entry where it is a list of so many at most
    "img_resolution": (1, 2**16, 0),
    "img_channels": (1, 1024, 0),
    "in_channels": (1, 1024, 0),
    "out_channels": (1, 1024, 0),
    "label_dim": (0, 2**20, 0),
    "augment_dim": (0, 1024, 0),
    "model_channels": (1, 2**16, 0),
    "channel_mult": (1, 64, 16),
    "channel_mult_noise": (1, 64, 0),
    "channel_mult_emb": (1, 64, 0),
    "num_blocks": (1, 64, 0),
    "attn_resolutions": (1, 2**16, 64),
    "channels_per_head": (1, 2**16, 0),
    "num_heads": (1, 2**16, 0),
}
_MAY_BE_NONE = ("channel_mult_noise", "channel_mult_emb")

Reshape = Callable[[str, Tensor], Tensor]  # (our key, tensor) -> the same numbers in another shape


def as_it_is(key: str, tensor: Tensor) -> Tensor:
    return tensor


def expected_state(config: ModelConfig) -> dict[str, Tensor]:
    """The state dict of the network that a config describes, without values. Raises ModelError where none can be built."""
    try:
        with without_weights():
            network = build_network(
                config.network, resolution=config.resolution, channels=config.channels, num_classes=config.num_classes,
                augment_dim=config.augment_dim, second_time=config.flow is not None, text=config.text,
            )  # fmt: skip
    except (ConfigError, RuntimeError, ValueError, TypeError, ArithmeticError) as error:
        raise ModelError(f"no network can be built of these settings: {config.network}: {error}") from error
    return network.state_dict()


def assign(
    found: Found,
    config: ModelConfig,
    names: Callable[[str], str],
    *,
    left_out: Iterable[str] = (),
    ours: Reshape = as_it_is,
    original: Reshape = as_it_is,
) -> dict[str, Tensor]:
    """The file's tensors under our keys.

    `names`: original name of one of our keys. `left_out`: originals that have no place, by decision. `ours` and `original`
    change between the two shapes of a tensor. Raises ModelError naming the first tensors that the file lacks, those that the
    architecture has no place for, and those of another shape, with both shapes.
    """
    expected = expected_state(config)
    wanted = {names(key): (key, original(key, tensor).shape) for key, tensor in expected.items()}
    missing = [name for name in wanted if name not in found.tensors]
    extra = sorted(found.tensors.keys() - wanted.keys() - set(left_out))
    shapes = [
        f"{name} is {list(found.tensors[name].shape)} and not {list(shape)}"
        for name, (_, shape) in wanted.items()
        if name in found.tensors and found.tensors[name].shape != shape
    ]
    if missing or extra or shapes:
        problems = [
            f"{what} {', '.join(items[:3])}" + (f" and {len(items) - 3} more" if len(items) > 3 else "")
            for what, items in (("it lacks", missing), ("it has unknown", extra), ("shapes differ:", shapes))
            if items
        ]
        raise ModelError(f"{found.path} does not fit the architecture that it names: {'; '.join(problems)}")
    return {key: ours(key, found.tensors[name]).contiguous() for name, (key, _) in wanted.items()}


def cast(state: dict[str, Tensor], precision: str | None) -> dict[str, Tensor]:
    """The state in "fp32" or "fp16"; None: as it is. Raises ModelError where float16 cannot hold a value."""
    if precision is None:
        return state
    dtype = {"fp32": torch.float32, "fp16": torch.float16}[precision]
    result = {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in state.items()}
    for key, tensor in result.items():
        if tensor.is_floating_point() and state[key].isfinite().all() and not tensor.isfinite().all():
            raise ModelError(f"{key} holds values beyond the largest of float16: convert to fp32")
    return result


def module(found: Found, name: str) -> dict[str, Any]:
    """Class name and arguments of an inner module of a pickled network, or ModelError."""
    inner = found.arguments.get("modules", {}).get(name)
    if not isinstance(inner, dict) or not isinstance(inner.get("init_kwargs"), dict) or inner.get("init_args"):
        raise ModelError(
            f"{found.path} does not say how its network was made (constructor arguments of {name!r}): give the network-snapshot "
            ".pkl that training wrote"
        )
    return inner


def known(found: Found, given: dict[str, Any], defaults: dict[str, Any], what: str) -> dict[str, Any]:
    """`given` arguments over their published `defaults`. Raises ModelError for one that the published class does not have."""
    for name in given:
        if name not in defaults:
            raise ModelError(f"{found.path}: {what} was made with {name!r}, which the published one does not have: "
                             + nearest(name, defaults))  # fmt: skip
    return {**defaults, **given}


def require(found: Found, arguments: dict[str, Any], fixed: dict[str, Any], what: str) -> None:
    """Raises ModelError where an argument differs from the only value that our networks have for it."""
    for name, value in fixed.items():
        if arguments[name] != value:
            raise ModelError(f"{found.path}: {what} was made with {name} = {arguments[name]!r}; mmgen has {value!r} only")


def check_sizes(found: Found, arguments: dict[str, Any], what: str) -> None:
    """Raises ModelError for sizes that no network has, before anything is made of them. None stays for those it is a value of."""
    for name, (least, largest, entries) in _BOUNDS.items():
        value = arguments.get(name)
        if name not in arguments or (value is None and name in _MAY_BE_NONE):
            continue
        values = value if entries else [value]
        if not isinstance(values, list) or len(values) > max(entries, 1) or not all(
            isinstance(v, int) and not isinstance(v, bool) and least <= v <= largest for v in values
        ):  # fmt: skip
            raise ModelError(f"{found.path}: {what} was made with {name} = {str(value)[:100]}, which no network of its kind has")
