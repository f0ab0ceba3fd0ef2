"""The loss of MeanFlow (Geng et al., arXiv:2505.13447): a network that learns the mean velocity between two times.

With z_t = (1 - t) x + t e, whose velocity is v = e - x, the mean velocity from s to t is u(z_t, s, t) = 1/(t - s) times the integral
of the velocity from s to t (eq. 3), so that z_s = z_t - (t - s) u: IMM's flow map `euler_fm`. It obeys (eqs. 6 and 8)

    u = v - (t - s) du/dt,    du/dt = v du/dz + du/dt at fixed z, a Jacobian-vector product,

and the network is trained towards the right side, taken at itself and without gradient (eqs. 9 and 10). s is the paper's r.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..diffusion.process import per_image
from ..system.random import uniform


@dataclass(frozen=True)
class MeanFlowSettings:
    """The loss of MeanFlow. Defaults are the paper's for ImageNet (table 4)."""

    share: float = 0.25  # of the images with s < t; the others have s = t, where it is flow matching
    time_mean: float = -0.4  # of logit t and logit s, which are normal
    time_std: float = 1.0
    power: float = 1.0  # p of the adaptive weight; 0: the plain square
    floor: float = 1e-3  # c of the adaptive weight


def draw_times(settings: MeanFlowSettings, key: Tensor) -> tuple[Tensor, Tensor]:
    """(s, t), float64 [N], of keys int64 [N]: the smaller and the larger of two draws, but for `share` of the images s = t."""
    draws = uniform(key, (3,))
    times = torch.sigmoid(settings.time_mean + settings.time_std * torch.special.ndtri(draws[:, :2]))
    t = times.amax(1)
    return torch.where(draws[:, 2] < settings.share, times.amin(1), t), t


def velocity_and_target(
    u: Callable[[Tensor, Tensor], Tensor], z: Tensor, v: Tensor, s: Tensor, t: Tensor
) -> tuple[Tensor, Tensor]:
    """(u(z, t), v - (t - s) du/dt), both [N, C, H, W], the second without gradient. z, v [N, C, H, W]; s, t float64 [N].

    u: (z, t) -> the mean velocity down to s. The derivative is along the path: dz/dt = v, ds/dt = 0. Attention is the plain one: no
    fused kernel has a forward-mode rule.
    """
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.jit.script")  # torch's own, of its own rules
        found, along = jvp(u, (z, t), (v, torch.ones_like(t)))
    return found, (v - per_image(t - s, v) * along).detach()


def mean_flow_loss(settings: MeanFlowSettings, u: Tensor, target: Tensor) -> Tensor:
    """Of each image, float64 [N]: |u - target|^2 / (|u - target|^2 + c)^p, whose denominator has no gradient (appendix B.2)."""
    square = (u - target).double().square().flatten(1).sum(1)
    return square / (square.detach() + settings.floor) ** settings.power
