"""Moment matching distillation (Salimans et al., arXiv:2406.04103): a student g_eta whose outputs x~, noised again to z_s, have
the conditional mean E[x~ | z_s] that the teacher g_theta gives.

Algorithm 2, alternating: an auxiliary denoiser g_phi learns that mean, the student follows g_theta - g_phi. Algorithm 3, instant:
in g_phi's place, one infinitesimal step of it from the teacher, which is a Jacobian-vector product in the teacher's parameters.
Losses are given per image; what is descended is their mean over the global batch.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..diffusion.process import per_image, posterior, unconditional
from ..system.random import normal, uniform
from ..diffusion.schedules import Schedule
from .denoising import Weighting

Tensors = Mapping[str, Tensor]  # by name of the teacher's parameter
Function = Callable[[Tensors], Tensor]  # parameters -> g_theta(z_s) [N, ...], z_s and all else fixed

PRECONDITIONER_EPS = 1e-8


@dataclass(frozen=True)
class MomentSettings:
    """The loss of moment matching distillation."""

    method: Literal["alternating", "instant"] = "alternating"  # algorithm 2, or 3
    weighting: Weighting = "v"  # w(s): see `denoising.WEIGHTS`
    sigma_data: float = 0.5  # of weighting edm
    sigmoid_bias: float = 0.0  # of weighting sigmoid
    min_snr_gamma: float = 5.0  # of weighting min_snr
    reduction: Literal["sum", "mean"] = "sum"  # over the pixels of an image; with sum, a clip at 1 always acts
    posterior: Literal["conditional", "unconditional"] = "conditional"  # z_s from q(z_s | z_t, x~), or q(z_s | x~): ablation
    stochasticity: float = 1.0  # of q(z_s | z_t, x~): 1 is DDPM's, towards 0 DDIM's, which moment matching cannot use
    preconditioner: Literal["identity", "adam"] = "identity"  # Lambda of algorithm 3; adam: 1 / (sqrt(second moment) + 1e-8)
    auxiliary_updates: int = 1  # of algorithm 2: steps of the auxiliary to each of the student
    jvp: Literal["auto", "forward", "finite"] = "auto"  # of algorithm 3: forward-mode AD, differences, or what the network can


def draw_times(steps: int, key: Tensor) -> tuple[Tensor, Tensor]:
    """(s, t), float64 [N], one pair per key int64 [N]: s ~ U(0, 1), delta ~ U(0, 1/k), t = min(1, s + delta) (algorithm 2).

    0 < s < t <= 1, and t = 1 in one draw of 2k. The ends of a schedule that lie outside the teacher's trained range are not
    avoided: `Denoiser.x_hat` takes the nearest sigma inside.
    """
    s, delta = uniform(key, (2,)).unbind(1)
    return s, (s + delta / steps).clamp(max=1)


def draw_target(
    settings: MomentSettings, schedule: Schedule, s: Tensor, t: Tensor, z_t: Tensor, x_tilde: Tensor, key: Tensor
) -> Tensor:
    """z_s ~ q(z_s | z_t, x~), without gradient, in z_t's dtype; the arithmetic is float64.

    s, t: float64 [N]; z_t, x_tilde: [N, ...]; key: int64 [N], of the noise.
    """
    if settings.posterior == "unconditional":
        on_z, on_x, std = unconditional(schedule, s)
    else:
        on_z, on_x, std = posterior(schedule, s, t, stochasticity=settings.stochasticity)
    z, x = z_t.detach().double(), x_tilde.detach().double()
    noise = normal(key, x.shape[1:], torch.float64)
    return (per_image(on_z, z) * z + per_image(on_x, x) * x + per_image(std, x) * noise).to(z_t.dtype)


# ---------------------------------------------------------------------- algorithm 2


def auxiliary_loss(x_tilde: Tensor, g_phi: Tensor, g_theta: Tensor, w: Tensor, reduction: str = "sum") -> Tensor:
    """w(s) (||x~ - g_phi(z_s)||^2 + ||g_theta(z_s) - g_phi(z_s)||^2), float64 [N]; gradient through g_phi only.

    Its minimum is half way: g_phi = (E[x~ | z_s] + g_theta(z_s)) / 2. x_tilde, g_phi, g_theta: [N, ...]; w float64 [N].
    """
    to_student, to_teacher = (x_tilde.detach() - g_phi) ** 2, (g_theta.detach() - g_phi) ** 2
    return w * _over_pixels(to_student + to_teacher, reduction)


def student_loss(x_tilde: Tensor, g_phi: Tensor, g_theta: Tensor, w: Tensor, reduction: str = "sum") -> Tensor:
    """w(s) x~ . (g_phi(z_s) - g_theta(z_s)), float64 [N]; gradient through x~ only.

    Its value has no lower bound and says nothing of progress: `moment_gap` does.
    """
    return w * _over_pixels(x_tilde * (g_phi - g_theta).detach(), reduction)


def moment_gap(g_phi: Tensor, g_theta: Tensor) -> Tensor:
    """||E[x~ | z_s] - g_theta(z_s)|| as root mean square over the pixels, float64 [N], estimated by 2 ||g_phi - g_theta||.

    The auxiliary's optimum lies half way between the two.
    """
    return 2 * distance(g_phi, g_theta)


def distance(a: Tensor, b: Tensor) -> Tensor:
    """Root mean square over the pixels of a - b, float64 [N], without gradient."""
    return _over_pixels((a.detach() - b.detach()) ** 2, "mean").sqrt()


def _over_pixels(values: Tensor, reduction: str) -> Tensor:
    flat = values.flatten(1)
    return flat.sum(1, dtype=torch.float64) if reduction == "sum" else flat.mean(1, dtype=torch.float64)


# ---------------------------------------------------------------------- algorithm 3


def teacher_loss(x_tilde: Tensor, g_theta: Tensor, w: Tensor, reduction: str = "sum") -> Tensor:
    """w(s) ||x~ - g_theta(z_s)||^2, float64 [N]; gradient through g_theta only."""
    return w * _over_pixels((x_tilde.detach() - g_theta) ** 2, reduction)


def teacher_gradient(
    g_theta: Function, parameters: Tensors, x_tilde: Tensor, w: Tensor, reduction: str = "sum"
) -> dict[str, Tensor]:
    """The gradient of the teacher's mean loss on generated images, with respect to its parameters (algorithm 3, minibatch A).

    `g_theta(parameters)` is the teacher's x_hat of z_s [N, ...]; the parameters themselves are not touched.
    """
    with torch.enable_grad():
        free = {name: value.detach().requires_grad_() for name, value in parameters.items()}
        loss = teacher_loss(x_tilde, g_theta(free), w, reduction).mean()
        gradients = torch.autograd.grad(loss, list(free.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(free, gradients))


def preconditioned(gradient: Tensors, second_moments: Tensors | None = None) -> dict[str, Tensor]:
    """nu = -Lambda gradient: Lambda is 1 / (sqrt(v) + 1e-8) with Adam's second moments v, or the identity where they are None.

    Raises ValueError where they are not those of the same parameters.
    """
    if second_moments is None:
        return {name: -value for name, value in gradient.items()}
    if second_moments.keys() != gradient.keys():
        raise ValueError(f"second moments of other parameters: {sorted(second_moments.keys() ^ gradient.keys())[:3]}")
    return {name: -value / (second_moments[name].sqrt() + PRECONDITIONER_EPS) for name, value in gradient.items()}


def mean_squares(gradients: Iterable[Tensors]) -> dict[str, Tensor]:
    """The mean of the squares of gradients, each of one batch of data: Adam's second moments at its equilibrium.

    Raises ValueError where there are no gradients.
    """
    total: dict[str, Tensor] = {}
    count = 0
    for count, gradient in enumerate(gradients, start=1):
        total = {name: value**2 + total[name] if total else value**2 for name, value in gradient.items()}
    if not count:
        raise ValueError("second moments need at least one gradient")
    return {name: value / count for name, value in total.items()}


def forward_derivative(g_theta: Function, parameters: Tensors, direction: Tensors) -> tuple[Tensor, Tensor]:
    """(g_theta(z_s), J nu): x_hat and its derivative along `direction` in the parameters, by forward-mode AD.

    Both [N, C, H, W]; parameters and direction: name -> tensor, of the same shapes. Exact, at the cost of about two evaluations,
    without storing activations. Attention is the plain one: no fused kernel has a forward-mode rule. Raises
    NotImplementedError where another operation has none.
    """
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.jit.script")  # torch's own, of its own rules
        duals = {
            name: forward_ad.make_dual(value.detach(), direction[name].to(value.dtype)) for name, value in parameters.items()
        }
        value, derivative = forward_ad.unpack_dual(g_theta(duals))
        return value, torch.zeros_like(value) if derivative is None else derivative


def finite_derivative(
    g_theta: Function, parameters: Tensors, direction: Tensors, step: float | None = None
) -> tuple[Tensor, Tensor]:
    """(g_theta(z_s), J nu), both [N, C, H, W], by a central difference: two evaluations, at parameters theta +- h nu.

    h ||nu|| = step ||theta||, `step` unset: the cube root of the dtype's spacing, where rounding and curvature are equally small
    (relative errors near 1e-4 in float32, 1e-10 in float64). Evaluated without autocast or TF32, whose rounding would drown the
    difference. The first of the pair is the mean of the two evaluations, g_theta(z_s) to second order.
    """
    dtype = next(iter(parameters.values())).dtype
    step = torch.finfo(dtype).eps ** (1 / 3) if step is None else step
    length, weights = (nn.utils.get_total_norm([value.detach() for value in each.values()]) for each in (direction, parameters))
    h = torch.where(length > 0, step * weights / length, 1.0)
    with torch.no_grad(), _full_precision(h.device.type):
        above, below = (
            g_theta({name: (value + sign * h * direction[name]).to(value.dtype) for name, value in parameters.items()})
            for sign in (1, -1)
        )
    return (above + below) / 2, ((above.double() - below.double()) / (2 * h)).to(above.dtype)


@contextlib.contextmanager
def _full_precision(device: str) -> Iterator[None]:
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


def lacks_forward_mode(g_theta: Function, parameters: Tensors) -> str | None:
    """None where `forward_derivative` works for this network, else torch's reason. It is tried: give a small z_s."""
    try:
        forward_derivative(g_theta, parameters, parameters)
    except NotImplementedError as error:
        return str(error).partition("\n")[0][:200]
    return None


def instant_loss(x_tilde: Tensor, g_theta: Tensor, derivative: Tensor, w: Tensor, reduction: str = "sum") -> Tensor:
    """w(s) (x~ - g_theta(z_s)) . J nu, float64 [N], of minibatch B with nu from minibatch A; gradient through x~ only.

    Its mean is 1/2 <Lambda grad L_A, grad L_B> with L the teacher's mean loss, whose gradient through x~_B alone it has too. The
    minibatches being independent, that estimates 1/2 ||E grad L||^2 in the norm of Lambda without bias: it falls as training
    goes on, to 0 where generated images are a stationary point of the teacher's loss. (g_theta, without gradient here, is what
    makes the value meaningful; the gradient is that of x~ . J nu, as algorithm 3 has it.)
    """
    return w * _over_pixels((x_tilde - g_theta.detach()) * derivative.detach(), reduction)
