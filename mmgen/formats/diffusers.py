"""Folders of diffusers: UNet2DModel and DiTTransformer2DModel, read and written.

A pipeline's folder has the network in unet/ or transformer/ and the scheduler in scheduler/; a model's folder has both files
in one place. What is written is a pipeline's folder:

model_index.json                                  which classes: DDPMPipeline, ConsistencyModelPipeline or DiTPipeline
unet/ or transformer/   config.json, diffusion_pytorch_model.safetensors
scheduler/              scheduler_config.json

A DiTPipeline needs an autoencoder besides: DiTPipeline.from_pretrained(FOLDER, vae=AutoencoderKL.from_pretrained(...)).
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import ConfigError, ModelError
from ..system.files import replacing_folder
from ..models.config import ModelConfig
from ..networks.diffusers_unet import DiffusersUNet, DiffusersUNetSettings
from ..networks.empty import without_weights
from ..networks.dit import DiTSettings
from ..system.tensor_files import save_tensors
from . import diffusers_dit
from .diffusers_scheduler import read_sampling, read_scheduler, write_scheduler
from .family import Converted, ConvertOptions, instead
from .mapping import assign, cast
from .reading import Found

WEIGHTS = "diffusion_pytorch_model.safetensors"
_VERSION = "0.31.0"  # of diffusers, the oldest that mmgen is used with
_PREFIX = "unet."
_OF_AVERAGES = (  # what diffusers' EMAModel adds to the config of the network that it averages
    "decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power",
)  # fmt: skip
_OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}  # of attention before diffusers 0.17
_OLD_KEY = re.compile(r".*\battentions\.\d+\.(query|key|value|proj_attn)\.\w+")
_NEW_KEY = re.compile(r"(.*\battentions\.\d+\.)(to_q|to_k|to_v|to_out\.0)(\.\w+)")


def family(found: Found) -> str | None:
    """A folder of diffusers, or the weights out of one, which are then refused for want of a config."""
    keys = found.tensors.keys()
    unet = "time_embedding.linear_1.weight" in keys and any(key.startswith("down_blocks.") for key in keys)
    dit = "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1.weight" in keys
    config = found.arguments.get("config")
    config = config if isinstance(config, dict) else {}
    if not ("_class_name" in config or unet or dit):
        return None
    transformer = any(key.startswith("transformer_blocks.") for key in keys)
    return "diffusers-dit" if "Transformer2D" in str(config.get("_class_name", "")) or transformer else "diffusers-unet2d"


def convert(found: Found, options: ConvertOptions) -> Converted:
    """A UNet2DModel or a DiT with its scheduler as a denoiser. Raises ModelError for other classes and for missing parts."""
    config = found.arguments.get("config") or {}
    kind = config.get("_class_name")
    if kind is None:
        raise ModelError(
            f"{found.path} holds weights of diffusers without config.json: give the folder with config.json and "
            "scheduler_config.json, not the file"
        )
    if diffusers_dit.is_dit(config):
        return diffusers_dit.convert(found, options)
    if kind != "UNet2DModel":
        raise ModelError(
            f"{found.path} is a {kind} of diffusers; mmgen reads UNet2DModel and DiTTransformer2DModel, which need no text"
        )
    if options.type is not None:
        raise ConfigError(f"{found.path} is a UNet2DModel, which --type says nothing about: leave it out")
    return _convert_unet(found, config, options)


def _convert_unet(found: Found, config: dict[str, Any], options: ConvertOptions) -> Converted:
    name = str(found.path)
    channels, outputs = config.get("in_channels", 3), config.get("out_channels", 3)
    if outputs not in (channels, 2 * channels):
        raise ModelError(f"{name} has {channels} channels in and {outputs} out: only as many or twice as many are supported")
    if config.get("class_embed_type") is not None:
        raise ModelError(f"{name} has class_embed_type = {config['class_embed_type']!r}: only classes by number are supported")
    old = any(_OLD_KEY.fullmatch(key) for key in found.tensors)
    plain = {key: value for key, value in config.items() if not key.startswith("_") and key not in _OF_AVERAGES}
    settings = DiffusersUNetSettings(config=json.dumps(plain, sort_keys=True), old_attention_names=old)
    classes = config.get("num_class_embeds") or 0
    denoiser = read_scheduler(found.arguments.get("scheduler"), name)
    sampling, note = read_sampling(found.arguments["scheduler"])
    result = ModelConfig(settings, None, _resolution(config, name), channels, classes, denoiser=denoiser, sampling=sampling)
    layers = config.get("layers_per_block", 2)
    if not isinstance(layers, int) or layers > len(found.tensors):  # nor would building them ever end
        raise ModelError(f"{name} has layers_per_block = {layers!r} in config.json, and not so many tensors")
    with without_weights():  # what diffusers has to say of the architecture, or that it is not installed
        DiffusersUNet(settings, result.resolution, channels, classes)
    state = assign(found, result, lambda key: _original_name(result, key))
    notes = [note] if note else []
    if denoiser.clip:
        notes.append("ddim clips x_hat and keeps the network's noise, as diffusers does")
    return Converted(result, cast(state, options.precision), {}, "diffusers-unet2d", sampled=tuple(notes))


def _original_name(config: ModelConfig, key: str) -> str:
    key = key.removeprefix(_PREFIX)
    match = _NEW_KEY.fullmatch(key) if config.network.old_attention_names else None
    return match[1] + _OLD_NAMES[match[2]] + match[3] if match else key


def _resolution(config: dict[str, Any], name: str) -> int:
    size = config.get("sample_size")
    sides = set(size) if isinstance(size, list | tuple) else {size}
    if len(sides) != 1 or not isinstance(side := sides.pop(), int):
        raise ModelError(f"{name} has sample_size = {size!r} in config.json: set it to the side of its square images")
    return side


def original_state(config: ModelConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under diffusers' names (the old ones if they were found so), the very same ones."""
    if isinstance(config.network, DiTSettings):
        return diffusers_dit.original_state(config, state)
    return {_original_name(config, key): value for key, value in state.items()}


