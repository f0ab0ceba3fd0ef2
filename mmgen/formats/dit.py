"""DiT, SiT and REPA files: `.pt` of the diffusion transformers of arXiv:2212.09748, 2401.08740 and 2410.06940.

All three are one network under the same key names; what differs is what its output means.

DiT     discrete times, linear betas, the noise (and a variance, not used)
SiT     z = t x + (1 - t) e, time 1 is data, the output x - e (and a second half, not used)
REPA    z = (1 - t) x + t e, time 1 is noise, the output e - x; trained beside projectors, which its files hold too

The latents of the published models are those of Stable Diffusion's autoencoder times 0.18215: what a file with four channels
is taken to be.
"""

from __future__ import annotations

import math
import re
from typing import Any

from torch import Tensor

from ..models.denoiser import DenoiserSettings
from ..errors import ConfigError, ModelError, nearest
from ..models.latents import LatentSettings
from ..models.config import ModelConfig, SamplingSettings
from ..networks.dit import DiTSettings
from .family import Converted, ConvertOptions
from .mapping import assign, cast
from .reading import Found

HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # hidden size -> attention heads of S, B, L, XL (arXiv:2212.09748, table 1)
SIZES = {"S": 6, "B": 12, "L": 16, "XL": 16}  # of names such as DiT-XL/2
ROUND = (10, 100, 1000)  # numbers of classes that data sets have: so many embeddings are taken to have none for no class
TYPES = ("dit", "sit", "repa")
SCALING = 0.18215  # of Stable Diffusion's latents
VAE_ASSUMED = "the autoencoder and the scale of its latents are those of the published models"
LINSPACE = (
    "timesteps are respaced from 999 to 0 as DiT's code does (--grid linspace; ancestral has the posterior's variance, not the "
    "learned one)"
)
_PROJECTORS = "a projector of REPA's, used in training only"


def original_names(depth: int, labels: bool = True) -> dict[str, str]:
    """Our key -> the original one, of a network of so many blocks."""
    modules = {
        "patch_embed": "x_embedder.proj",
        "time_mlp.linear0": "t_embedder.mlp.0",
        "time_mlp.linear1": "t_embedder.mlp.2",
        "out": "final_layer.linear",
        "out_modulation": "final_layer.adaLN_modulation.1",
    }
    parts = {"qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2", "modulation": "adaLN_modulation.1"}
    modules |= {f"blocks.{i}.{ours}": f"blocks.{i}.{theirs}" for i in range(depth) for ours, theirs in parts.items()}
    names = {f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in modules.items() for kind in ("weight", "bias")}
    names["position"] = "pos_embed"
    if labels:
        names["label_embed.weight"] = "y_embedder.embedding_table.weight"
    return names


def family(found: Found) -> str | None:
    """A transformer with one time: IMM's has a second (`s_embedder`).

    DiT and SiT have the same names and shapes: "dit" unless the file says otherwise, and `convert` then asks.
    """
    keys = found.tensors.keys()
    needed = {
        "x_embedder.proj.weight",
        "blocks.0.adaLN_modulation.1.weight",
        "t_embedder.mlp.0.weight",
        "final_layer.linear.weight",
    }
    if not needed <= keys or any(key.startswith(("s_embedder.", "r_embedder.")) for key in keys):
        return None
    if {"blocks.0.mlp.w12.weight", "feat_rope.freqs_cos"} & keys:
        return "lightningdit"
    said = found.arguments.get("args")
    said = said if isinstance(said, dict) else {}
    if any(key.startswith("projectors.") for key in keys) or "proj_coeff" in said:
        return "repa"
    return "sit" if "path_type" in said or str(said.get("model", "")).startswith("SiT") else "dit"


