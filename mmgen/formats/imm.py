"""The official IMM pickles (Zhou et al., arXiv:2503.07565): key names of their networks, and of EDM's which they extend,
against ours; and what their constructor arguments mean.

official                              ours                        note
model.map_layer0 / map_layer1         time_mlp.linear0 / .linear1
model.map_layer0_s / map_layer1_s     second_time_mlp....         absent in EDM's own networks
model.map_label, map_augment          label_embed, augment_embed
model.map_noise.freqs                 frequencies                 Fourier embedding only
model.enc.X, model.dec.X              encoder.X, decoder.X        blocks have the same names
model.enc.X_aux_residual.weight       encoder.X_aux_residual.conv.weight
model.dec.RxR_aux_norm / aux_conv     out_norm / out_conv
*.resample_filter                     (checked, not kept)         a constant of the architecture
model.t_embedder.mlp.0 / .2           time_mlp.linear0 / .linear1 DiT from here on
model.s_embedder.mlp.0 / .2           second_time_mlp....
model.x_embedder.proj                 patch_embed
model.y_embedder.embedding_table      label_embed
model.pos_embed                       position
model.blocks.N.attn.qkv / .proj       blocks.N.qkv / .proj
model.blocks.N.mlp.fc1 / .fc2         blocks.N.fc1 / .fc2
model.blocks.N.adaLN_modulation.1     blocks.N.modulation
model.final_layer.adaLN_modulation.1  out_modulation
model.final_layer.linear              out

The CIFAR-10 model is a DDPM++ with s; the ImageNet-256 models are DiTs on latents, whose autoencoder no file names: it is that of
their published configuration. Arguments that EDM's class does not have, such as `s_embed`, say what the keys say, and are not read.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..errors import ConfigError, ModelError, nearest
from ..diffusion.flow_map import FlowMapSettings
from ..models.latents import LatentSettings
from ..models.config import ModelConfig
from ..networks import DiTSettings
from ..encoders.vae import IMM_MEAN, IMM_STD, IMM_TARGET_STD
from . import edm
from .dit import class_rows
from .family import Converted, ConvertOptions
from .mapping import assign, cast, check_sizes, module
from .reading import Found

# How the published class is made where a file does not say otherwise
_WRAPPER = {
    "label_dim": 0, "noise_schedule": "fm", "sigma_data": 0.5, "f_type": "euler_fm", "T": 0.994, "eps": 0.0,
    "temb_type": "identity", "time_scale": 1000.0,
}  # fmt: skip
_SECOND_TIMES = {"identity": "s", "stride": "t-s"}
_HEADS = {"S": 6, "B": 12, "L": 16, "XL": 16}  # of DiT_S_2 and so on


def family(found: Found) -> str | None:
    """A network with IMM's two times."""
    return "imm" if found.arguments.get("class_name") == "IMMPrecond" or edm.two_times(found) else None


def convert(found: Found, options: ConvertOptions) -> Converted:
    """A flow map from the constructor arguments in the file. Raises ModelError."""
    if found.arguments.get("class_name") != "IMMPrecond":
        raise ModelError(
            f"{found.path} holds a network with two times, but does not say what flow map it was trained as: give the original "
            ".pkl, which does"
        )
    given = {**_WRAPPER, **found.arguments["init_kwargs"]}
    inner = found.arguments.get("modules", {}).get("model", {})
    if "model.x_embedder.proj.weight" in found.tensors:
        network, shape, assumed = _dit(found, inner.get("init_kwargs", {}), given, options)
        null = network.null_class if shape["label_dim"] else None
    elif (inner := module(found, "model"))["class_name"] == "SongUNet":
        named = {key: value for key, value in inner["init_kwargs"].items() if key in edm.SONG_ARGUMENTS}
        network, shape = edm.network_settings(found, {**inner, "init_kwargs": named})
        augment = found.tensors.get("model.map_augment.weight")
        shape["augment_dim"] = 0 if augment is None else augment.shape[1]
        dropout = inner["init_kwargs"].get("label_dropout")
        null = dropout > 0 if isinstance(dropout, int | float) and shape["label_dim"] else None
        assumed = []
    else:
        raise ModelError(f"{found.path} holds a network of class {inner['class_name']!r}; IMM's models have SongUNet or DiT")
    config = ModelConfig(
        network=network, flow=_flow(found, given), resolution=shape["img_resolution"], channels=shape["img_channels"],
        num_classes=shape["label_dim"], augment_dim=shape["augment_dim"],
        latents=published_latents(shape["img_resolution"]) if shape["img_channels"] == 4 else None,
        null_trained=null,
    )  # fmt: skip
    unsaid = [f"{key} {_WRAPPER[key]}" for key in _WRAPPER if key not in found.arguments["init_kwargs"] and key != "label_dim"]
    if unsaid:
        assumed.append(f"{', '.join(unsaid)}: the published defaults")
    if config.latents is not None:
        assumed.append("the autoencoder and the scale of its latents are those of the published models")
    left_out = edm.check_constants(found, config)
    state = assign(found, config, lambda key: original_name(config, key), left_out=left_out)
    return Converted(config, cast(state, options.precision), left_out, "imm", tuple(assumed))