@dataclass(frozen=True)
class Pipeline:
    """What a pipeline's folder holds: each part's JSON, and the tensors of the network."""

    name: str | None  # of the pipeline's class; None where diffusers has none
    part: str  # of the network: "unet" or "transformer"
    parts: dict[str, dict[str, Any]]  # the network and the scheduler
    tensors: dict[str, Tensor]


def pipeline_of(config: ModelConfig, state: dict[str, Tensor]) -> Pipeline:
    """A model as diffusers has it. Raises ConfigError where diffusers has no class for the network, the times or the sampler."""
    if isinstance(config.network, DiffusersUNetSettings):
        network = {"_class_name": "UNet2DModel", **json.loads(config.network.config)}
        tensors = {key.removeprefix(_PREFIX): value for key, value in state.items()}
        learned = network.get("out_channels", 3) == 2 * config.channels
        if learned and config.sampling.student_steps is not None:  # distillation did not train the variance, and leaves it out
            network["out_channels"], learned = config.channels, False
            tensors |= {key: tensors[key][: config.channels] for key in ("conv_out.weight", "conv_out.bias")}
        scheduler = write_scheduler(config.denoiser, config.sampling, "DDPMScheduler", learned)
        pipelines = {"DDPMScheduler": "DDPMPipeline", "CMStochasticIterativeScheduler": "ConsistencyModelPipeline"}
        return Pipeline(pipelines.get(scheduler["_class_name"]), "unet", {"unet": network, "scheduler": scheduler}, tensors)
    if isinstance(config.network, DiTSettings):
        network, scheduler = diffusers_dit.for_writing(config, state)
        tensors = diffusers_dit.original_state(config, state)
        return Pipeline("DiTPipeline", "transformer", {"transformer": network, "scheduler": scheduler}, tensors)
    raise ConfigError(
        f"this model cannot be written for diffusers: {_why_not(config.network.kind)}; {instead(config)}"
    )


def write_diffusers(config: ModelConfig, state: dict[str, Tensor], folder: str | os.PathLike) -> None:
    """Writes a pipeline's folder, atomically. UNet2DModel.from_pretrained(FOLDER, subfolder="unet") and likewise
    DiTTransformer2DModel with subfolder="transformer" give what the model gives here.

    Raises ConfigError as `pipeline_of`, before anything is written.
    """
    pipeline = pipeline_of(config, state)
    index = {"_class_name": pipeline.name, "_diffusers_version": _VERSION}
    index |= {name: ["diffusers", content["_class_name"]] for name, content in pipeline.parts.items()}
    if pipeline.name == "DiTPipeline":
        index["vae"] = ["diffusers", "AutoencoderKL"]
        index |= {"id2label": {str(i): name for i, name in enumerate(config.class_names)}} if config.class_names else {}
    with replacing_folder(folder) as temporary:
        if pipeline.name:
            _write_json(temporary / "model_index.json", index)
        for name, file in ((pipeline.part, "config.json"), ("scheduler", "scheduler_config.json")):
            _write_json(temporary / name / file, {**pipeline.parts[name], "_diffusers_version": _VERSION})
        _write_tensors(temporary / pipeline.part / WEIGHTS, pipeline.tensors)


def _why_not(kind: str) -> str:
    reasons = {
        "unet": "in EDM's U-Net and IMM's, residual sums are scaled by sqrt(1/2) and the blocks themselves change the "
        "resolution, which no block of diffusers' UNet2DModel does alike",
        "adm": "ADM's U-Net has its labels and its attention heads arranged otherwise than diffusers' UNet2DModel",
        "edm2": "EDM2's U-Net preserves magnitudes, with normalised weights, and diffusers has no class for it",
    }
    return reasons.get(kind, f"diffusers has no class for the network {kind!r}")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    # Copies of one tensor are stored as often as diffusers has them
    separate = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    save_tensors(separate, path, metadata={"format": "pt"})
