"""Moment matching distillation (Salimans et al., arXiv:2406.04103, algorithms 2 and 3) written down formula by formula.

For the cosine schedule and networks that predict v. Images and posteriors are float64; the instant method's Jacobian-vector
product is by double backward, as the definition of a derivative along a direction gives it to whoever has a backward pass only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # (z, t, label) -> x_hat


@dataclass
class Drawn:
    """x, noise and later float64 [N, C, R, R]; s < t float64 [N]; label int64 [N]."""

    x: Tensor
    noise: Tensor
    later: Tensor  # the noise of z_s
    s: Tensor
    t: Tensor
    label: Tensor | None


def draw(x: Tensor, label: Tensor | None, steps: int) -> Drawn:
    s = torch.rand(len(x), dtype=torch.float64, device=x.device)
    t = (s + torch.rand_like(s) / steps).clamp(max=1)
    return Drawn(x.double(), torch.randn_like(x.double()), torch.randn_like(x.double()), s, t, label)


def at(time: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma of the cosine schedule, [N, 1, 1, 1]."""
    angle = math.pi / 2 * time[:, None, None, None]
    return angle.cos(), angle.sin()


def denoiser(network: Callable[..., Tensor], time_scale: float) -> Denoiser:
    """x_hat = alpha z - sigma v, float64; network(x, t, s, label)."""

    def x_hat(z: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        alpha, sigma = at(t)
        return alpha * z - sigma * network(z.float(), time_scale * t, None, label).double()

    return x_hat


def noised(drawn: Drawn) -> Tensor:
    alpha, sigma = at(drawn.t)
    return alpha * drawn.x + sigma * drawn.noise


def posterior(drawn: Drawn, z_t: Tensor, x_tilde: Tensor) -> Tensor:
    """z_s ~ q(z_s | z_t, x~): means and precisions of two Gaussians multiplied."""
    (alpha_s, sigma_s), (alpha_t, sigma_t) = at(drawn.s), at(drawn.t)
    ratio = alpha_t / alpha_s
    jump = sigma_t**2 - ratio**2 * sigma_s**2
    variance = 1 / (1 / sigma_s**2 + ratio**2 / jump)
    mean = variance * (ratio / jump * z_t + alpha_s / sigma_s**2 * x_tilde)
    return (mean + variance.sqrt() * drawn.later).detach()


def weight(s: Tensor) -> Tensor:
    """w(s) of v: SNR + 1."""
    return 1 + torch.tan(math.pi / 2 * s) ** -2


def auxiliary_loss(student: Denoiser, auxiliary: Denoiser, teacher: Denoiser, drawn: Drawn) -> Tensor:
    with torch.no_grad():
        z_t = noised(drawn)
        x_tilde = student(z_t, drawn.t, drawn.label)
        z_s = posterior(drawn, z_t, x_tilde)
        g_theta = teacher(z_s, drawn.s, drawn.label)
    g_phi = auxiliary(z_s, drawn.s, drawn.label)
    both = ((x_tilde - g_phi) ** 2).sum((1, 2, 3)) + ((g_theta - g_phi) ** 2).sum((1, 2, 3))
    return (weight(drawn.s) * both).mean()


def student_loss(student: Denoiser, auxiliary: Denoiser, teacher: Denoiser, drawn: Drawn) -> Tensor:
    z_t = noised(drawn)
    x_tilde = student(z_t, drawn.t, drawn.label)
    with torch.no_grad():
        z_s = posterior(drawn, z_t, x_tilde)
        gap = auxiliary(z_s, drawn.s, drawn.label) - teacher(z_s, drawn.s, drawn.label)
    return (weight(drawn.s) * (x_tilde * gap).sum((1, 2, 3))).mean()


def instant_loss(student: Denoiser, teacher: Denoiser, parameters: list[Tensor], first: Drawn, second: Drawn) -> Tensor:
    """first and second: the minibatches A and B. The teacher's `parameters` require gradients, and keep none."""
    with torch.no_grad():
        z_t = noised(first)
        x_tilde = student(z_t, first.t, first.label)
        z_s = posterior(first, z_t, x_tilde)
    missed = ((x_tilde - teacher(z_s, first.s, first.label)) ** 2).sum((1, 2, 3))
    gradient = torch.autograd.grad((weight(first.s) * missed).mean(), parameters, allow_unused=True)

    z_t = noised(second)
    x_tilde = student(z_t, second.t, second.label)
    z_s = posterior(second, z_t, x_tilde)
    g_theta = teacher(z_s, second.s, second.label)
    dummy = torch.zeros_like(g_theta, requires_grad=True)
    pulled = torch.autograd.grad(g_theta, parameters, dummy, create_graph=True, allow_unused=True)
    products = [(p * -g).sum() for p, g in zip(pulled, gradient, strict=True) if p is not None and g is not None]
    along = torch.autograd.grad(sum(products), dummy)[0]
    return (weight(second.s) * ((x_tilde - g_theta.detach()) * along).sum((1, 2, 3))).mean()
