"""Opening a model, whoever wrote it: what `mmgen sample`, `mmgen.load`, `mmgen fid` and `mmgen distill --teacher` are given."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ConfigError, ModelError
from ..models.build import AnyModel
from ..models.config import ModelConfig, kind_of
from ..models.denoiser import Denoiser
from ..models.files import METADATA_KEY, MODEL_FILE, check_state, find_model, load_model, read_config
from ..models.flow_model import FlowModel
from ..networks.empty import fill, without_weights
from ..report.push import CONVERTED
from ..system.files import sha256_of
from .family import ConvertOptions, words_of
from .reading import read
from .recognise import complete, convert, family_of, provenance


@dataclass(frozen=True)
class OpenedModel:
    """A model that was found, and converted in memory where another project wrote it. Its weights may not have been read yet."""

    file: Path  # or a folder of diffusers
    sha256: str
    config: ModelConfig
    state: dict[str, Tensor] | None = field(repr=False)  # None: in `file`, which is mmgen's own
    notes: tuple[str, ...] = ()  # what no file says, and how sampling follows the original: a sentence each

    def build(
        self, device: str | torch.device = "cpu", flow: type[FlowModel] = FlowModel, denoiser: type[Denoiser] = Denoiser
    ) -> AnyModel:
        """In evaluation mode, without gradients. Every tensor must be there with its shape, and none besides."""
        if self.state is None:
            return load_model(self.file, device, flow, denoiser)
        with without_weights():
            model = (flow if kind_of(self.config) == "imm" else denoiser)(self.config)
        check_state(model.network.state_dict(), self.state, str(self.file))
        fill(model.network, self.state)
        return model.to(device).eval().requires_grad_(False)


def open_model(
    path: str | os.PathLike, ema: str | None = None, *, weights: str = "ema", options: ConvertOptions = ConvertOptions()
) -> OpenedModel:
    """A run folder or model file of mmgen's, anything that `mmgen convert` reads, or a hub repository with either.

    `ema` picks another average of a run; `weights` and `options` are those of `convert_file`, for other projects' files.
    Raises ModelError for what cannot be found or read, and ConfigError for an option that is missing or does not apply.
    """
    given = ", ".join(filter(None, ("--weights" * (weights != "ema"), words_of(options))))
    refusal = ConfigError(f"{path} is a model of mmgen's, which says itself what it is: leave out {given}")
    own = find_model(path, ema) if ema else _own_file(path)
    if own is not None:
        if given:
            raise refusal
        return OpenedModel(own, sha256_of(own), read_config(own), None)
    found = read(path, weights=weights)
    if family_of(found) == "mmgen":
        if given:
            raise refusal
        file = found.path if found.path.is_file() else found.path / MODEL_FILE
        return OpenedModel(file, found.sha256, read_config(file), found.tensors)
    converted = complete(convert(found, options))
    training = {**converted.config.training, CONVERTED: provenance(found, converted, weights)}
    notes = tuple(f"assumed: {sentence}" for sentence in converted.assumed) + converted.sampled
    return OpenedModel(found.path, found.sha256, replace(converted.config, training=training), converted.state, notes)


def _own_file(source: str | os.PathLike) -> Path | None:
    """The file of a model of mmgen's; None for what another project wrote. Raises ModelError where nothing is found."""
    from huggingface_hub.errors import EntryNotFoundError

    path = Path(source)
    if path.is_dir():
        if not (path / MODEL_FILE).is_file() and (path / "config.json").is_file() and (path / "checkpoints").is_dir():
            return find_model(source)  # which says that the run has not saved yet
        return path / MODEL_FILE if _is_own(path / MODEL_FILE) else None
    if path.exists():
        return path if _is_own(path) else None
    if str(source).startswith("hf://") and str(source).removeprefix("hf://").count("/") > 1:  # one file of a repository
        return None
    try:
        file = find_model(source)
    except ModelError as error:
        if isinstance(error.__cause__, EntryNotFoundError):  # a repository, perhaps of another layout
            return None
        raise
    return file if _is_own(file) else None


def _is_own(path: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    if path.suffix != ".safetensors" or not path.is_file():
        return False
    try:
        with safe_open(path, "pt") as file:
            return METADATA_KEY in (file.metadata() or {})
    except (OSError, SafetensorError):
        return path.name == MODEL_FILE  # damaged, which reading it says
