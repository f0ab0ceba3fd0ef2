"""Weights that a training begins with: `--init`, of any model that mmgen reads whose network is the same.

A flow map with the parametrization `given` begins with a denoiser's: of its second time, which that has not, nothing is seen at first.

Images may have another size than those of the model: progressive stages, such as 8, 16, 32 pixels. Then every level of a U-Net sees
sides as many times as large, and so must network.attn_resolutions be; a DiT has a longer table of positions, which is not learned.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import Tensor, nn

from ..errors import ConfigError, shortened
from ..formats.family import ConvertOptions
from ..formats.reading import read
from ..formats.recognise import convert, family_of
from ..models.config import ModelConfig
from ..models.files import read_config
from ..networks import with_second_time, without_augment
from .task import Task

_NO_WEIGHTS = {"dropout", "gradient_checkpointing"}  # settings of networks that may differ
_SIDES = re.compile(r"\.(\d+)x\1_")  # in the names of a U-Net's blocks, of what they see


@dataclass(frozen=True)
class Initial:
    path: str  # as it was given
    sha256: str  # of the file
    config: ModelConfig
    state: dict[str, Tensor]


def read_initial(path: str) -> Initial:
    """A model file, a run folder, a hub repository, or what `mmgen convert` reads. Raises ModelError and ConfigError."""
    found = read(path)
    if family_of(found) == "mmgen":
        config = read_config(found.path if found.path.is_file() else found.path / "model.safetensors")
        return Initial(path, found.sha256, config, found.tensors)
    try:
        converted = convert(found, ConvertOptions())
    except ConfigError as error:
        raise ConfigError(f"{error}: say so to `mmgen convert`, and give what that writes as --init") from error
    return Initial(path, found.sha256, converted.config, converted.state)


def check_initial(initial: Initial, wanted: ModelConfig) -> None:
    """Raises ConfigError where a training of this model cannot begin with the weights, by what both say of themselves."""
    if wanted.flow is not None and initial.config.denoiser is not None and wanted.flow.given is None:
        raise ConfigError(f"--init {initial.path} is a denoiser, whose output means another thing: set flow.parametrization=given too")
    if difference := _difference(wanted, initial.config):
        raise ConfigError(f"--init {initial.path}: its network is another one: {difference}")


def begin_with(task: Task, initial: Initial) -> Task:
    """The weights into the network that becomes the model. Raises ConfigError naming the first thing in which it is another."""
    network, wanted, state = next(iter(task.trained.values())).network, task.model_config, initial.state
    check_initial(initial, wanted)
    state = with_second_time(state, network) if wanted.flow is not None and initial.config.denoiser is not None else state
    state = state if wanted.augment_dim else without_augment(state)
    state = _at_size(state, network, Fraction(wanted.resolution, initial.config.resolution))
    if difference := _of_tensors(network, state):
        raise ConfigError(f"--init {initial.path}: its network is another one: {difference}")
    network.load_state_dict(state)
    return task


def _difference(wanted: ModelConfig, found: ModelConfig) -> str | None:
    ours, theirs, ratio = _network(wanted), _network(found), Fraction(wanted.resolution, found.resolution)
    if "attn_resolutions" in theirs:
        theirs["attn_resolutions"] = tuple(int(ratio * side) for side in theirs["attn_resolutions"])
    for key in ours | theirs:
        if key not in _NO_WEIGHTS and ours.get(key) != theirs.get(key):
            at = f", at {wanted.resolution} pixels," if key == "attn_resolutions" and ratio != 1 else ""
            return f"network.{key} is {shortened(ours.get(key))} here and{at} {shortened(theirs.get(key))} there"
    for key in ("channels", "num_classes", *(["augment_dim"] if wanted.augment_dim else [])):
        if getattr(wanted, key) != getattr(found, key):
            return f"{key} is {getattr(wanted, key)} here and {getattr(found, key)} there"
    return None


def _network(config: ModelConfig) -> dict[str, Any]:
    return dataclasses.asdict(config.network)


def _at_size(state: dict[str, Tensor], network: nn.Module, ratio: Fraction) -> dict[str, Tensor]:
    """The weights of a network for images so many times as large. A table of positions that is no parameter is the network's own."""
    if ratio == 1:
        return state
    renamed = {_SIDES.sub(lambda found: f".{int(ratio * int(found[1]))}x{int(ratio * int(found[1]))}_", key): value for key, value in state.items()}
    return renamed | {key: value for key, value in network.named_buffers() if key == "position" and key in state}


def _of_tensors(network: nn.Module, state: dict[str, Tensor]) -> str | None:
    ours = network.state_dict()
    for key in ours | state:
        if key not in state or key not in ours:
            return f"{key} is {'not there' if key in ours else 'there and not here'}"
        if ours[key].shape != state[key].shape:
            return f"{key} is {list(ours[key].shape)} here and {list(state[key].shape)} there"
    return None
