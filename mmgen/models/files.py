"""Model files: network and config in one .safetensors file that samples years later. Found by name, saved and loaded."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import torch
from torch import Tensor

from .. import __version__
from ..errors import ConfigError, ModelError, shortened
from ..networks.empty import fill, without_weights
from ..system.files import parse_json, replacing
from ..system.schema import from_dict
from ..system.tensor_files import save_tensors
from .build import AnyModel
from .config import ModelConfig, check_config, kind_of
from .denoiser import Denoiser
from .flow_model import FlowModel
from .missing_run import missing_run

METADATA_KEY = "mmgen"
FORMAT = 1
MODEL_FILE = "model.safetensors"


def save_model(path: str | os.PathLike, config: ModelConfig, state: dict[str, Tensor]) -> None:
    """Writes one .safetensors file, atomically. `state`: the network's state dict."""
    header = {"format": FORMAT, "mmgen_version": __version__, "kind": kind_of(config), "config": dataclasses.asdict(config)}
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    with replacing(path) as temporary:
        save_tensors(tensors, temporary, metadata={METADATA_KEY: json.dumps(header)})


def read_config(path: str | os.PathLike) -> ModelConfig:
    """The config in the header of a model file, without reading the weights. Raises ModelError with one sentence."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read as a .safetensors file: {error}") from error
    if METADATA_KEY not in metadata:
        raise ModelError(f"{path} is a .safetensors file, but not one of mmgen's: its header has no '{METADATA_KEY}' entry")
    try:
        header = parse_json(metadata[METADATA_KEY])
        found = header["format"]
        if found != FORMAT:
            raise ModelError(f"{path} has model format {found}, this version of mmgen reads {FORMAT}: install a newer mmgen")
        config = from_dict(ModelConfig, header["config"])
        check_config(config)
        return config
    except (ValueError, KeyError, TypeError, ConfigError) as error:
        raise ModelError(f"the config in the header of {path} is damaged: {shortened(error, 2000)}") from error


def load_model(
    path: str | os.PathLike, device: str | torch.device = "cpu", flow: type[FlowModel] = FlowModel, denoiser: type[Denoiser] = Denoiser
) -> AnyModel:
    """The model in a file, in evaluation mode, of the class `flow` or `denoiser`.

    Every tensor must be there with its shape, and none besides.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config = read_config(path)
    with without_weights():
        model = (flow if kind_of(config) == "imm" else denoiser)(config)
    try:
        state = load_file(path, device="cpu")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    check_state(model.network.state_dict(), state, str(path))
    fill(model.network, state)
    return model.to(device).eval().requires_grad_(False)


def check_state(expected: dict[str, Tensor], found: dict[str, Tensor], name: str) -> None:
    """Raises ModelError unless both have the same keys and shapes, naming the first differences."""
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    shapes = [k for k in expected.keys() & found.keys() if expected[k].shape != found[k].shape]
    problems = [
        f"{what} {', '.join(keys[:3])}" + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
        for what, keys in (("it lacks", missing), ("it has unknown", extra), ("shapes differ for", sorted(shapes)))
        if keys
    ]
    if problems:
        raise ModelError(f"{name} does not fit its own config: {'; '.join(problems)}")


def find_model(source: str | os.PathLike, ema: str | None = None) -> Path:
    """The model file that a MODEL argument means: a file, a run folder, or a hub repository (user/name, hf://user/name).

    `ema` picks another of the averages a run keeps, such as "0.9999": `model-ema-0.9999.safetensors` beside `model.safetensors`.
    Raises ModelError saying where it looked.
    """
    name = f"model-ema-{ema}.safetensors" if ema else MODEL_FILE
    if Path(name).name != name or not name.isprintable() or len(name) > 100:
        raise ModelError(f"no average is called {shortened(ema)}: give the NAME of a model-ema-NAME.safetensors")
    path = Path(source)
    if path.is_file():
        if ema and path.name != name:
            path = path.with_name(name)
            if not path.is_file():
                raise ModelError(f"{Path(source).parent} has no {name}; {_averages(Path(source).parent)}")
        return path
    if path.is_dir():
        if (path / name).is_file():
            return path / name
        if ema:
            raise ModelError(f"{source} has no {name}; {_averages(path)}")
        raise ModelError(f"{source} is a folder without {MODEL_FILE}: it is not a run folder, or its run has not saved yet")
    if (sentence := missing_run(str(source))) is not None:
        raise ModelError(sentence)
    repository = str(source).removeprefix("hf://")
    if str(source).startswith(("/", ".", "~")) or repository.count("/") != 1 or repository.endswith(".safetensors"):
        raise ModelError(f"there is no model at {source}: give a .safetensors file, a run folder or a hub repository user/name")
    return _download(repository, name)


def _averages(folder: Path) -> str:
    found = sorted(p.stem.removeprefix("model-ema-") for p in folder.glob("model-ema-*.safetensors"))
    return f"its other averages: {', '.join(found)}" if found else "it keeps one average only"


def _download(repository: str, name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    looked = f"there is no file or folder {repository}, and the hub repository {repository}"
    try:
        return Path(hf_hub_download(repository, name))
    except LocalEntryNotFoundError as error:
        raise ModelError(f"{looked} is not in the local cache and the hub cannot be reached") from error
    except EntryNotFoundError as error:
        raise ModelError(f"{looked} holds no {name}") from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ModelError(
            f"{looked} cannot be read ({type(error).__name__}): check the name, or log in for a private one"
        ) from error
