"""Autoencoders small enough for any test, and images for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

FACTOR = 2


def write_vae(folder: Path, kind: str = "kl", channels: int = 4, seed: int = 0, levels: int = 2) -> str:
    """A VAE of random weights as diffusers saves it: each level but the last halves the sides, 16x16 becomes 8x8."""
    from diffusers import AutoencoderKL, AutoencoderTiny

    torch.manual_seed(seed)
    if kind == "kl":
        vae = AutoencoderKL(
            block_out_channels=(*(8,) * (levels - 1), 16),
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=channels,
        )
    else:
        vae = AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
            latent_channels=channels,
        )
    vae.save_pretrained(folder)
    return str(folder)


def write_images(folder: Path, per_class: int = 40, side: int = 16, classes: int = 3) -> Path:
    """Class folders a, b, ... of colour images: discs on a ground, of a colour by class."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[:side, :side]
    for number in range(classes):
        place = folder / "abcdefghij"[number]
        place.mkdir(parents=True)
        for i in range(per_class):
            pixels = random.integers(0, 40, (side, side, 3))
            centre, radius = random.uniform(0.3, 0.7, 2) * side, random.uniform(0.15, 0.35) * side
            pixels[(y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2, number % 3] += 180
            Image.fromarray(pixels.astype(np.uint8)).save(place / f"{i:03d}.png")
    return folder