def published_latents(resolution: int) -> LatentSettings:
    """The autoencoder and normalisation of the ImageNet-256 models, of their published configuration: no file says it."""
    return LatentSettings(
        vae="stabilityai/sd-vae-ft-ema", vae_sha256="", mean=IMM_MEAN, std=IMM_STD, target_std=IMM_TARGET_STD,
        resolution=8 * resolution,
    )  # fmt: skip


def original_state(config: ModelConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under the official names, filters included."""
    if config.network.kind == "unet":
        return edm.original_state(config, state)
    return {original_name(config, key): value for key, value in state.items()}


def original_name(config: ModelConfig, key: str) -> str:
    """The official name of one of our keys."""
    return edm.original_name(config, key) if config.network.kind == "unet" else dit_name(key)


def dit_name(key: str) -> str:
    """The official name of one of our DiT's keys."""
    for pattern, replacement in _DIT_NAMES:
        name, count = re.subn("^" + pattern, replacement, key)
        if count:
            return "model." + name
    raise ModelError(f"no tensor of the official DiT corresponds to {key!r}")


_DIT_NAMES = [
    (r"time_mlp\.linear0\.", "t_embedder.mlp.0."),
    (r"time_mlp\.linear1\.", "t_embedder.mlp.2."),
    (r"second_time_mlp\.linear0\.", "s_embedder.mlp.0."),
    (r"second_time_mlp\.linear1\.", "s_embedder.mlp.2."),
    (r"patch_embed\.", "x_embedder.proj."),
    (r"label_embed\.", "y_embedder.embedding_table."),
    (r"position$", "pos_embed"),
    (r"blocks\.(\d+)\.(qkv|proj)\.", r"blocks.\1.attn.\2."),
    (r"blocks\.(\d+)\.(fc1|fc2)\.", r"blocks.\1.mlp.\2."),
    (r"blocks\.(\d+)\.modulation\.", r"blocks.\1.adaLN_modulation.1."),
    (r"out_modulation\.", "final_layer.adaLN_modulation.1."),
    (r"out\.", "final_layer.linear."),
]


def _flow(found: Found, given: dict[str, Any]) -> FlowMapSettings:
    """What the wrapper's arguments make of the network. Raises ModelError naming an unknown value."""
    choices = {"noise_schedule": ["fm", "vp_cosine"], "f_type": ["identity", "simple_edm", "euler_fm"],
               "temb_type": list(_SECOND_TIMES)}  # fmt: skip
    for name, values in choices.items():
        if given[name] not in values:
            raise ModelError(
                f"{found.path}: IMMPrecond was made with {name} = {given[name]!r}: {nearest(str(given[name]), values)}"
            )
    return FlowMapSettings(
        schedule=given["noise_schedule"], parametrization=given["f_type"], second_time=_SECOND_TIMES[given["temb_type"]],
        sigma_data=float(given["sigma_data"]), time_scale=float(given["time_scale"]), t_min=float(given["eps"]),
        t_max=float(given["T"]),
    )  # fmt: skip


def _dit(
    found: Found, own: dict[str, Any], given: dict[str, Any], options: ConvertOptions
) -> tuple[DiTSettings, dict[str, int], list[str]]:
    """Sizes from the tensors, the number of heads from the arguments or the name of the size, such as DiT_XL_2; what is assumed."""
    patches, table = (
        found.tensors.get("model.x_embedder.proj.weight"),
        found.tensors.get("model.y_embedder.embedding_table.weight"),
    )
    if patches is None or patches.ndim != 4:
        raise ModelError(f"{found.path} lacks model.x_embedder.proj.weight, the embedding of patches of a DiT")
    hidden, channels, patch, _ = patches.shape
    size = re.match(r"DiT_(S|B|L|XL)_\d+$", str(given.get("model_type", "")))
    said = own.get("num_heads") or (_HEADS[size[1]] if size else None)
    if said and options.heads not in (None, said):
        raise ConfigError(
            f"{found.path} says itself that its DiT has {said} attention heads, not {options.heads}: leave out --heads"
        )
    heads = said or options.heads
    if heads is None:
        raise ConfigError(f"{found.path} does not say how many attention heads its DiT has: give --heads")
    depth = len({match[1] for key in found.tensors if (match := re.match(r"model\.blocks\.(\d+)\.", key))})
    resolution = given.get("img_resolution") or own.get("img_resolution")
    check_sizes(found, {"img_resolution": resolution, "num_heads": heads}, "its DiT")
    if hidden % heads or resolution % patch:
        raise ModelError(
            f"{found.path}: a DiT of width {hidden} with {heads} heads on {resolution} x {resolution} images cannot be"
        )
    fc1 = found.tensors.get("model.blocks.0.mlp.fc1.weight")
    settings = DiTSettings(
        hidden_size=hidden, depth=depth, num_heads=heads, patch_size=patch,
        mlp_ratio=4.0 if fc1 is None else fc1.shape[0] / hidden,
    )  # fmt: skip
    classes, null, assumed = class_rows(found, table, given.get("label_dim") or None, None, options)
    shape = {"img_resolution": resolution, "img_channels": channels, "label_dim": classes, "augment_dim": 0}
    return replace(settings, null_class=null), shape, assumed
