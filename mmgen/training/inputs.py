"""What a method learns from: the images of a batch as a network sees them, and their condition."""

from __future__ import annotations

import torch
from torch import Tensor

from .augment import AugmentSettings, augment
from ..config.sections import DataSettings
from ..models.latents import LatentSettings
from ..models.pixels import from_uint8
from ..networks.conditions import Condition
from ..system.random import keys, uniform
from ..encoders.vae import draw_latents
from .batches import Batch

# Purposes of random numbers. Each is drawn with the seed and the number of the image in the whole training. 103 and 104 are
# the noise and the times of IMM, 106 which caption (`batches`); methods have purposes of their own from 120 on.
FLIP, AUGMENT, LABEL, LATENT = 100, 101, 102, 105


class Inputs:
    """Mirrored, augmented, drawn from their latents, conditions hidden: as the data settings say, and the same for every method.

    seed: of the training. latents: those of the model, None for pixels.
    """

    def __init__(self, data: DataSettings, seed: int, latents: LatentSettings | None = None) -> None:
        self.data, self.seed, self.latents = data, seed, latents

    def images(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """What is learned, float32 [N, C, H, W], and the augmentation label [N, 9], if any.

        Pixels are in [-1, 1]. A latent is drawn anew at each step from the moments of its image.
        """
        if self.latents is None:
            return self.pixels(batch)
        return draw_latents(batch.images, self.latents, keys(self.seed, batch.index, LATENT)), None

    def pixels(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """The images in [-1, 1], float32, mirrored and augmented as configured, and the augmentation label [N, 9]."""
        x = from_uint8(batch.images)
        if self.data.xflip:
            mirrored = uniform(keys(self.seed, batch.index, FLIP)) < 0.5
            x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
        if self.data.augment > 0:
            return augment(x, keys(self.seed, batch.index, AUGMENT), AugmentSettings(probability=self.data.augment))
        return x, None

    def condition(self, batch: Batch) -> Condition | None:
        """The condition of each image, or the null for as many as the dropout says; None if unconditional."""
        if not self.data.conditional and not self.data.text:
            return None
        dropout = self.data.caption_dropout if self.data.text else self.data.label_dropout
        if dropout == 0:
            return batch.condition
        hidden = uniform(keys(self.seed, batch.index, LABEL)) < dropout
        return batch.condition.hidden(hidden)
