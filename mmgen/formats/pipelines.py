"""Text-to-image pipelines of diffusers, a folder or a repository of the hub, as denoisers of latents.

The network and the scheduler are read here; texts are encoded and latents decoded by the pipeline's own parts, where they are.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..encoders.pipeline_text import LENGTHS, text_sha256
from ..encoders.pipeline_vae import pipeline_latents, vae_factor
from ..encoders.text import null_of
from ..errors import ConfigError, ModelError, nearest, shortened
from ..models.config import ModelConfig, SamplingSettings
from ..models.denoiser import DenoiserSettings
from ..models.files import check_state
from ..networks.diffusers_text import DiffusersTextSettings
from ..networks.text import TextSettings
from ..system.files import read_json
from .diffusers_scheduler import is_flow, read_flow, read_sampling, read_scheduler
from .family import Converted, ConvertOptions
from .mapping import cast, expected_state
from .reading import Found

NAME = "diffusers-text"
PREFIX = "model."  # of the network's tensors among ours; the others are its null
_CACHED = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/[0-9a-f]+")  # a repository in the hub's cache


class Kind(NamedTuple):
    """What a class of pipelines has."""

    network: str  # its class
    part: str  # its folder
    guidance: float  # of the pipeline's call, unless it is told another


PIPELINES = {
    "StableDiffusionPipeline": Kind("UNet2DConditionModel", "unet", 7.5),
    "StableDiffusionXLPipeline": Kind("UNet2DConditionModel", "unet", 5.0),
    "PixArtAlphaPipeline": Kind("PixArtTransformer2DModel", "transformer", 4.5),
    "PixArtSigmaPipeline": Kind("PixArtTransformer2DModel", "transformer", 4.5),
    "StableDiffusion3Pipeline": Kind("SD3Transformer2DModel", "transformer", 7.0),
    "SanaPipeline": Kind("SanaTransformer2DModel", "transformer", 4.5),
}
_NETWORKS = {kind.network for kind in PIPELINES.values()}
_WIDTHS = {
    "UNet2DConditionModel": "cross_attention_dim",
    "PixArtTransformer2DModel": "caption_channels",
    "SD3Transformer2DModel": "joint_attention_dim",
    "SanaTransformer2DModel": "caption_channels",
}


def family(found: Found) -> str | None:
    """A pipeline that encodes texts, of whatever class, or the network of one."""
    index, config = found.arguments.get("model_index"), found.arguments.get("config")
    if isinstance(index, dict) and any(str(key).startswith("text_encoder") for key in index):
        return NAME
    name = config.get("_class_name") if isinstance(config, dict) else None
    return NAME if name in _NETWORKS or str(name).startswith("Flux") else None


def convert(found: Found, options: ConvertOptions) -> Converted:
    """A pipeline as a denoiser, its null not yet encoded: see `with_null`. Raises ModelError, with one sentence, for other classes and
    for missing parts."""
    source, config = source_of(found.path), found.arguments.get("config") or {}
    name, kind = _class_of(found, config, source)
    if options.type is not None:
        raise ConfigError(f"{source} is a {name}, which --type says nothing about: leave it out")
    _check_network(config, kind, source)
    denoiser, sampling, notes = _process(found.arguments.get("scheduler"), source)
    side, channels = _whole(config, "sample_size", source, 2**14), _whole(config, "in_channels", source, 2**12)
    resolution = side * vae_factor(found.path, source)
    latents = pipeline_latents(found.path, source, resolution)
    if len(latents.mean) != channels:
        raise ModelError(f"{source}: its network has {channels} channels and its autoencoder {len(latents.mean)}: they are of different pipelines")
    plain = {key: value for key, value in config.items() if not key.startswith("_")}
    network = DiffusersTextSettings(model=kind.network, config=json.dumps(plain, sort_keys=True), image_resolution=resolution)
    try:
        network.check(side)
    except ConfigError as error:
        raise ModelError(f"{source}: {error}") from error
    result = ModelConfig(
        network, None, side, channels, text=text_settings(found, config, name, source), null_trained=True, denoiser=denoiser,
        latents=latents, sampling=SamplingSettings(grid=sampling.grid, schedule=sampling.schedule, guidance=kind.guidance),
    )  # fmt: skip
    expected = expected_state(result)
    check_state({key.removeprefix(PREFIX): value for key, value in expected.items() if key.startswith(PREFIX)}, found.tensors, source)
    state = {PREFIX + key: value for key, value in found.tensors.items()}
    null = {key: torch.zeros(value.shape, dtype=value.dtype) for key, value in expected.items() if key not in state}
    notes.append(f"guidance is {kind.guidance:g} unless --guidance says otherwise, as in the pipeline's own call")
    return Converted(result, cast(state, options.precision) | null, {}, NAME, sampled=tuple(notes))


def with_null(converted: Converted) -> Converted:
    """With the null as the pipeline's encoders make it, so that a model file is complete without them."""
    null = null_of(converted.config.text)
    found = {"null_tokens": null.tokens, "null_mask": null.mask} | ({} if null.pooled is None else {"null_pooled": null.pooled})
    return replace(converted, state={**converted.state, **found})


