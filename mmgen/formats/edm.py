"""EDM's pickled networks (Karras et al., arXiv:2206.00364): three architectures within four preconditioners.

Key names: those of `formats/imm.py` for DDPM++ and NCSN++; ADM's are the same but for the ends:

original                              ours
model.map_layer0 / map_layer1         time_mlp.linear0 / .linear1
model.map_label, map_augment          label_embed, augment_embed
model.map_noise.freqs                 frequencies                 Fourier embedding only
model.enc.X, model.dec.X              encoder.X, decoder.X
model.dec.RxR_aux_norm / aux_conv     out_norm / out_conv         DDPM++ and NCSN++
model.out_norm / out_conv             out_norm / out_conv         ADM
*.resample_filter                     (checked, not kept)         a constant of the architecture
u                                     (checked, not kept)         iDDPMPrecond's noise levels, which its constants make

The networks are computed in the precision of their inputs: `use_fp16`, how NVIDIA's code computes, is not taken over. Labels
of augmentation stay part of the network, and are zero at sampling, as in EDM.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor

from ..models.denoiser import DenoiserSettings
from ..errors import ModelError
from ..models.config import ModelConfig
from ..networks import ADMSettings, UNetSettings
from .family import Converted, ConvertOptions
from .mapping import assign, cast, check_sizes, expected_state, known, module, require
from .reading import Found

FILTER_REASON = "a resampling filter, a constant of the architecture"
TABLE_REASON = "the noise levels of iDDPM, which follow from its constants"
SIGMA_MIN, SIGMA_MAX = 0.002, 80.0  # what EDM samples from where the network has no limits of its own
TAPS = {"box": [1.0, 1.0], "fir": [1.0, 3.0, 3.0, 1.0]}

# Arguments of the published classes, with their defaults
SONG_ARGUMENTS = {
    "img_resolution": None, "in_channels": None, "out_channels": None, "label_dim": 0, "augment_dim": 0,
    "model_channels": 128, "channel_mult": [1, 2, 2, 2], "channel_mult_emb": 4, "num_blocks": 4, "attn_resolutions": [16],
    "dropout": 0.10, "label_dropout": 0, "embedding_type": "positional", "channel_mult_noise": 1, "encoder_type": "standard",
    "decoder_type": "standard", "resample_filter": [1, 1],
}  # fmt: skip
DHARIWAL_ARGUMENTS = {
    "img_resolution": None, "in_channels": None, "out_channels": None, "label_dim": 0, "augment_dim": 0,
    "model_channels": 192, "channel_mult": [1, 2, 3, 4], "channel_mult_emb": 4, "num_blocks": 3,
    "attn_resolutions": [32, 16, 8], "dropout": 0.10, "label_dropout": 0,
}  # fmt: skip
_WRAPPERS: dict[str, dict[str, Any]] = {
    "EDMPrecond": {"sigma_min": 0, "sigma_max": float("inf"), "sigma_data": 0.5},
    "VPPrecond": {"beta_d": 19.9, "beta_min": 0.1, "M": 1000, "epsilon_t": 1e-5},
    "VEPrecond": {"sigma_min": 0.02, "sigma_max": 100},
    "iDDPMPrecond": {"C_1": 0.001, "C_2": 0.008, "M": 1000},
}


def family(found: Found) -> str | None:
    """Networks of EDM's, with one time: IMM's have two."""
    keys = found.tensors.keys()
    ours = found.arguments.get("class_name") in _WRAPPERS or ("model.map_layer0.weight" in keys and not two_times(found))
    return "edm" if ours else None


def two_times(found: Found) -> bool:
    return "model.map_layer0_s.weight" in found.tensors or "model.s_embedder.mlp.0.weight" in found.tensors


def convert(found: Found, options: ConvertOptions) -> Converted:
    """The network and its preconditioner from the constructor arguments in the file. Raises ModelError."""
    inner = module(found, "model")
    network, shape = network_settings(found, inner)
    denoiser, given, assumed = _denoiser(found, inner)
    if any(given.get(name, shape[name]) != shape[name] for name in ("img_resolution", "img_channels", "label_dim")):
        raise ModelError(f"{found.path}: the network and its preconditioner were made for images of different shapes or classes")
    config = ModelConfig(
        network=network, flow=None, denoiser=denoiser, resolution=shape["img_resolution"], channels=shape["img_channels"],
        num_classes=shape["label_dim"], augment_dim=shape["augment_dim"],
        null_trained=inner["init_kwargs"].get("label_dropout", 0) > 0 if shape["label_dim"] else None,
    )  # fmt: skip
    left_out = check_constants(found, config)
    state = assign(found, config, lambda key: original_name(config, key), left_out=left_out)
    return Converted(config, cast(state, options.precision), left_out, "edm", assumed)


def original_state(config: ModelConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under EDM's (or IMM's) names, constants included."""
    result = {original_name(config, key): value for key, value in state.items()}
    return {**result, **constants(config, state["out_conv.weight"].dtype)}


