"""The autoencoder of a text-to-image pipeline: its latents with the pipeline's own scaling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import ModelError, shortened
from ..models.latents import LatentSettings
from ..system.files import read_json, sha256_of
from .vae import KINDS, WEIGHTS, WIDTHS


def pipeline_latents(folder: Path, name: str, resolution: int) -> LatentSettings:
    """Latents as the networks of a pipeline see them: (raw - shift_factor) scaling_factor, or where the autoencoder has them
    (raw - latents_mean) / latents_std scaling_factor, as diffusers' pipelines undo before decoding.

    folder: the pipeline's. name: how it is called, in the model file and in messages. resolution: of the images.
    Raises ModelError where the folder has no autoencoder that mmgen knows.
    """
    config = vae_config(folder, name)
    kind, scale = KINDS[config["_class_name"]], config.get("scaling_factor", 0.18215)
    channels = config.get("latent_channels", 4)
    mean = config.get("latents_mean") or [config.get("shift_factor") or 0.0] * channels
    std = config.get("latents_std") or [1.0] * channels
    numbers = [scale, *mean, *std]
    if len(mean) != channels or len(std) != channels or not all(isinstance(n, int | float) for n in numbers) or min(scale, *std) <= 0:
        raise ModelError(f"vae/config.json of {name} has no scaling of latents that makes sense: fetch it again")
    return LatentSettings(
        vae=name, vae_sha256=sha256_of(folder / "vae" / WEIGHTS), kind=kind, mean=tuple(map(float, mean)),
        std=tuple(one / scale for one in std), target_std=1.0, resolution=resolution,
    )  # fmt: skip


def vae_factor(folder: Path, name: str) -> int:
    """How many pixels of a side are one of the latents."""
    config = vae_config(folder, name)
    return 2 ** (len(config.get(WIDTHS[KINDS[config["_class_name"]]]) or [0]) - 1)


def vae_config(folder: Path, name: str) -> dict[str, Any]:
    """vae/config.json of a pipeline's folder. Raises ModelError."""
    file = folder / "vae" / "config.json"
    if not file.is_file():
        raise ModelError(f"{name} has no vae/config.json: fetch the whole pipeline")
    try:
        config = read_json(file)
        known = config["_class_name"] in KINDS
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{file} is damaged ({shortened(error)}): fetch it again") from error
    if not known:
        raise ModelError(f"the autoencoder of {name} is a {shortened(config['_class_name'])}: only {', '.join(KINDS)} are read")
    if not (folder / "vae" / WEIGHTS).is_file():
        there = sorted(p.name for p in (folder / "vae").iterdir() if p.suffix in (".bin", ".safetensors"))
        raise ModelError(
            f"the autoencoder of {name} has no {WEIGHTS}" + (f", only {there[0]}" if there else "") + ": fetch that, or load the "
            "pipeline in diffusers and save it again with save_pretrained"
        )
    return config
