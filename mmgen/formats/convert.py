"""Other people's checkpoints into mmgen's file, and back: reading, naming, proving that nothing was lost, writing."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path


from . import pipelines
from .diffusers import write_diffusers
from .family import Converted, ConvertOptions, origin_of
from .lora_export import write_lora
from .pipeline_export import write_pipeline
from .reading import Found, read
from .recognise import FAMILIES, complete, convert, family_of, provenance
from ..errors import ConfigError, ModelError, nearest
from ..system.files import remove_leftovers, replacing
from ..report.model_card import model_card
from ..models.build import build_model
from ..models.config import ModelConfig
from ..models.files import check_state, find_model, read_config, save_model
from ..models.lora_files import lora_file, read_lora
from ..networks.empty import without_weights
from ..report.push import CONVERTED
from ..system.tensor_files import save_torch

TARGETS = ("mmgen", "diffusers", "pt")
PRECISIONS = ("fp32", "fp16")


@dataclass(frozen=True)
class Written:
    """What `convert_file` did."""

    out: Path
    card: Path | None  # the model card, of mmgen's own file
    family: str
    config: ModelConfig
    used: int  # tensors of the original that are in the file
    left_out: dict[str, str]  # the others -> the reason
    assumed: tuple[str, ...]  # facts that neither the file nor an option says
    sampled: tuple[str, ...]  # where sampling follows the original's way


def convert_file(
    path: str | os.PathLike,
    out: str | os.PathLike,
    options: ConvertOptions = ConvertOptions(),
    *,
    to: str = "mmgen",
    weights: str = "ema",
    overwrite: bool = False,
    lora_only: bool = False,
) -> Written:
    """Converts a file, folder or hub repository of any family, or a model of mmgen's own, and writes it atomically.

    `to`: "mmgen" for one .safetensors with everything in its header, and a model card beside it; "diffusers" for a folder that
    diffusers loads; "pt" for a plain state dict under the original names, bit for bit. `lora_only`, to diffusers: of a student by
    LoRA the adapter alone, from the file beside its model.

    Raises ConfigError for an impossible option, ModelError for a file that cannot be read or understood, MmgenError where `out`
    cannot be written.
    """
    out = Path(out)
    if to not in TARGETS:
        raise ConfigError(f"unknown target {to!r}: {nearest(to, TARGETS)}")
    if options.precision not in (None, *PRECISIONS):
        raise ConfigError(f"unknown precision {options.precision!r}: {nearest(options.precision, PRECISIONS)}")
    suffix = {"mmgen": ".safetensors", "pt": ".pt", "diffusers": ""}[to]
    if (out.suffix if to != "diffusers" else "") != suffix:
        raise ConfigError(f"{out} must end in {suffix} for --to {to}")
    if out.exists() and not overwrite:
        raise ConfigError(f"{out} exists: choose another name, or replace it with --overwrite")
    if lora_only:
        return _adapter(path, out, to)
    found = read(path, weights=weights)
    converted = _own(found, to) if family_of(found) == "mmgen" else _checked(found, complete(convert(found, options)), weights)
    for written in (out, out.with_suffix(".md")):
        remove_leftovers(written.parent, written.name)
    if to == "mmgen":
        card = out.with_suffix(".md")
        with replacing(card) as temporary:  # first: once the model is there, all is, and the command need not be given again
            temporary.write_text(model_card(converted.config, converted.config.training[CONVERTED]))
        save_model(out, converted.config, converted.state)
        return _written(out, card, converted, found)
    if to == "pt":
        state = FAMILIES[converted.family].module.original_state(converted.config, converted.state)
        with replacing(out) as temporary:
            save_torch(state, temporary)
        return _written(out, None, converted, found)
    if converted.family == pipelines.NAME:
        write_pipeline(converted.config, converted.state, out)
    else:
        write_diffusers(converted.config, converted.state, out)
    return _written(out, None, converted, found)


def _adapter(path: str | os.PathLike, out: Path, to: str) -> Written:
    if to != "diffusers":
        raise ConfigError("--lora-only is for --to diffusers: add that, or leave it out")
    model = find_model(path)
    file = lora_file(model)
    if not file.is_file():
        raise ModelError(f"there is no {file.name} beside {model}: only the averages that a distillation with --lora writes have one")
    config, state = read_lora(file)
    write_lora(config, state, out)
    return Written(out, None, pipelines.NAME, config, len(state), {}, (), ())


def _checked(found: Found, converted: Converted, weights: str) -> Converted:
    """With its provenance. Raises ModelError unless the tensors are exactly those of the network that the config describes."""
    with without_weights():
        network = build_model(converted.config).network
    check_state(network.state_dict(), converted.state, str(found.path))
    origin = provenance(found, converted, weights)
    config = replace(converted.config, training={**converted.config.training, CONVERTED: origin})
    return replace(converted, config=config, left_out=origin["left_out"])


def _own(found: Found, to: str) -> Converted:
    """A model of mmgen's own, to be written in another form."""
    if to == "mmgen":
        raise ConfigError(
            f"{found.path} is a model of mmgen's already: give --to diffusers or --to pt, or sample from it as it is"
        )
    config = read_config(found.path)
    if config.text is not None and not config.text.pipeline:
        raise ConfigError(f"{found.path} takes text by layers of mmgen's own, which no other project's network has: sample from it as it is")
    if config.denoiser is not None and config.denoiser.told_guidance:
        raise ConfigError(f"{found.path} is told its guidance by layers of mmgen's own, which no other project's network has: sample from it as it is")
    return Converted(config, found.tensors, {}, _family(config, to, found.path))


def _family(config: ModelConfig, to: str, path: Path) -> str:
    """The family whose names a model of mmgen's has: that of what it was converted from, also through its teacher."""
    if config.flow is not None:
        return "imm"
    if config.network.kind == "diffusers_text":
        return pipelines.NAME
    if config.network.kind == "diffusers_unet2d":
        return "diffusers-unet2d"
    family = origin_of(config)
    if to == "diffusers" and (family not in FAMILIES or family == "mmgen"):
        return "diffusers-dit"  # what of it cannot be written is said where it is written
    if family not in FAMILIES or family == "mmgen":
        raise ModelError(
            f"{path} was not converted from another project's file, so that it has no original names: --to pt is for those that were"
        )
    return family


def _written(out: Path, card: Path | None, converted: Converted, found: Found) -> Written:
    used = len(found.tensors.keys() - converted.left_out.keys())
    return Written(out, card, converted.family, converted.config, used, converted.left_out, converted.assumed, converted.sampled)