def network_settings(found: Found, inner: dict[str, Any]) -> tuple[UNetSettings | ADMSettings, dict[str, int]]:
    """(settings, {img_resolution, img_channels, label_dim, augment_dim}) of a SongUNet or DhariwalUNet."""
    name, given = inner["class_name"], inner["init_kwargs"]
    if name == "SongUNet":
        a = known(found, given, SONG_ARGUMENTS, name)
        check_sizes(found, a, name)
        fourier = a["embedding_type"] == "fourier"
        taps = {tuple(value): word for word, value in TAPS.items()}
        require(found, a, {"channel_mult_emb": 4, "channel_mult_noise": 2 if fourier else 1, "decoder_type": "standard"}, name)
        for argument, values in (("embedding_type", ["positional", "fourier"]), ("encoder_type", ["standard", "residual"]),
                                 ("resample_filter", [list(t) for t in taps])):  # fmt: skip
            value = list(a[argument]) if argument == "resample_filter" else a[argument]
            if value not in values:
                raise ModelError(f"{found.path}: {name} was made with {argument} = {value!r}; mmgen has {values}")
        settings: UNetSettings | ADMSettings = UNetSettings(
            model_channels=a["model_channels"], channel_mult=tuple(a["channel_mult"]), num_blocks=a["num_blocks"],
            attn_resolutions=tuple(a["attn_resolutions"]), dropout=float(a["dropout"]), embedding=a["embedding_type"],
            encoder=a["encoder_type"], resample=taps[tuple(a["resample_filter"])],
        )  # fmt: skip
    elif name == "DhariwalUNet":
        a = known(found, given, DHARIWAL_ARGUMENTS, name)
        check_sizes(found, a, name)
        require(found, a, {"channel_mult_emb": 4}, name)
        settings = ADMSettings(
            model_channels=a["model_channels"], channel_mult=tuple(map(float, a["channel_mult"])), num_blocks=a["num_blocks"],
            attn_resolutions=tuple(a["attn_resolutions"]), dropout=float(a["dropout"]),
            learn_sigma=a["out_channels"] == 2 * a["in_channels"],
        )  # fmt: skip
    else:
        raise ModelError(f"{found.path} holds a network of class {name!r}; mmgen has SongUNet and DhariwalUNet")
    doubled = getattr(settings, "learn_sigma", False)
    if a["out_channels"] != a["in_channels"] * (2 if doubled else 1):
        raise ModelError(f"{found.path}: {name} gives {a['out_channels']} channels for {a['in_channels']}")
    shape = {name: a[name] for name in ("img_resolution", "label_dim", "augment_dim")}
    return settings, {**shape, "img_channels": a["in_channels"]}


def _denoiser(found: Found, inner: dict[str, Any]) -> tuple[DenoiserSettings, dict[str, Any], tuple[str, ...]]:
    """The preconditioner with its range of noise levels, all arguments of it, and what is assumed."""
    name = found.arguments.get("class_name")
    if name not in _WRAPPERS:
        raise ModelError(f"{found.path} holds a network within {name!r}; EDM's preconditioners are {', '.join(_WRAPPERS)}")
    given = dict(found.arguments["init_kwargs"])
    published = {"img_resolution", "img_channels", "label_dim", "use_fp16", "model_type", *inner["init_kwargs"]}
    own = known(found, {k: v for k, v in given.items() if k not in published}, _WRAPPERS[name], name)
    assumed: tuple[str, ...] = ()
    if name == "EDMPrecond":  # its own range is unlimited unless it says otherwise; 0.002 to 80 is what EDM samples with
        low, high = float(own["sigma_min"]), float(own["sigma_max"])
        limits = low if low > 0 else SIGMA_MIN, high if math.isfinite(high) else SIGMA_MAX
        settings = DenoiserSettings("edm", sigma_data=float(own["sigma_data"]), sigma_min=limits[0], sigma_max=limits[1])
        unsaid = [f"sigma_min {SIGMA_MIN:g}"] * (low <= 0) + [f"sigma_max {SIGMA_MAX:g}"] * math.isinf(high)
        assumed = (f"{' and '.join(unsaid)}, EDM's defaults for sampling",) if unsaid else ()
    elif name == "VEPrecond":
        settings = DenoiserSettings("ve", sigma_min=float(own["sigma_min"]), sigma_max=float(own["sigma_max"]))
    else:
        require(found, own, _WRAPPERS[name], name)
        if name == "VPPrecond":
            low, high = (math.sqrt(math.expm1(0.5 * 19.9 * t**2 + 0.1 * t)) for t in (1e-5, 1.0))
            settings = DenoiserSettings("vp", sigma_min=low, sigma_max=high)
        else:
            table = noise_levels()
            settings = DenoiserSettings("iddpm", sigma_min=table[-2].item(), sigma_max=table[0].item())
    return settings, given, assumed


