"""Averages of any length made after training, from the snapshots of a run with train.ema_lengths: see `power_function`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, ModelError, shortened
from ..networks.empty import without_weights
from .build import build_model
from .config import ModelConfig
from .files import check_state, read_config, save_model
from .power_function import LONGEST, coefficients, post_hoc_name

FOLDER = "snapshots"  # of a run
_NAME = re.compile(r"model-\d+-length[0-9.e-]+\.safetensors")


@dataclass(frozen=True)
class Snapshot:
    file: Path
    config: ModelConfig
    images: int
    length: float


def find_snapshots(run: Path) -> list[Snapshot]:
    """Those of a run, the oldest first. Raises ModelError where there are none, or one is damaged."""
    files = sorted(file for file in (run / FOLDER).glob("*.safetensors") if _NAME.fullmatch(file.name))
    if not files:
        raise ModelError(f"{run} has no snapshots to average: train with --set train.ema_lengths=[0.05,0.1]")
    found = []
    for file in files:
        config = read_config(file)
        images, length = config.training.get("images"), config.training.get("length")
        if type(images) is not int or images <= 0 or not isinstance(length, float) or not 0 < length < LONGEST:
            raise ModelError(f"{file} is no snapshot of a run: its header has no images and length; delete it")
        found.append(Snapshot(file, config, images, length))
    return found


@dataclass(frozen=True)
class Made:
    """An average made after training."""

    file: Path
    name: str  # for --ema
    images: int  # seen at its end
    snapshots: int
    error: float  # of its profile, see `coefficients`


def make_average(run: Path, length: float) -> Made:
    """Writes the average of `length` at the last snapshot of a run, beside its model. Raises ConfigError and ModelError."""
    if not 0 < length < LONGEST:
        raise ConfigError(f"the length of an average must lie between 0 and {LONGEST:.4f}, not {shortened(length)}")
    snapshots = find_snapshots(run)
    end = snapshots[-1]
    weights, error = coefficients([one.images for one in snapshots], [one.length for one in snapshots], end.images, length)
    name = post_hoc_name(length)
    training = {**end.config.training, "ema": name, "length": length, "snapshots": len(snapshots), "profile_error": error}
    file = run / f"model-ema-{name}.safetensors"
    save_model(file, replace(end.config, training=training), _sum(snapshots, weights))
    return Made(file, name, end.images, len(snapshots), error)


def _sum(snapshots: Sequence[Snapshot], weights: np.ndarray) -> dict[str, Tensor]:
    """The weighted sum of the parameters, in float64, one tensor at a time; buffers are those of the last snapshot."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file, safe_open

    last = snapshots[-1].file
    with without_weights():
        network = build_model(snapshots[-1].config).network
    try:
        state = load_file(last)
        check_state(network.state_dict(), state, str(last))
        parameters = [key for key, _ in network.named_parameters()]
        total = {key: torch.zeros_like(state[key], dtype=torch.float64) for key in parameters}
        for one, weight in zip(snapshots, weights, strict=True):
            with safe_open(one.file, "pt") as file:
                if (other := set(total) - set(file.keys())) or any(
                    file.get_slice(key).get_shape() != list(state[key].shape) for key in total
                ):
                    raise ModelError(f"{one.file} is of another network than {last.name}: {sorted(other)[:1] or 'shapes differ'}")
                for key, value in total.items():
                    value.add_(file.get_tensor(key).double(), alpha=float(weight))
    except (OSError, SafetensorError) as error:
        raise ModelError(f"a snapshot in {last.parent} cannot be read: {error}") from error
    return state | {key: value.to(state[key].dtype) for key, value in total.items()}
