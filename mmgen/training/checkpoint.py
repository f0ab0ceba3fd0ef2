"""Checkpoints: folders of .safetensors files and one JSON, written atomically. Nothing in them is a pickle.

checkpoints/000000512000/        images seen
    network.safetensors          the weights that are trained; NAME.safetensors: those of every further part of the method
    ema-NAME.safetensors         every average
    optimizer.safetensors        tensors of the optimiser's state, "parameter number.name"; optimizer-NAME.safetensors likewise
    state.json                   images seen, seconds spent, the fp16 scalers; the size and the SHA-256 of every other file, and its
                                 own: `checkpoint_sums`
damaged-000000000512000/     one that was found damaged: never read, never deleted
"""

from __future__ import annotations

import contextlib
import itertools
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ..errors import MmgenError, ModelError, TrainingError, disk_errors, shortened
from ..system.files import replacing_folder
from ..models.files import check_state
from ..system.processes import ProcessGroup
from ..system.tensor_files import save_tensors
from .checkpoint_sums import damage, read_state, write_state
from .ema import EMA
from .optim import suited
from .sharding import as_spread, gathered, put


@dataclass
class Progress:
    """What of a run is not a tensor."""

    images: int = 0
    seconds: float = 0.0  # spent in all invocations


def _of_parts(scalers: dict[str, Any]) -> list[tuple[str, Any]]:
    """The scaler of each part with its key in state.json."""
    return [(f"scaler-{name}" if i else "scaler", scaler) for i, (name, scaler) in enumerate(scalers.items())]


def _files(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Part -> names of the files of its network and its optimiser, without the suffix. The first part's have plain names."""
    return {name: (name, f"optimizer-{name}") if i else ("network", "optimizer") for i, name in enumerate(names)}


def save_checkpoint(
    folder: Path,
    networks: dict[str, nn.Module],
    optimizers: dict[str, torch.optim.Optimizer],
    ema: EMA,
    scalers: dict[str, Any],
    progress: Progress,
    process_group: ProcessGroup = ProcessGroup(),
) -> Path:
    """Writes one checkpoint under `folder` and returns its path. Raises MmgenError where the disk is full.

    networks, optimizers: by part, in the same order at every call. All processes call this: the main one writes, the others give
    their pieces of what is sharded. One file at a time is put together.
    """
    path = folder / f"{progress.images:012d}"
    content: dict[str, Any] = {"images": progress.images, "seconds": progress.seconds}
    for key, scaler in _of_parts(scalers):
        content[key] = scaler.state_dict() if scaler is not None else None
    with replacing_folder(path) if process_group.is_main else contextlib.nullcontext() as temporary:
        for file, state in _states(networks, optimizers, ema, content):
            tensors = gathered(state, keep=process_group.is_main)
            if process_group.is_main:
                save_tensors(tensors, temporary / f"{file}.safetensors")
            del tensors, state  # before the next file is put together
            process_group.wait()  # the next may be a collective of the devices, in which nobody waits for a disk
        if process_group.is_main:
            write_state(temporary, content)
    return path


def _states(
    networks: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer], ema: EMA, content: dict[str, Any]
) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Every file of tensors, its name without the suffix and its state; what of an optimiser is no tensor goes to `content`."""
    for name, (network_file, optimizer_file) in _files(networks).items():
        yield network_file, networks[name].state_dict()
        tensors, content[optimizer_file] = _optimizer_state(optimizers[name])
        yield optimizer_file, tensors
    for name in ema.decays:
        yield f"ema-{name}", ema.state_dict(name)


def _optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Its tensors, "parameter number.name", and what else it keeps of each parameter."""
    state = optimizer.state_dict()
    tensors, plain = {}, {}
    for number, values in state["state"].items():
        for name, value in values.items():
            (tensors if isinstance(value, torch.Tensor) else plain)[f"{number}.{name}"] = value
    return tensors, {"state": plain}


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints, whole or damaged, the newest last."""
    return sorted(p for p in folder.glob("[0-9]*") if p.name.isdecimal() and p.is_dir())


def newest_whole(folder: Path, needed: Iterable[str], process_group: ProcessGroup, note: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is not damaged, the same in all processes, which all call this; None where there is none yet.

    Newer ones, which are damaged, are named by `note`, and renamed to `damaged-...`, so that others of the same number can be
    written. needed: the names of the files that a checkpoint has. Raises TrainingError where all are damaged; then nothing is
    renamed, so that the next attempt does not begin from nothing.
    """
    chosen, refusal = None, None
    if process_group.is_main:
        try:
            chosen = _choose(folder, set(needed), note)
        except MmgenError as error:
            refusal = error
    chosen, refusal = process_group.gather((chosen, refusal))[0]
    if refusal is not None:
        raise refusal
    return chosen