def noise_levels() -> Tensor:
    """iDDPM's u_0 > ... > u_1000 = 0, float32 [1001], in the recursion and precision of EDM's table 1."""
    levels = torch.zeros(1001)
    alpha_bar = (0.5 * math.pi * torch.arange(1001) / 1000 / (0.008 + 1)).sin() ** 2
    for j in range(1000, 0, -1):
        ratio = (alpha_bar[j - 1] / alpha_bar[j]).clip(min=0.001)
        levels[j - 1] = ((levels[j] ** 2 + 1) / ratio - 1).sqrt()
    return levels


def constants(config: ModelConfig, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The tensors of the original that hold no weights: original name -> value."""
    result: dict[str, Tensor] = {}
    if config.network.kind in ("unet", "adm"):
        taps = torch.tensor(TAPS[getattr(config.network, "resample", "box")])
        kernel = (taps.outer(taps) / taps.sum() ** 2)[None, None].to(dtype)
        for key in expected_state(config):
            block = re.match(r"(encoder|decoder)\.(\w+_(?:up|down|aux_residual))\.(?:conv0|conv)\.weight$", key)
            if block:
                name = f"model.{block[1][:3]}.{block[2]}"
                aux = block[2].endswith("aux_residual")
                result.update({f"{name}{part}.resample_filter": kernel for part in ([""] if aux else [".conv0", ".skip"])})
    if config.denoiser is not None and config.denoiser.precondition == "iddpm":
        result["u"] = noise_levels().to(dtype)
    return result


def check_constants(found: Found, config: ModelConfig) -> dict[str, str]:
    """Those constants that the file has -> the reason to leave them out. Raises ModelError where one has other values."""
    reasons = {}
    for name, value in constants(config).items():
        reason = TABLE_REASON if name == "u" else FILTER_REASON
        tensor = found.tensors.get(name)
        if tensor is None:
            raise ModelError(f"{found.path} lacks {name}, {reason}")
        # Half precision, and the sums behind the noise levels, are known to three digits
        if tensor.shape != value.shape or not torch.allclose(tensor.float(), value, rtol=2e-3, atol=1e-6):
            raise ModelError(f"{found.path}: {name} ({list(tensor.shape)}) is not {reason} as mmgen has it")
        reasons[name] = reason
    return reasons


def original_name(config: ModelConfig, key: str) -> str:
    """EDM's or IMM's name of one of our keys, U-Nets only."""
    side = f"{config.resolution}x{config.resolution}"
    ends = f"dec.{side}_aux_" if config.network.kind == "unet" else "out_"
    rules = [
        (r"second_time_mlp\.linear([01])\.", r"map_layer\1_s."),
        (r"time_mlp\.linear([01])\.", r"map_layer\1."),
        (r"label_embed\.", "map_label."),
        (r"augment_embed\.", "map_augment."),
        (r"frequencies$", "map_noise.freqs"),
        (r"encoder\.(\w+_aux_residual)\.conv\.", r"enc.\1."),
        (r"encoder\.", "enc."),
        (r"decoder\.", "dec."),
        (r"out_(norm|conv)\.", rf"{ends}\1."),
    ]
    for pattern, replacement in rules:
        name, count = re.subn("^" + pattern, replacement, key)
        if count:
            return "model." + name
    raise ModelError(f"no tensor of EDM's corresponds to {key!r}")
