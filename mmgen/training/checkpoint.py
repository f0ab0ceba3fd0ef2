"""Checkpoints: folders of .safetensors files and one JSON, written beside and renamed. Nothing in them is a pickle.

checkpoints/000000512000/        images seen
    network.safetensors          the weights that are trained
    ema-NAME.safetensors         every average
    optimizer.safetensors        tensors of the optimiser's state, "parameter number.name"
    state.json                   images seen, seconds spent, the optimiser's other settings, the fp16 scaler
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..errors import ModelError, TrainingError
from ..files import replacing_folder
from ..models import check_state
from .ema import EMA

FORMAT = 1


@dataclass
class Progress:
    """What of a run is not a tensor."""

    images: int = 0
    seconds: float = 0.0  # spent in all invocations


def save_checkpoint(
    folder: Path, network: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer, scaler: Any, progress: Progress
) -> Path:
    """Writes one checkpoint under `folder` and returns its path. Raises MmgenError where the disk is full."""
    state = optimizer.state_dict()
    tensors, plain = {}, {}
    for number, values in state["state"].items():
        for name, value in values.items():
            (tensors if isinstance(value, torch.Tensor) else plain)[f"{number}.{name}"] = value
    path = folder / f"{progress.images:012d}"
    with replacing_folder(path) as temporary:
        _save(temporary / "network.safetensors", network.state_dict())
        for name in ema.decays:
            _save(temporary / f"ema-{name}.safetensors", ema.state_dict(name))
        _save(temporary / "optimizer.safetensors", tensors)
        content = {
            "format": FORMAT,
            "images": progress.images,
            "seconds": progress.seconds,
            "optimizer": {"state": plain, "param_groups": state["param_groups"]},
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        (temporary / "state.json").write_text(json.dumps(content, indent=2))
    return path


def _save(path: Path, state: dict[str, torch.Tensor]) -> None:
    save_file({key: value.detach().cpu().contiguous().clone() for key, value in state.items()}, path)


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, the newest last."""
    return sorted(p for p in folder.glob("[0-9]*") if p.name.isdecimal() and (p / "state.json").is_file())


def load_checkpoint(path: Path, network: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer, scaler: Any) -> Progress:
    """Restores everything in place. Raises TrainingError naming what is damaged or does not fit."""
    try:
        content = json.loads((path / "state.json").read_text())
        weights = load_file(path / "network.safetensors")
        averages = {name: load_file(path / f"ema-{name}.safetensors") for name in ema.decays}
        tensors = load_file(path / "optimizer.safetensors")
        for name, state in {"network": weights, **averages}.items():
            check_state(network.state_dict(), state, f"{path / name}")
        network.load_state_dict(weights)
        for name, state in averages.items():
            ema.load(name, state)
        state: dict[int, dict[str, Any]] = {}
        for key, value in {**tensors, **content["optimizer"]["state"]}.items():
            number, _, name = key.partition(".")
            state.setdefault(int(number), {})[name] = value
        optimizer.load_state_dict({"state": state, "param_groups": content["optimizer"]["param_groups"]})
        if scaler is not None and content["scaler"] is not None:
            scaler.load_state_dict(content["scaler"])
        return Progress(content["images"], content["seconds"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, ModelError) as error:
        raise TrainingError(
            f"the checkpoint {path} cannot be used ({error}): delete that folder to go back to the one before it, "
            "or give another --out"
        ) from error


def remove_old(folder: Path, keep: int) -> None:
    """Deletes all but the newest `keep` checkpoints."""
    for old in list_checkpoints(folder)[:-keep]:
        doomed = old.with_name(f".tmp-{old.name}")  # renamed first: a kill in the middle leaves no half checkpoint
        old.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
