"""Other people's checkpoints, read without running any of what is in them."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import ConfigError, ModelError, nearest
from ..system.files import parse_json, sha256_of
from .contents import choose
from .model_folders import locate, model_folder
from .prefixes import network_in
from .safe_pickle import Holder, materialise
from .torch_files import opened, refuse_other_formats
from .training_folders import weights_place

_WEIGHTS = ("ema", "model")


@dataclass(frozen=True)
class Found:
    """What a file holds, read without running any of it."""

    path: Path
    container: str  # in words: "EDM pickle", "torch .pt (zip)", "torch .pt (legacy)", "safetensors", "diffusers folder" ...
    tensors: dict[str, Tensor]  # original keys without the prefixes of wrappers ("module.", "_orig_mod."); the EMA, if any
    arguments: dict[str, Any]  # what the file says of its network: see `read`
    left_out: dict[str, str]  # what was in the file and is not in tensors -> the reason
    sha256: str  # of the file; of a folder's file of weights; of shards: of their digests' text, in order of their names


def read(source: str | os.PathLike, *, weights: str = "ema") -> Found:
    """Reads a file, a folder or a hub repository (user/name, hf://user/name, hf://user/name/file).

    `weights`: "ema" for the averaged weights where there are any, "model" for those that are not averaged.

    `Found.arguments` has, as far as the file tells: of pickles "class_name", "init_kwargs", "attributes" (what the constructor
    kept, defaults included) and "modules", nested; "args" of an argparse.Namespace; of folders "config", "scheduler" and
    "model_index"; of .safetensors "metadata", and "mmgen" for mmgen's own; and in "entries" what else the file says (steps, data,
    encoder), under its names.

    Raises ModelError, with one sentence, for everything that cannot be read, and ConfigError for another `weights`.
    """
    if weights not in _WEIGHTS:
        raise ConfigError(f"unknown weights {weights!r}: {nearest(weights, _WEIGHTS)}")
    path = locate(source)
    if not path.is_dir():
        return _read_file(path, weights)
    inner, beside = weights_place(path, weights)
    if not inner.is_dir():
        found = _read_file(inner, weights)
        return replace(found, left_out=found.left_out | beside)
    folder = model_folder(inner)
    parts = [_read_file(file, weights) for file in folder.files]
    tensors: dict[str, Tensor] = {}
    for part in parts:
        if twice := sorted(tensors.keys() & part.tensors.keys()):
            raise ModelError(f"{part.path} holds {twice[0]}, which another part of the weights holds too: fetch the folder again")
        tensors.update(part.tensors)
    if folder.weight_map is not None and folder.weight_map.keys() != tensors.keys():
        name = sorted(folder.weight_map.keys() ^ tensors.keys())[0]
        raise ModelError(f"the parts of the weights in {path} do not fit their index: it differs in {name}; fetch it again")
    arguments = {**parts[0].arguments, **folder.arguments}
    left_out = {key: reason for part in parts for key, reason in part.left_out.items()} | folder.left_out | beside
    sha256 = parts[0].sha256 if len(parts) == 1 else hashlib.sha256("".join(p.sha256 for p in parts).encode()).hexdigest()
    container = "diffusers folder" if "config" in folder.arguments else f"folder with {parts[0].container}"
    if len(parts) > 1:
        container += f" ({len(parts)} shards)"
    return Found(path, container, tensors, arguments, left_out, sha256)


def _read_file(path: Path, weights: str) -> Found:
    if not path.exists():
        raise ModelError(f"there is no file {path}")
    if not path.is_file():
        raise ModelError(f"{path} is no file")
    sha256 = sha256_of(path)
    if _is_safetensors(path):
        tensors, arguments = _read_safetensors(path)
        beside: dict[str, str] = {}
        if "mmgen" not in arguments:
            tensors, beside = network_in(tensors, weights, str(path))
        return Found(path, "safetensors", tensors, arguments, beside, sha256)
    with opened(path) as file:
        chosen = choose(file.value, weights, str(path))
        container = file.container
        if container == "pickle":
            held = file.value if type(file.value) is Holder else next((v for v in file.value.values() if type(v) is Holder), None)
            container = "EDM pickle" if held is not None and held.persistent else "pickle"
        stored, beside = chosen.tensors, {}
        if "class_name" not in chosen.arguments:
            stored, beside = network_in(stored, weights, str(path))
        tensors = materialise(stored, str(path), path.stat().st_size)
    return Found(path, container, tensors, chosen.arguments, chosen.left_out | beside, sha256)


def _is_safetensors(path: Path) -> bool:
    with open(path, "rb") as file:
        head = file.read(1024)
    refuse_other_formats(path, head)
    return path.suffix == ".safetensors" or (head[8:9] == b"{" and 0 < int.from_bytes(head[:8], "little") < path.stat().st_size)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    if path.stat().st_size < 8:
        raise ModelError(f"{path} is damaged or cut short: fetch it again")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (OSError, SafetensorError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise ModelError(f"{path} is damaged or cut short, as a .safetensors file: {str(error)[:200]}") from error
    if not tensors:
        raise ModelError(f"{path} holds no tensors")
    arguments: dict[str, Any] = {"metadata": metadata} if metadata else {}
    if "mmgen" in metadata:
        try:
            arguments = {"mmgen": parse_json(metadata["mmgen"])}
        except ValueError as error:
            raise ModelError(f"the config in the header of {path} is damaged: {error}") from error
    return tensors, arguments
