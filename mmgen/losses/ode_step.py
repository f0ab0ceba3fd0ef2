"""A step of a teacher's ODE, for consistency distillation (Song et al., arXiv:2303.01469, algorithm 2 and eq. 6).

IMM, and consistency training, take x_r from the image and the noise that x_t was made of. The teacher's step from x_t to r is taken the
same way from the image and the noise that the teacher finds in x_t, so that nothing else in the loss changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ..diffusion.process import diffuse, per_image
from ..diffusion.schedules import Schedule

Solver = Literal["heun", "ddim"]


def image_and_noise(
    x_hat: Callable[[Tensor, Tensor], Tensor], schedule: Schedule, x_t: Tensor, t: Tensor, r: Tensor, solver: Solver
) -> tuple[Tensor, Tensor]:
    """(x, noise), float64 [N, ...], with alpha_t x + sigma_t noise = x_t, and alpha_r x + sigma_r noise the solver's step from t to r.

    x_hat: (x_t float64 [N, ...], t float64 [N]) -> the teacher's mean of the images behind x_t. r <= t, float64 [N].

    With y = x_t / alpha_t and eta = sigma_t / alpha_t the ODE is dy/d eta = (y - x_hat) / eta, the noise in x_t (Karras et al.,
    arXiv:2206.00364, eqs. 1 and 3). ddim is Euler's method in eta; heun takes the mean of the noise at both ends (their algorithm 1),
    where alpha_t must not be 0.
    """

    def parts(z: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        image = x_hat(z, time).double()
        return image, (z - per_image(schedule.alpha(time), z) * image) / per_image(schedule.sigma(time), z)

    x_t = x_t.double()
    x, noise = parts(x_t, t)
    if solver == "heun":
        _, at_r = parts(diffuse(schedule, x, noise, r), r)
        noise = torch.where(per_image(schedule.sigma(r), noise) > 0, (noise + at_r) / 2, noise)  # at 0 there is no noise to see
        x = (x_t - per_image(schedule.sigma(t), noise) * noise) / per_image(schedule.alpha(t), noise)
    return x, noise