def original_state(config: ModelConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The network's tensors under diffusers' names; its null is the encoders' and no part of them."""
    return {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}


def source_of(folder: Path) -> str:
    """How a pipeline is called whatever the place: its repository, where it lies in the hub's cache, or its absolute path."""
    match = _CACHED.search(folder.absolute().as_posix())
    return f"{match[1]}/{match[2]}" if match else str(folder.absolute())


def text_settings(found: Found, config: dict[str, Any], name: str, source: str) -> TextSettings:
    """How the pipeline encodes texts, by its files, without loading an encoder."""
    length = LENGTHS.get(name, 0)
    if name in ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline"):
        length += _clip_length(found.path, source, "tokenizer_2" if name == "StableDiffusionXLPipeline" else "tokenizer")
    pooled = config.get("pooled_projection_dim", 2048) if name == "StableDiffusion3Pipeline" else 0
    if config.get("addition_embed_type") == "text_time":
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    width = _whole(config, _WIDTHS[PIPELINES[name].network], source, 2**17)
    sizes = {"length": length, "width": width, "pooled": pooled, "depth": 0}
    return TextSettings(encoder=source, **sizes, sha256=text_sha256(found.path), pipeline=name)


def _class_of(found: Found, config: dict[str, Any], source: str) -> tuple[str, Kind]:
    index = found.arguments.get("model_index")
    given = config.get("_class_name")
    if str(given).startswith("Flux") or (index or {}).get("_class_name", "").startswith("Flux"):
        raise ModelError(
            f"{source} is a Flux model, whose guidance was distilled into its network: what that gives is no mean of images, and there is "
            "no null to guide away from, so that it cannot be a teacher"
        )
    if not index:
        raise ModelError(
            f"{source} is the {given} of a pipeline alone: give the folder of the whole pipeline, whose text encoders and autoencoder it needs"
        )
    name = str(index.get("_class_name"))
    if name not in PIPELINES:
        raise ModelError(f"{source} is a {shortened(name)} of diffusers: {nearest(name, PIPELINES)}")
    kind = PIPELINES[name]
    if given != kind.network:
        raise ModelError(f"the {kind.part} of {source} is a {shortened(given)}, and a {name} has a {kind.network}")
    for part, value in index.items():
        wanted = str(part).startswith(("text_encoder", "tokenizer")) and isinstance(value, list) and value[0] is not None
        if wanted and not (found.path / part).is_dir():
            raise ModelError(f"{source} has no folder {part}, which its model_index.json names: fetch the whole pipeline")
    if not any((found.path / part).is_dir() for part in ("text_encoder", "text_encoder_2")):
        raise ModelError(f"{source} has no text_encoder, without which no text can be encoded: fetch the whole pipeline")
    return name, kind


def _check_network(config: dict[str, Any], kind: Kind, source: str) -> None:
    """Raises ModelError for a network that is conditioned on more than text, or on guidance."""
    told = "time_cond_proj_dim" if config.get("time_cond_proj_dim") else "guidance_embeds" if config.get("guidance_embeds") else None
    if told is not None:
        raise ModelError(f"the {kind.network} of {source} is told its guidance ({told}): it is a distilled model, which gives no means of images")
    for key in ("class_embed_type", "encoder_hid_dim_type", "num_class_embeds"):
        if config.get(key):
            raise ModelError(f"the {kind.network} of {source} has {key} = {config[key]!r}: only networks of text alone are read")
    if config.get("addition_embed_type") not in (None, "text_time"):
        raise ModelError(f"the {kind.network} of {source} has addition_embed_type = {config['addition_embed_type']!r}: only text_time is read")
    channels = config.get("in_channels", 4)
    if (outputs := config.get("out_channels") or channels) not in (channels, 2 * channels):
        raise ModelError(f"{source} has {channels} channels in and {outputs} out: only as many or twice as many are supported")


def _process(scheduler: dict[str, Any] | None, source: str) -> tuple[DenoiserSettings, SamplingSettings, list[str]]:
    if is_flow(scheduler):
        denoiser, sampling = read_flow(scheduler, source)
        shift = sampling.schedule.shift
        return denoiser, sampling, [f"times are spaced and shifted (by {shift:g}) as the scheduler has them (--grid {sampling.grid})"]
    denoiser = read_scheduler(scheduler, source)
    sampling, note = read_sampling(scheduler)
    return denoiser, sampling, [note] if note else []


def _whole(config: dict[str, Any], key: str, source: str, most: int) -> int:
    """A setting of the network that must be a whole number. Raises ModelError."""
    value = config.get(key)
    if type(value) is not int or not 0 < value <= most:
        raise ModelError(f"{source} has {key} = {shortened(value)} in the config.json of its network: a whole number is needed")
    return value


def _clip_length(folder: Path, source: str, part: str) -> int:
    try:
        length = read_json(folder / part / "tokenizer_config.json").get("model_max_length", 77)
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{source} has no {part}/tokenizer_config.json that can be read: fetch the whole pipeline") from error
    if type(length) is not int or not 1 < length <= 4096:
        raise ModelError(f"{source} has model_max_length = {shortened(length)} in {part}/tokenizer_config.json, which no CLIP has")
    return length