def convert(found: Found, options: ConvertOptions) -> Converted:
    """A DiT, SiT or REPA file as a denoiser.

    Raises ConfigError where neither the file nor the options say which of them it is, and ModelError for tensors of another
    network, shapes that contradict each other, and paths or outputs that are not the published ones.
    """
    family = _family(found, options)
    arguments = found.arguments.get("args", {})
    vae = str(arguments.get("vae", "ema"))
    if vae not in ("ema", "mse"):
        raise ModelError(f"{found.path} names the autoencoder {vae!r}; known are ema and mse, of stabilityai/sd-vae-ft-...")
    left_out = {key: _PROJECTORS for key in found.tensors if key.startswith("projectors.")}
    settings, resolution, channels, classes, assumed = _architecture(found, arguments, family, options)
    config = ModelConfig(
        settings, None, resolution, channels, classes, denoiser=_denoiser(family, channels, options),
        latents=published_latents(resolution, vae) if channels == 4 else None,
        sampling=SamplingSettings(grid="linspace") if family == "dit" else SamplingSettings(),
        null_trained=settings.null_class if classes else None,  # the row is there where labels were hidden
    )  # fmt: skip
    if family == "dit":
        assumed.append("1000 timesteps of linear betas from 0.0001 to 0.02, and the noise as the output, as published")
    elif "path_type" not in arguments or "prediction" not in arguments:
        assumed.append("the linear path and the velocity as the output, as published")
    if channels == 4:
        assumed.append(VAE_ASSUMED)
    sampled = [LINSPACE] if family == "dit" else []
    if config.denoiser.guided_channels is not None:
        sampled.append(f"guidance acts on the first 3 of {channels} channels, as the published code has it (--guide-all: on all)")
    state = assign(found, config, original_names(settings.depth, labels=classes > 0).__getitem__, left_out=left_out)
    return Converted(config, cast(state, options.precision), left_out, family, tuple(assumed), tuple(sampled))


def _denoiser(family: str, channels: int, options: ConvertOptions) -> DenoiserSettings:
    """DiT's and SiT's published code guides the first three channels, whatever their number, REPA's all."""
    three = family in ("dit", "sit") and channels > 3 and not options.guide_all
    return DenoiserSettings("discrete" if family == "dit" else "flow", guided_channels=3 if three else None)


