"""The diffusion process between data and noise, for any schedule."""

from __future__ import annotations

from torch import Tensor

from .schedules import Schedule


def per_image(coefficient: Tensor, images: Tensor) -> Tensor:
    """A float64 coefficient [N] in the images' dtype, shaped to multiply images [N, ...]."""
    return coefficient.to(images.dtype).reshape(-1, *[1] * (images.ndim - 1))


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
