"""What a latent model has to know of the autoencoder whose latents it was trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class LatentSettings:
    """latent' = (latent - mean) / std * target_std, per channel. Part of the model file of every latent model."""

    vae: str  # folder or hub id, as given at encoding
    vae_sha256: str  # of its weights; "" where nothing says: the models of others name their autoencoder by convention only
    kind: Literal["kl", "tiny", "dc"] = "kl"  # AutoencoderKL, AutoencoderTiny or AutoencoderDC
    mean: tuple[float, ...]  # of the training set's latents, per channel
    std: tuple[float, ...]
    target_std: float = 0.5  # IMM's sigma_data
    pixels: Literal["symmetric", "unit"] = "symmetric"  # what the autoencoder was given: [-1, 1], or EDM2's [0, 1]
    resolution: int = 256  # of the images; the model's own resolution is that of the latents
