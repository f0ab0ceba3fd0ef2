"""The diffusion process between data and noise, for any schedule."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError, shortened
from .schedules import Schedule


def per_image(coefficient: Tensor, images: Tensor) -> Tensor:
    """A float64 coefficient [N] in the images' dtype, shaped to multiply images [N, ...]."""
    return coefficient.to(images.dtype).reshape(-1, *[1] * (images.ndim - 1))


def each_time(t: Tensor | float, images: Tensor) -> Tensor:
    """A time for each of the images [N, ...], float64 [N] on their device, from one for all or one for each. Raises ConfigError."""
    try:
        times = torch.as_tensor(t, dtype=torch.float64, device=images.device)
    except (TypeError, ValueError, RuntimeError):
        raise ConfigError(f"a time must be a number, or a tensor of one for each image, not {shortened(t)}") from None
    if times.ndim == 0 or times.shape == (len(images),):
        return times.expand(len(images))
    raise ConfigError(f"times must be one number, or one for each of the {len(images)} images, not of shape {tuple(times.shape)}")


def diffuse(schedule: Schedule, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """z_t = alpha_t x + sigma_t noise (IMM, section 2). x, noise [N, ...]; t float64 [N]."""
    return per_image(schedule.alpha(t), x) * x + per_image(schedule.sigma(t), x) * noise


def ddim_coefficients(schedule: Schedule, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(on z_t, on x): DDIM(z_t, x, s, t) = (sigma_s / sigma_t) z_t + (alpha_s - (sigma_s / sigma_t) alpha_t) x (IMM, eq. 11).

    The target time s comes first, as in the paper; s <= t, both float64 [N], t > 0. Going from t to s by way of any r gives
    what going straight gives.
    """
    on_z = schedule.sigma(s) / schedule.sigma(t)
    return on_z, schedule.alpha(s) - on_z * schedule.alpha(t)


def posterior(schedule: Schedule, s: Tensor, t: Tensor, *, stochasticity: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """(on_z, on_x, std) of q(z_s | z_t, x) = N(on_z z_t + on_x x, std^2), all float64 [N], for s <= t.

    With rho = alpha_t sigma_s / (alpha_s sigma_t), so that rho^2 is the SNR at t over that at s, std^2 = (1 - rho^2) sigma_s^2
    is the exact posterior's, DDPM's lower variance (Ho et al., arXiv:2006.11239, eq. 7; Salimans et al., arXiv:2406.04103).
    `stochasticity` e in [0, 1]: std is e times that, and the mean is alpha_s x + sqrt(sigma_s^2 - std^2) times the noise that
    z_t has, so that z_s keeps its distribution given x (Song et al., arXiv:2010.02502, eq. 12); 0 is `ddim_coefficients`.
    At s = t it is z_t itself, at s = 0 (sigma 0) x, and from t = 1, where alpha is 0, with e = 1 it does not depend on z_t.
    """
    alpha_s, sigma_s, alpha_t, sigma_t = schedule.alpha(s), schedule.sigma(s), schedule.alpha(t), schedule.sigma(t)
    sigmas = torch.where(sigma_t > 0, sigma_s / sigma_t, 1.0)  # where both are 0, s = t
    rho = torch.where(alpha_s > 0, alpha_t / alpha_s, 1.0) * sigmas
    on_z = sigmas * (1 - stochasticity**2 + (stochasticity * rho) ** 2).sqrt()
    std = stochasticity * sigma_s * (1 - rho**2).clamp(min=0).sqrt()
    return on_z, alpha_s - on_z * alpha_t, std


def unconditional(schedule: Schedule, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(0, alpha_s, sigma_s), all float64 [N]: z_s drawn from q(z_s | x), whatever z_t was. Read as `posterior`."""
    return torch.zeros_like(s), schedule.alpha(s), schedule.sigma(s)
