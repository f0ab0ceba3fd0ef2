"""The squared maximum mean discrepancy between two small, nearly equal sets of particles, without cancellation.

IMM's loss is the V-statistic (arXiv:2503.07565, eq. 67)

    1/M^2 sum_jk  k(y_t^j, y_t^k) + k(y_r^j, y_r^k) - k(y_t^j, y_r^k) - k(y_r^j, y_t^k)

where y_t = y_r + delta with a delta of down to 1e-7. Every kernel value is near 1 and the sum is of the order of delta (the
diagonal) and delta^2 (the rest), so that float32 arithmetic, and for RBF even float64, would return noise. Here nothing
large is ever subtracted. With D = y_r^j - y_r^k the four squared distances of a pair (j, k) are P, P + u, P + v and
P + u + v + c where

    P = |D|^2     u = 2 <D, delta_j> + |delta_j|^2     v = -2 <D, delta_k> + |delta_k|^2     c = -2 <delta_j, delta_k>

and the differences of kernels follow from u, v, c in closed form. All of it is float64, inner products included: float32 ones
would be rounded to TF32 on a GPU that is allowed to. Error against exact arithmetic (tests/test_mmd.py), for |delta| from
1e-7 to 1 of the particles' size and w~ up to 1e5: 1e-12 relative for value and gradient; 1e-7 for a float32 gradient.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def group_mmd(difference: Tensor, y_r: Tensor, kernel_weight: Tensor, kernel: str, floor: float) -> Tensor:
    """The squared MMD of every group, float64 [G].

    Args:
        difference: y_t - y_r, [G, M, D]; the gradient flows through it.
        y_r: [G, M, D]; must not require gradient (it is the target).
        kernel_weight: w~, float64 [G].
        kernel: "laplace", k = exp(-w~ max(|x - y|, floor) / D), or "rbf", k = exp(-w~ |x - y|^2 / (2 D)) (appendix C.8).
        floor: smallest distance of the Laplace kernel. Two different particles nearer than this count as this far apart in
            both sets, which moves the value by less than w~ floor / D.
    """
    size = y_r.shape[1]
    difference, y_r = difference.double(), y_r.double()
    between = y_r[:, :, None] - y_r[:, None]  # D, [G, M, M, D]
    toward = torch.einsum("gjkd,gjd->gjk", between, difference)  # <D, delta_j>; <D, delta_k> is minus its transpose
    inner = torch.einsum("gjd,gkd->gjk", difference, difference)  # <delta_j, delta_k>
    length = inner.diagonal(dim1=1, dim2=2)  # |delta_j|^2
    p = between.pow(2).sum(-1)
    u = 2 * toward + length[:, :, None]
    v = u.transpose(1, 2)
    c = -2 * inner
    scale = (kernel_weight / y_r.shape[2])[:, None, None]
    terms, matched = KERNELS[kernel]
    # Off the diagonal; the diagonal itself is replaced by harmless numbers, for a gradient without 0/0.
    diagonal = torch.eye(size, dtype=torch.bool, device=y_r.device)
    pairs = terms(*(torch.where(diagonal, fill, m) for fill, m in ((1.0, p), (0.0, u), (0.0, v), (0.0, c))), scale, floor)
    pairs = torch.where(diagonal, 0.0, pairs)
    return (pairs.sum((1, 2)) + matched(length, scale[:, 0], floor).sum(1)) / size**2


def _laplace(p: Tensor, u: Tensor, v: Tensor, c: Tensor, scale: Tensor, floor: float) -> Tensor:
    """k_tt + k_rr - k_tr - k_rt of a pair, exact to first order in c and in u v."""
    p = p.clamp(min=floor**2)
    near, far_u, far_v = p.sqrt(), (p + u).clamp(min=floor**2).sqrt(), (p + v).clamp(min=floor**2).sqrt()
    far = (p + u + v + c).clamp(min=floor**2).sqrt()
    step_u, step_v = u / (far_u + near), v / (far_v + near)  # far_u - near, far_v - near
    # far + near - far_u - far_v, by (A^2 - B^2) / (A + B) twice
    bend = (c + 2 * (p * c - u * v) / (far * near + far_u * far_v)) / (far + near + far_u + far_v)
    return _mixed_difference((near, far_u, far_v, far), (step_u, step_v, bend), scale)


def _rbf(p: Tensor, u: Tensor, v: Tensor, c: Tensor, scale: Tensor, floor: float) -> Tensor:
    """The same for half the squared distance, where far + near - far_u - far_v is c / 2 itself."""
    return _mixed_difference((p, p + u, p + v, p + u + v + c), (u, v, c), 0.5 * scale)


def _mixed_difference(lengths: tuple[Tensor, ...], steps: tuple[Tensor, ...], scale: Tensor) -> Tensor:
    """k(near) - k(far_u) - k(far_v) + k(far) with k = exp(-scale length), from steps far_u - near, far_v - near and bend."""
    near, far_u, far_v, far = (torch.exp(-scale * length) for length in lengths)
    exponents = [-scale * step for step in steps]
    # Steps that change a kernel by a factor need no care, and their expm1 can overflow
    large = torch.stack([e.detach().abs() for e in exponents]).amax(0) > 1
    x, y, z = (torch.expm1(torch.where(large, 0.0, e)) for e in exponents)
    # exp(a + b + d) - exp(a) - exp(b) + 1 in terms of x = exp(a) - 1, ...
    return torch.where(large, near - far_u - far_v + far, near * (x * y + (1 + x) * (1 + y) * z))


def _matched_rbf(length: Tensor, scale: Tensor, floor: float) -> Tensor:
    """The diagonal: 2 k(y, y) - 2 k(y_t^j, y_r^j), [G, M]."""
    return 2 * _one_minus_exp(0.5 * scale * length)


def _matched_laplace(length: Tensor, scale: Tensor, floor: float) -> Tensor:
    """The same for the Laplace kernel."""
    beyond = length.clamp(min=floor**2).sqrt() - floor  # clamped before the root: no infinite gradient at delta = 0
    return 2 * torch.exp(-scale * floor) * _one_minus_exp(scale * beyond)


def _one_minus_exp(x: Tensor) -> Tensor:
    """1 - exp(-x) for x >= 0. The derivative of expm1 is computed as its value + 1: exact near 0, lost far from it."""
    return torch.where(x > 1, 1 - torch.exp(-x), -torch.expm1(-x.clamp(max=1)))


KERNELS = {"laplace": (_laplace, _matched_laplace), "rbf": (_rbf, _matched_rbf)}  # a pair of particles, and one with itself
Kernel = Literal[tuple(KERNELS)]
