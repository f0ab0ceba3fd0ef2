"""DiTTransformer2DModel of diffusers: key names, and where its network differs from DiT's own.

diffusers                                            ours
pos_embed.proj                                       patch_embed
transformer_blocks.N.attn1.to_q, to_k, to_v          blocks.N.qkv, one above the other
transformer_blocks.N.attn1.to_out.0                  blocks.N.proj
transformer_blocks.N.ff.net.0.proj, ff.net.2         blocks.N.fc1, blocks.N.fc2
transformer_blocks.N.norm1.linear                    blocks.N.modulation
transformer_blocks.N.norm1.emb.timestep_embedder...  time_mlp.linear0, .linear1; a copy in every block
transformer_blocks.N.norm1.emb.class_embedder...     label_embed; a copy in every block
proj_out_1, proj_out_2                               out_modulation, out
(computed)                                           position

diffusers spaces the 128 frequencies of the time embedding so that the last is 1/10000, DiT so that the 129th would be; and its
layer norm before the MLP has the epsilon 1e-5 where DiT has 1e-6. facebook/DiT-XL-2-256 holds DiT's own weights, trained with
the latter. By default a folder is read as what diffusers computes; `--type dit` reads it as DiT's own network.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, ModelError
from ..models.config import ModelConfig
from ..networks.dit import EPSILON, DiTSettings, grid_embedding
from .diffusers_scheduler import read_sampling, read_scheduler, write_scheduler
from .dit import VAE_ASSUMED, published_latents
from .family import Converted, ConvertOptions, instead
from .mapping import cast, expected_state
from .reading import Found

LARGEST = 128  # patches along a side: four times those of the largest DiT that was published
_EQUAL = "the same as in the first block, where it is kept"
_REQUIRED = {  # of config.json: nothing else is DiT
    "norm_type": "ada_norm_zero",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
    "upcast_attention": False,
}
_DEFAULTS = {"norm_type": "ada_norm_zero", "activation_fn": "gelu-approximate", "attention_bias": True}


def is_dit(config: dict[str, Any]) -> bool:
    """DiTTransformer2DModel, or the Transformer2DModel that it was before diffusers 0.29."""
    kind = config.get("_class_name")
    return kind == "DiTTransformer2DModel" or (kind == "Transformer2DModel" and config.get("norm_type") == "ada_norm_zero")


def _modules(depth: int) -> dict[str, str]:
    """Our module -> diffusers', of those that correspond one to one."""
    modules = {"patch_embed": "pos_embed.proj", "out_modulation": "proj_out_1", "out": "proj_out_2"}
    parts = {"proj": "attn1.to_out.0", "fc1": "ff.net.0.proj", "fc2": "ff.net.2", "modulation": "norm1.linear"}
    return modules | {f"blocks.{i}.{a}": f"transformer_blocks.{i}.{b}" for i in range(depth) for a, b in parts.items()}


def _embedders(block: int) -> dict[str, str]:
    prefix = f"transformer_blocks.{block}.norm1.emb"
    return {
        "time_mlp.linear0.weight": f"{prefix}.timestep_embedder.linear_1.weight",
        "time_mlp.linear0.bias": f"{prefix}.timestep_embedder.linear_1.bias",
        "time_mlp.linear1.weight": f"{prefix}.timestep_embedder.linear_2.weight",
        "time_mlp.linear1.bias": f"{prefix}.timestep_embedder.linear_2.bias",
        "label_embed.weight": f"{prefix}.class_embedder.embedding_table.weight",
    }


