"""Denoisers: x_hat, the mean of the images that a noisy one may come from, by any network of a diffusion or flow model.

`diffusion.preconditioning` has the coefficients that bring all of them to one form. A student is a denoiser too. It may have
randomness of its own: noise that its network is given beside the image, or dropout.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from ..diffusion.preconditioning import DenoiserSettings, check_settings, preconditioning
from ..diffusion.process import each_time, per_image
from ..errors import ConfigError
from .config import ModelConfig
from .guidance import guided, is_single
from .model import Model
from ..networks.keyed_dropout import dropouts, keyed_dropout
from ..networks.conditions import Condition, check_condition
from ..system.random import normal
from ..diffusion.schedules import Schedule


class Denoiser(Model):
    """A network with its preconditioning: `model.denoise(y, sigma)` is x_hat."""

    def __init__(self, config: ModelConfig, network: nn.Module | None = None) -> None:
        check_settings(config.denoiser)
        super().__init__(config, network, second_time=config.denoiser.told_guidance, extra_channels=config.denoiser.noise_channels)
        self.settings: DenoiserSettings = config.denoiser
        self.preconditioning = preconditioning(self.settings)
        if self.settings.noise_dropout and dropouts(self.network) == 0:
            raise ConfigError("denoiser.noise_dropout needs a network with dropout, and this one has none or one of 0")

    @property
    def range(self) -> tuple[float, float]:
        """Smallest and largest sigma that the network was trained at."""
        return self.preconditioning.range

    @property
    def is_random(self) -> bool:
        """Whether x_hat has randomness of its own, so that `denoise` needs `noise`."""
        return self.settings.noise_channels > 0 or self.settings.noise_dropout

    def denoise(
        self,
        y: Tensor,
        sigma: Tensor | float,
        condition: Condition | None = None,
        guidance: float | Tensor = 1.0,
        noise: Tensor | None = None,
        *,
        clip: bool = True,
    ) -> Tensor:
        """x_hat of y = x + sigma e, in y's dtype. `clip` False: not clipped, whatever the settings say.

        y float [N, C, H, W]; sigma positive, float64 [N] or one number for all images. `guidance` w, one number or float64 [N], other than 0 and 1 costs two evaluations. Outside `range`
        the formulas are continued, but timesteps and `schedule` end.
        noise: int64 [N], keys (`random.keys`) of a student's own randomness, one per image, the same for both evaluations of
        guidance. A model with such randomness raises ValueError without them, others do not look at them.
        """
        check_condition(condition)
        c_skip, c_out, c_in, c_noise = self.preconditioning(each_time(sigma, y))
        exact = y.double()
        scaled = (per_image(c_in, exact) * exact).to(next(self.network.parameters()).dtype)
        if self.is_random and noise is None:
            raise ValueError("this student has randomness of its own: `noise` must be a key for each image")
        if self.settings.noise_channels:
            extra = normal(noise, (self.settings.noise_channels, *y.shape[2:]), scaled.dtype)
            scaled = torch.cat([scaled, extra], dim=1)
        masks = contextlib.nullcontext()
        if self.settings.noise_dropout:
            single = is_single(condition, guidance, self.settings.guided_channels)
            masks = keyed_dropout(self.network, noise if single else torch.cat([noise] * 2))
        with masks:
            limits = {"channels": y.shape[1], "guided_channels": self.settings.guided_channels}
            output = guided(self.network, scaled, c_noise, self._told(condition, c_noise), condition, guidance, **limits)
        x = per_image(c_skip, exact) * exact + per_image(c_out, exact) * output.double()
        return (x.clamp(-1, 1) if self.settings.clip and clip else x).to(y.dtype)

    def _told(self, condition: Condition | None, like: Tensor) -> Tensor | None:
        """w as the network is told it in the place of a second time, float64 [N], 0 for w = 1; None where it is not told."""
        if not self.settings.told_guidance:
            return None
        w = getattr(condition, "guidance", None)
        return torch.zeros_like(like) if w is None else self.settings.time_scale * (w - 1)

    def x_hat(
        self,
        z: Tensor,
        t: Tensor | float,
        schedule: Schedule,
        condition: Condition | None = None,
        guidance: float | Tensor = 1.0,
        noise: Tensor | None = None,
    ) -> Tensor:
        """x_hat of z = alpha_t x + sigma_t e, of any schedule, in z's dtype. z float [N, C, H, W], t float64 [N] or
        one number for all images.

        Where sigma_t / alpha_t is outside `range`, the nearest sigma inside is taken instead: above, with z's noise scaled down
        to it, so that t = 1, where alpha_t is 0, is the denoiser at its largest sigma. The rest as in `denoise`.
        """
        t = each_time(t, z)
        return self.denoise_within(z, schedule.alpha(t), schedule.sigma(t), condition, guidance, noise)

    def denoise_within(
        self,
        z: Tensor,
        alpha: Tensor,
        sigma: Tensor,
        condition: Condition | None = None,
        guidance: float | Tensor = 1.0,
        noise: Tensor | None = None,
        *,
        clip: bool = True,
    ) -> Tensor:
        """`x_hat` of z = alpha x + sigma e, alpha and sigma float64 [N]."""
        low, high = self.range
        within = (sigma / alpha).clamp(low, high)
        scale = torch.where(sigma > high * alpha, high / sigma, 1 / alpha)
        y = per_image(scale, z.double()) * z.double()
        return self.denoise(y, within, condition, guidance, noise, clip=clip).to(z.dtype)