def original_state(config: ModelConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under their original names, the very same ones."""
    names = original_names(config.network.depth, labels=config.num_classes > 0)
    return {theirs: state[ours] for ours, theirs in names.items()}


def published_latents(resolution: int, vae: str = "ema") -> LatentSettings:
    """The autoencoder and scaling that DiT, SiT and REPA were published with. No file says it: it is their convention.

    resolution: of the latents; vae: "ema" or "mse", which differ in the decoder only.
    """
    return LatentSettings(
        vae=f"stabilityai/sd-vae-ft-{vae}", vae_sha256="", mean=(0.0,) * 4, std=(1 / SCALING,) * 4, target_std=1.0,
        resolution=8 * resolution,
    )  # fmt: skip


def _family(found: Found, options: ConvertOptions) -> str:
    """dit, sit or repa, from --type and from what the file says; they must not contradict each other."""
    if options.type is not None and options.type not in TYPES:
        raise ConfigError(f"unknown type {options.type!r}: {nearest(options.type, TYPES)}")
    arguments = found.arguments.get("args", {})
    said = family(found)
    if said == "dit" and not str(arguments.get("model", "")).startswith("DiT"):
        said = None
    if said is None and options.type is None:
        raise ConfigError(
            f"{found.path} can be DiT's or SiT's, whose tensors have the same names and shapes: say which with --type dit or "
            "--type sit"
        )
    if said and options.type and {said, options.type} not in ({said}, {"sit", "repa"}):
        raise ConfigError(f"{found.path} says itself that it is of type {said}, not {options.type}: leave out --type")
    chosen = said or options.type
    if chosen != "dit":
        _check_path(found, arguments)
    return chosen


def _check_path(found: Found, arguments: dict[str, Any]) -> None:
    path, prediction = str(arguments.get("path_type", "linear")), str(arguments.get("prediction", "velocity"))
    if path.lower() != "linear":
        raise ModelError(f"{found.path} was trained on the path {path}: only Linear is supported")
    if prediction not in ("velocity", "v"):
        raise ModelError(f"{found.path} was trained to predict the {prediction}: only the velocity is supported")


def _architecture(
    found: Found, arguments: dict[str, Any], family: str, options: ConvertOptions
) -> tuple[DiTSettings, int, int, int, list[str]]:
    """(settings, resolution, channels, classes, what is assumed) from the shapes, the file's arguments and the options."""
    tensors = found.tensors
    for key in ("pos_embed", "blocks.0.mlp.fc1.weight"):
        if key not in tensors:
            raise ModelError(f"{found.path} looks like a diffusion transformer, but lacks {key}")
    patches, position = tensors["x_embedder.proj.weight"], tensors["pos_embed"]
    if patches.ndim != 4 or position.ndim != 3 or math.isqrt(position.shape[1]) ** 2 != position.shape[1]:
        raise ModelError(
            f"{found.path}: x_embedder.proj.weight and pos_embed have the shapes {list(patches.shape)} and "
            f"{list(position.shape)}, which are not those of square images"
        )
    hidden, channels, patch, _ = patches.shape
    outputs = tensors["final_layer.linear.weight"].shape[0] / (patch * patch)
    if outputs not in (channels, 2 * channels):
        raise ModelError(
            f"{found.path} has {channels} channels in and {outputs:g} out: only as many or twice as many are supported"
        )
    heads, assumed = _heads(found, arguments, hidden, options)
    table = tensors.get("y_embedder.embedding_table.weight")
    dropout = next((arguments[key] for key in ("class_dropout_prob", "cfg_prob") if key in arguments), None)
    classes, null, more = class_rows(found, table, arguments.get("num_classes"), dropout, options)
    settings = DiTSettings(
        hidden_size=hidden,
        depth=len({key.split(".")[1] for key in tensors if key.startswith("blocks.")}),
        num_heads=heads,
        patch_size=patch,
        mlp_ratio=tensors["blocks.0.mlp.fc1.weight"].shape[0] / hidden,
        learn_sigma=outputs == 2 * channels,
        reversed_flow=family == "repa",
        null_class=null,
    )
    return settings, math.isqrt(position.shape[1]) * patch, channels, classes, assumed + more


def _heads(found: Found, arguments: dict[str, Any], hidden: int, options: ConvertOptions) -> tuple[int, list[str]]:
    """The attention heads by the file, else by --heads, else by the published sizes, which is said."""
    size = re.match(r"(?:DiT|SiT)-(S|B|L|XL)/\d+$", str(arguments.get("model", "")))
    said = arguments.get("num_heads") or (SIZES[size[1]] if size else None)
    if said and options.heads not in (None, said):
        raise ConfigError(f"{found.path} says itself that it has {said} attention heads, not {options.heads}: leave out --heads")
    heads = said or options.heads or HEADS.get(hidden)
    if heads is None:
        raise ConfigError(f"{found.path} does not say how many attention heads its {hidden} channels have: give --heads")
    if not isinstance(heads, int) or heads < 1 or hidden % heads:
        kind = ConfigError if heads == options.heads else ModelError
        raise kind(f"{found.path} has {hidden} channels, which {heads} attention heads do not divide")
    assumed = (
        [f"{heads} attention heads, as published for width {hidden} (else give --heads)"] if not (said or options.heads) else []
    )
    return heads, assumed


def class_rows(
    found: Found, table: Tensor | None, said: int | None, dropout: float | None, options: ConvertOptions
) -> tuple[int, bool, list[str]]:
    """(classes, whether the table's last row is that of no class, what is assumed).

    The row is there where labels were hidden in training (class_dropout_prob above 0). `said`: the number of classes by the
    file; `dropout`: the probability of hiding a label by the file. Raises ConfigError and ModelError.
    """
    if table is None:
        if options.num_classes:
            raise ConfigError(f"{found.path} has no class embeddings: leave out --num-classes")
        return 0, True, []
    rows = len(table)
    if said is not None and options.num_classes not in (None, said):
        raise ConfigError(f"{found.path} says itself that it has {said} classes, not {options.num_classes}: leave out --num-classes")
    classes = said if said is not None else options.num_classes
    if classes is None and dropout is not None:
        classes = rows - (dropout > 0)
    if classes is not None:
        if classes < 1 or rows not in (classes, classes + 1):
            kind = ModelError if said is not None else ConfigError
            raise kind(
                f"{found.path} has {rows} class embeddings, which are not those of {classes} classes, or one more for no class"
            )
        return classes, rows > classes, []
    null = rows > 1 and rows not in ROUND
    what = "the last is that of no class" if null else "none is that of no class, so that it cannot be guided"
    return rows - null, null, [f"of {rows} class embeddings {what} (else give --num-classes)"]