def _choose(folder: Path, needed: set[str], note: Callable[[str], None]) -> Path | None:
    damaged: list[tuple[Path, str]] = []
    for path in reversed(list_checkpoints(folder)):
        what = damage(path, needed)
        if what is not None:
            damaged.append((path, what))
            continue
        for old, reason in damaged:
            aside = _set_aside(old)
            note(f"the checkpoint {old} is damaged ({reason}): it is kept as {aside.name}, and {path.name} is used instead")
        return path
    if not damaged:
        return None
    listing = "; ".join(f"{path.name}: {what}" for path, what in damaged)
    raise TrainingError(
        f"no checkpoint in {folder} is whole ({listing}): put back what is damaged, or give another --out to start anew"
    )


def _set_aside(path: Path) -> Path:
    """Renames a damaged checkpoint. Raises MmgenError where that is not possible."""
    names = (f"damaged-{path.name}" + (f"-{i}" if i else "") for i in itertools.count())
    target = next(target for name in names if not (target := path.with_name(name)).exists())
    with disk_errors(target):
        path.rename(target)
    return target


def file_names(names: Iterable[str], ema: EMA) -> set[str]:
    """The files of a checkpoint of these parts and averages, beside state.json."""
    stems = {stem for both in _files(names).values() for stem in both} | {f"ema-{name}" for name in ema.decays}
    return {f"{stem}.safetensors" for stem in stems}


def load_checkpoint(
    path: Path, networks: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer], ema: EMA, scalers: dict[str, Any]
) -> Progress:
    """Restores everything in place, but for the optimisers' settings. Raises TrainingError naming what is damaged or does not fit."""
    try:
        content = read_state(path)
        averages = {name: load_file(path / f"ema-{name}.safetensors") for name in ema.decays}
        for name, (network_file, optimizer_file) in _files(networks).items():
            weights = load_file(path / f"{network_file}.safetensors")
            check_state(networks[name].state_dict(), weights, f"{path / network_file}")
            for key, target in networks[name].state_dict().items():
                put(weights[key], target)
            tensors, plain = load_file(path / f"{optimizer_file}.safetensors"), content[optimizer_file]
            state: dict[int, dict[str, Any]] = {}
            for key, value in {**tensors, **plain["state"]}.items():
                number, _, entry = key.partition(".")
                state.setdefault(int(number), {})[entry] = value
            for number, parameter in enumerate(networks[name].parameters()):
                for entry, value in state.get(number, {}).items():
                    if isinstance(value, torch.Tensor):
                        value = as_spread(value, parameter)
                        if value.shape == parameter.shape:  # fused optimisers want the parameter's order in memory
                            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
                        state[number][entry] = value
            settings = optimizers[name].state_dict()["param_groups"]  # those of now: a run may go on with others
            optimizers[name].load_state_dict({"state": suited(state, optimizers[name]), "param_groups": settings})
        for name, average in averages.items():
            check_state(next(iter(networks.values())).state_dict(), average, f"{path / name}")
            ema.load(name, average)
        for key, scaler in _of_parts(scalers):
            found = content.get(key, content["scaler"])  # version 0.1 has one for all
            if scaler is not None and found is not None:
                scaler.load_state_dict(found)
        if type(content["images"]) is not int or not 0 <= float(content["seconds"]) < math.inf:
            raise ValueError("its progress is no number")
        return Progress(content["images"], content["seconds"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError, ModelError) as error:
        raise TrainingError(
            f"the checkpoint {path} cannot be used ({shortened(error, 300)}): move that folder away to go back to the one before "
            "it, or give another --out"
        ) from error


def remove_old(folder: Path, keep: int) -> None:
    """Deletes all but the newest `keep` checkpoints."""
    for old in list_checkpoints(folder)[:-keep]:
        doomed = old.with_name(f".tmp-{old.name}")  # renamed first: a kill in the middle leaves no half checkpoint
        old.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
