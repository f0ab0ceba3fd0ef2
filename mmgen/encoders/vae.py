"""Autoencoders of diffusers: images to latents before training, latents to images after sampling.

IMM (arXiv:2503.07565) trains on raw latents of Stable Diffusion's autoencoder, without its factor 0.18215: each channel is
brought to mean 0 and standard deviation 0.5 instead. A latent is drawn anew at each step from the encoder's mean and
standard deviation, the moments that `mmgen cache-latents` keeps.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import ConfigError, ModelError, shortened
from ..system.files import at_home, read_json, sha256_of
from ..models.latents import LatentSettings
from ..formats.network_file import content
from ..models.pixels import from_uint8, to_uint8
from ..system.random import normal

# The raw latents' mean and standard deviation per channel, over ImageNet-256, in IMM's published configuration
IMM_MEAN = (0.86488, -0.27787343, 0.21616915, 0.3738409)
IMM_STD = (4.85503674, 5.31922414, 3.93725398, 3.9870003)
IMM_TARGET_STD = 0.5
IMM_VAES = ("sd-vae-ft-ema", "sd-vae-ft-mse")  # the encoder of both is the same; their decoders differ

KINDS = {"AutoencoderKL": "kl", "AutoencoderTiny": "tiny", "AutoencoderDC": "dc"}  # those but kl have no standard deviation
WIDTHS = {"kl": "block_out_channels", "tiny": "encoder_block_out_channels", "dc": "encoder_block_out_channels"}
WEIGHTS = "diffusion_pytorch_model.safetensors"
_HUB_ID = re.compile(r"^\w[\w.-]*/\w[\w.-]*$")
_PIXELS_AT_ONCE = 2**20  # decoded at a time: 16 images of 256 x 256


@dataclass(frozen=True)
class Vae:
    """An autoencoder in float32 on one device.

    `encode`: uint8 [N, 3, H, W] -> mean and standard deviation of the raw latents, float32 [N, C, h, w] each. A tiny one
    has no standard deviation: it is 0.
    `decode`: (raw latents float [N, C, h, w], whether pixels are in [0, 1] and not in [-1, 1]) -> uint8 [N, 3, H, W].
    """

    source: str  # what the user wrote
    kind: Literal["kl", "tiny", "dc"]
    sha256: str  # of its weights
    channels: int  # C
    factor: int  # H / h
    encode: Callable[[Tensor], tuple[Tensor, Tensor]]
    decode: Callable[[Tensor, bool], Tensor]

    @property
    def path(self) -> str:
        """Where it is, whatever folder one stands in: an absolute path, or the hub id."""
        return str(at_home(self.source).absolute()) if at_home(self.source).exists() else self.source

    @property
    def is_imm(self) -> bool:
        """Whether IMM's mean and standard deviation are this one's, judged by its name."""
        return self.kind == "kl" and self.channels == len(IMM_MEAN) and Path(self.source).name in IMM_VAES


def load_vae(source: str, device: torch.device | str = "cpu") -> Vae:
    """AutoencoderKL, AutoencoderTiny or AutoencoderDC from a folder as diffusers writes it (its `vae` folder, of a pipeline) or a hub id.

    Weights are read from safetensors only, and every one must be there. The last two that were loaded are kept. Raises
    ConfigError where diffusers is missing, ModelError where there is no such autoencoder, or it is damaged or of another kind.
    """
    return _load(source, str(torch.device(device)))


def decoder(latents: LatentSettings, device: torch.device | str = "cpu") -> Callable[[Tensor], Tensor]:
    """What turns a model's latents, float [N, C, h, w], into images uint8 [N, 3, H, W] on the same device.

    The autoencoder is the one recorded in `latents`, looked for at $MMGEN_VAE (a folder or hub id) if that is set. Raises
    what `load_vae` raises, and ModelError where it is not the one that the model was trained with.
    """
    source = os.environ.get("MMGEN_VAE") or latents.vae
    try:
        vae = load_vae(source, device)
    except ModelError as error:
        raise ModelError(f"{error}; the model needs this VAE to decode its latents, and $MMGEN_VAE may name its place") from error
    if latents.vae_sha256 and vae.sha256 != latents.vae_sha256:
        raise ModelError(
            f"the VAE {source} is not the one that the model was trained with: SHA-256 {vae.sha256[:12]}..., not "
            f"{latents.vae_sha256[:12]}... ({latents.vae}); set $MMGEN_VAE to the folder that holds the right one"
        )

    def decode(x: Tensor) -> Tensor:
        if (side := x.shape[-1] * vae.factor) != latents.resolution:  # of a model that does not say which weights its VAE has
            raise ModelError(
                f"the VAE {source} makes images of {side}x{side} of the model's latents, not {latents.resolution}x{latents.resolution}: "
                "set $MMGEN_VAE to the folder that holds the right one"
            )
        return vae.decode(denormalise(x, latents), latents.pixels == "unit")

    return decode


def unit_to_uint8(x: Tensor) -> Tensor:
    """Pixels in [0, 1] to 0..255, clipped and truncated, as EDM2 does. Any shape."""
    return (x.clamp(0, 1) * 255).to(torch.uint8)


def normalise(raw: Tensor, latents: LatentSettings) -> Tensor:
    """Raw latents [N, C, h, w] -> those that a model sees: (raw - mean) / std * target_std, float32."""
    mean, std = _constants(latents, raw.device)
    return (raw.float() - mean) * (latents.target_std / std)


def denormalise(x: Tensor, latents: LatentSettings) -> Tensor:
    """The inverse of `normalise`, float32."""
    mean, std = _constants(latents, x.device)
    return x.float() * (std / latents.target_std) + mean


def draw_latents(moments: Tensor, latents: LatentSettings, key: Tensor) -> Tensor:
    """Latents as a model sees them, float32 [N, C, h, w], drawn from moments by the stream keys int64 [N].

    moments: float [N, 2C, h, w], the mean above the standard deviation; of a tiny autoencoder the mean alone, [N, C, h, w].
    """
    channels = len(latents.mean)
    raw = moments[:, :channels].float()
    if latents.kind == "kl":
        raw = raw + moments[:, channels:].float() * normal(key, raw.shape[1:])
    return normalise(raw, latents)


@functools.lru_cache(maxsize=8)
def _constants(latents: LatentSettings, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation as float32 [C, 1, 1]; kept, so that no step copies them to the device."""
    mean, std = (torch.tensor(values, dtype=torch.float32, device=device) for values in (latents.mean, latents.std))
    return mean[:, None, None], std[:, None, None]


