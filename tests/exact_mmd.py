"""The squared MMD by its definition in exact arithmetic: integers for the vectors, 60 digits for the kernels."""

from __future__ import annotations

import mpmath
import numpy as np

_BITS = 400  # vectors are integers in units of 2^-400: every float32 and every float64 here is exact
mpmath.mp.dps = 60


def _integers(values) -> np.ndarray:
    return np.vectorize(lambda v: int(mpmath.ldexp(mpmath.mpf(float(v)), _BITS)), otypes=[object])(values)


def exact_mmd(difference, y_r, weight: float, kernel: str, floor: float) -> tuple[float, np.ndarray]:
    """Value and gradient in y_t of one group, [M, D], with y_t = y_r + difference (arXiv:2503.07565, eq. 67)."""
    target = _integers(y_r)
    student = target + _integers(difference)
    size, dim = target.shape
    scale = mpmath.mpf(weight) / dim

    def compare(a, b):
        """k(a, b) and the factor of (a - b) in its gradient."""
        gap = a - b
        squared = mpmath.ldexp(mpmath.mpf(int((gap * gap).sum())), -2 * _BITS)
        if kernel == "rbf":
            value = mpmath.exp(-scale * squared / 2)
            return value, -scale * value, gap
        distance = mpmath.sqrt(squared)
        value = mpmath.exp(-scale * max(distance, mpmath.mpf(floor)))
        return value, -scale * value / distance if distance > floor else mpmath.mpf(0), gap

    total, gradient = mpmath.mpf(0), np.zeros((size, dim), dtype=object)
    for j in range(size):
        for k in range(size):
            tt, slope_tt, gap_tt = compare(student[j], student[k])
            tr, slope_tr, gap_tr = compare(student[j], target[k])
            rr, _, _ = compare(target[j], target[k])
            total += tt + rr - 2 * tr
            gradient[j] = gradient[j] + 2 * _fixed(slope_tt) * gap_tt - 2 * _fixed(slope_tr) * gap_tr
    as_float = np.vectorize(lambda v: v / (1 << 2 * _BITS), otypes=[np.float64])
    return float(total / size**2), as_float(gradient) / size**2


def _fixed(number) -> int:
    return int(mpmath.ldexp(number, _BITS))