def convert(found: Found, options: ConvertOptions) -> Converted:
    """A DiTPipeline's transformer as a denoiser on latents. Raises ModelError for what is no DiT."""
    config, name = found.arguments["config"], str(found.path)
    if options.type not in (None, "dit"):
        raise ConfigError(f"{name} is a DiT of diffusers, not of type {options.type}: leave out --type")
    settings, resolution, channels, classes = _architecture(config, name, original=options.type == "dit")
    if settings.depth > len(found.tensors) or resolution > LARGEST * settings.patch_size:  # before anything is made of that size
        raise ModelError(
            f"{name} has {settings.depth} layers and the sample_size {resolution} by config.json: no DiT is so large"
        )
    state, left_out = _from_diffusers(found, settings)
    if "position" not in state:
        position = grid_embedding(settings.hidden_size, resolution // settings.patch_size)
        state["position"] = position.to(state["patch_embed.weight"].dtype)
    names = found.arguments.get("model_index", {}).get("id2label")
    denoiser = read_scheduler(found.arguments.get("scheduler"), name)
    sampling, note = read_sampling(found.arguments["scheduler"])
    result = ModelConfig(
        settings, None, resolution, channels, classes,
        denoiser=denoiser,
        sampling=sampling,
        null_trained=True,  # diffusers hides a tenth of the labels in training
        latents=published_latents(resolution) if channels == 4 else None,
        class_names=[names[str(i)] for i in range(classes)] if names and len(names) == classes else None,
    )  # fmt: skip
    for key, expected in expected_state(result).items():
        if state[key].shape != expected.shape:
            shapes = list(state[key].shape), list(expected.shape)
            raise ModelError(f"{name}: what is {key} here has the shape {shapes[0]}, by config.json {shapes[1]}")
    assumed = [VAE_ASSUMED] if channels == 4 else []
    sampled = (note,) if note else ()
    return Converted(result, cast(state, options.precision), left_out, "diffusers-dit", tuple(assumed), sampled)


def _architecture(config: dict[str, Any], name: str, original: bool) -> tuple[DiTSettings, int, int, int]:
    for key, required in _REQUIRED.items():
        value = config.get(key, _DEFAULTS.get(key, False))
        if value != required:
            raise ModelError(f"{name} has {key} = {value!r}; the only transformer of diffusers that is DiT has {required!r}")
    heads, head_dim = config.get("num_attention_heads", 16), config.get("attention_head_dim", 72)
    channels = config.get("in_channels", 4)
    outputs = config.get("out_channels") or channels
    if outputs not in (channels, 2 * channels):
        raise ModelError(f"{name} has {channels} channels in and {outputs} out: only as many or twice as many are supported")
    settings = DiTSettings(
        hidden_size=heads * head_dim,
        depth=config.get("num_layers", 28),
        num_heads=heads,
        patch_size=config.get("patch_size", 2),
        learn_sigma=outputs == 2 * channels,
        time_endpoint=not original,
        mlp_epsilon=EPSILON if original else float(config.get("norm_eps", 1e-5)),
    )
    return settings, config.get("sample_size", 32), channels, config.get("num_embeds_ada_norm", 1000)


def _from_diffusers(found: Found, settings: DiTSettings) -> tuple[dict[str, Tensor], dict[str, str]]:
    remaining, state, left_out = dict(found.tensors), {}, {}

    def take(key: str) -> Tensor:
        if key not in remaining:
            raise ModelError(f"{found.path} is a DiT of diffusers, but lacks {key}")
        return remaining.pop(key)

    for ours, theirs in _modules(settings.depth).items():
        for kind in ("weight", "bias"):
            state[f"{ours}.{kind}"] = take(f"{theirs}.{kind}")
    for i in range(settings.depth):
        for kind in ("weight", "bias"):
            parts = [take(f"transformer_blocks.{i}.attn1.to_{part}.{kind}") for part in "qkv"]
            state[f"blocks.{i}.qkv.{kind}"] = torch.cat(parts)
        for ours, theirs in _embedders(i).items():
            tensor = take(theirs)
            if i == 0:
                state[ours] = tensor
            elif torch.equal(tensor, state[ours]):
                left_out[theirs] = _EQUAL
            else:
                raise ModelError(
                    f"{found.path}: {theirs} differs from the first block's; DiT has one embedding for all blocks, so that this "
                    "network, trained further in diffusers, is not one"
                )
    if "pos_embed.pos_embed" in remaining:  # stored by old versions of diffusers
        state["position"] = take("pos_embed.pos_embed")
    if remaining:
        raise ModelError(f"{found.path} is a DiT of diffusers, but has {sorted(remaining)[0]}, which is no part of one")
    return state, left_out


def original_state(config: ModelConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under diffusers' names, bit for bit; the position is not among them, as diffusers computes it."""
    depth = config.network.depth
    result = {f"{b}.{kind}": state[f"{a}.{kind}"] for a, b in _modules(depth).items() for kind in ("weight", "bias")}
    for i in range(depth):
        for kind in ("weight", "bias"):
            for part, tensor in zip("qkv", state[f"blocks.{i}.qkv.{kind}"].chunk(3), strict=True):
                result[f"transformer_blocks.{i}.attn1.to_{part}.{kind}"] = tensor
        result |= {theirs: state[ours] for ours, theirs in _embedders(i).items()}
    return result


def for_writing(config: ModelConfig, state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and scheduler_config.json of a DiT. Raises ConfigError where diffusers would compute something else."""
    settings, denoiser = config.network, config.denoiser
    reason = None
    if config.flow is not None or denoiser is None:
        reason = "it is a flow map with a second time, and DiTTransformer2DModel has one time"
    elif denoiser.precondition not in ("discrete", "flow"):
        reason = "it has no timesteps, and diffusers' pipeline samples a DiTTransformer2DModel by timesteps"
    elif denoiser.precondition == "flow":
        reason = "it is trained on SiT's path, and diffusers has no pipeline that samples a DiTTransformer2DModel on it"
    elif config.num_classes == 0:
        reason = "it is unconditional, and DiTTransformer2DModel always has classes"
    elif not settings.null_class:
        reason = "it has no null class, and DiTTransformer2DModel always has one"
    elif not settings.time_endpoint:
        reason = (
            "diffusers' DiTTransformer2DModel spaces the frequencies of the time embedding by 10000^(1/127) instead of DiT's "
            "10000^(1/128), so that the same weights would give another output there"
        )
    elif settings.mlp_ratio != 4:
        reason = f"its MLPs are {settings.mlp_ratio:g} times as wide as the rest, in DiTTransformer2DModel always 4 times"
    else:
        computed = grid_embedding(settings.hidden_size, config.resolution // settings.patch_size).to(state["position"].device)
        if not torch.allclose(state["position"].float(), computed.float(), rtol=0, atol=1e-3):
            reason = "its position embedding is not the one that DiTTransformer2DModel computes"
    if reason:
        raise ConfigError(f"this model cannot be written for diffusers: {reason}; {instead(config)}")
    network = {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": settings.num_heads,
        "attention_head_dim": settings.hidden_size // settings.num_heads,
        "in_channels": config.channels,
        "out_channels": config.channels * (2 if settings.learn_sigma else 1),
        "num_layers": settings.depth,
        "sample_size": config.resolution,
        "patch_size": settings.patch_size,
        "num_embeds_ada_norm": config.num_classes,
        "norm_eps": settings.mlp_epsilon,
        **_REQUIRED,
    }
    return network, write_scheduler(denoiser, config.sampling, "DDIMScheduler")