@functools.lru_cache(maxsize=2)
def _load(source: str, device: str) -> Vae:
    classes = _diffusers_classes()
    folder = _folder(source)
    config = _read_config(folder, source)
    name = config["_class_name"]
    if classes[name] is None:
        raise ConfigError(f"{source} is an {name}, which this version of diffusers does not have: pip install -U diffusers")
    module = _read_module(classes[name], folder, source).to(device)
    kind = KINDS[name]
    widths = config.get(WIDTHS[kind]) or [0]

    @torch.no_grad()
    def encode(images: Tensor) -> tuple[Tensor, Tensor]:
        x = from_uint8(images.to(device))
        if kind == "kl":
            found = module.encode(x).latent_dist
            return found.mean, found.std
        found = module.encode(x)
        mean = found.latents if kind == "tiny" else found.latent
        return mean, torch.zeros_like(mean)

    @torch.no_grad()
    def decode(raw: Tensor, unit: bool = False) -> Tensor:
        x = raw.float().to(device)
        height, width = (side * factor for side in x.shape[2:])
        if not len(x):
            return torch.empty(0, 3, height, width, dtype=torch.uint8, device=raw.device)
        size = max(1, _PIXELS_AT_ONCE // (height * width))
        to_pixels = unit_to_uint8 if unit else to_uint8
        return torch.cat([to_pixels(module.decode(part).sample) for part in x.split(size)]).to(raw.device)

    factor = 2 ** (len(widths) - 1)  # each level but the last halves the side
    channels = int(module.config.latent_channels)
    return Vae(source, kind, sha256_of(folder / WEIGHTS), channels, factor, encode, decode)


def _diffusers_classes() -> dict[str, Any]:
    try:
        import diffusers
    except ImportError as error:
        raise ConfigError("a VAE needs diffusers: pip install 'mmgen[latents]'") from error
    return {name: getattr(diffusers, name, None) for name in KINDS}  # AutoencoderDC since 0.32


def _read_config(folder: Path, source: str) -> dict[str, Any]:
    try:
        config = read_json(folder / "config.json")
        name = config["_class_name"]
        channels = config.get("in_channels", 3), config.get("out_channels", 3)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder / 'config.json'} is not the config of a model of diffusers: {error!r}") from error
    if name not in KINDS:
        raise ModelError(f"{source} is a {name}, not an AutoencoderKL, AutoencoderTiny or AutoencoderDC")
    if channels != (3, 3):
        raise ModelError(f"{source} is a VAE of images with {channels[0]} channels: it must take and give 3")
    return config


def _read_module(model_class: Any, folder: Path, source: str) -> torch.nn.Module:
    """The module in float32, every weight of which comes from the file."""
    from diffusers.utils import logging
    from safetensors import SafetensorError

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what matters of its reports is checked here
    try:
        module, report = model_class.from_pretrained(
            folder,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            torch_dtype=torch.float32,
            low_cpu_mem_usage=False,  # else diffusers 0.31 does not report weights that it does not know
        )
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        what = content(folder / WEIGHTS)
        damage = f"its {WEIGHTS} is {what}" if "pointer" in what or "web page" in what or what == "empty" else shortened(error, 300)
        raise ModelError(f"cannot load the VAE {source}: {damage}") from error
    finally:
        logging.set_verbosity(verbosity)
    odd = [key if isinstance(key, str) else key[0] for part in ("missing_keys", "mismatched_keys") for key in report[part]]
    if odd or report["unexpected_keys"]:
        what = "missing or of another shape" if odd else "unknown"
        names = ", ".join(sorted(odd or report["unexpected_keys"])[:3])
        raise ModelError(f"{folder / WEIGHTS} does not fit its config.json: {names} {what}")
    return module.eval().requires_grad_(False)


def _folder(source: str) -> Path:
    """The folder with config.json and the weights: below `source`, or the hub's cache, filled by download."""
    path = at_home(source)
    if path.is_dir():
        return _inside(path, source)
    if path.is_file():
        raise ModelError(f"{source} is a file: give the folder that holds the VAE's config.json and {WEIGHTS}")
    if not _HUB_ID.match(source):
        raise ModelError(f"there is no folder {source}: give a folder of diffusers or a hub id such as stabilityai/sd-vae-ft-ema")
    from huggingface_hub import HfApi, snapshot_download

    files = [f"{sub}{name}" for sub in ("", "vae/") for name in ("config.json", WEIGHTS)]
    try:
        return _inside(Path(snapshot_download(source, local_files_only=True, allow_patterns=files)), source)
    except Exception:  # not in the cache, or a part of it, which is said in more than one way
        pass_on = f"cannot load the VAE {source}: it is no folder, and not whole in the hub's cache"
    try:
        info = HfApi().model_info(source)
        inside = any(file.rfilename == "vae/config.json" for file in info.siblings or [])
        chosen = [name for name in files if name.startswith("vae/") == inside]
        return _inside(Path(snapshot_download(source, revision=info.sha, allow_patterns=chosen)), source)
    except ModelError:
        raise
    except Exception as error:  # huggingface_hub's own, and those of requests or httpx, by version
        remedy = f"run `hf download {source} --local-dir DIR` where the hub can be reached, and give DIR"
        raise ModelError(f"{pass_on}, and the hub cannot be asked ({shortened(error, 300)}): {remedy}") from error


def _inside(folder: Path, source: str) -> Path:
    """`folder`, or its `vae` folder if it is a pipeline."""
    chosen = folder / "vae" if (folder / "vae" / "config.json").is_file() else folder
    if not (chosen / "config.json").is_file():
        raise ModelError(f"{source} holds no config.json: give the folder of a VAE as diffusers writes it")
    if not (chosen / WEIGHTS).is_file():
        others = sorted(p.name for p in chosen.glob("*.bin"))
        found = f", only {others[0]}, a pickle, which is not read: save it with save_pretrained as safetensors" if others else ""
        raise ModelError(f"{source} holds no {WEIGHTS}{found}")
    return chosen
