"""Averages of the weights under a power function: decays while training, and sums of such averages that make others (EDM2).

Karras et al., arXiv:2312.02696, section 3; equations are those of the paper. The profile of an average is the weight that each moment of
the training has in it: p(tau) ~ tau^gamma up to its end. Its length is its standard deviation, divided by the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LONGEST = 12**-0.5  # the length of the plain mean of all weights so far


def exponent(length: float) -> float:
    """The exponent gamma of the profile p(tau) ~ tau^gamma whose relative standard deviation is `length` (equation 126)."""
    return float(np.roots([1, 7, 16 - length**-2, 12 - length**-2]).real.max())


def power_decay(length: float, images: int, batch_size: int) -> float:
    """The decay of the step after `images` images (equation 127): 0 at the first step, of which the average is then the weights."""
    return (images / (images + batch_size)) ** (exponent(length) + 1)


def average_name(length: float) -> str:
    """What the average is called that a run tracks: in file names and for --ema."""
    return f"length{length:g}"


def post_hoc_name(length: float) -> str:
    """Likewise one that is made after training."""
    return f"posthoc{length:g}"


def inner_products(t: np.ndarray, gamma: np.ndarray, other_t: np.ndarray, other_gamma: np.ndarray) -> np.ndarray:
    """Of each profile of the one kind with each of the other (equation 151), float64 [n, m]. A profile: its end t, its exponent."""
    a, b, x, y = t[:, None], other_t[None], gamma[:, None], other_gamma[None]
    both = np.minimum(a, b)
    return (x + 1) * (y + 1) / (x + y + 1) * (both / a) ** x * (both / b) ** y / np.maximum(a, b)


def coefficients(t: Sequence[float], lengths: Sequence[float], end: float, length: float) -> tuple[np.ndarray, float]:
    """What each snapshot counts in the average of `length` at time `end` (algorithm 3), adding up to 1 as in the authors' code.

    Also the error: the distance of the two profiles, divided by the norm of the wanted one.
    """
    times, gamma = np.array(t, np.float64), np.array([exponent(one) for one in lengths])
    wanted = np.array([end], np.float64), np.array([exponent(length)])
    gram, right = inner_products(times, gamma, times, gamma), inner_products(times, gamma, *wanted)[:, 0]
    scale = np.diag(gram) ** -0.5
    found = scale * np.linalg.solve(scale[:, None] * gram * scale, scale * right)
    found /= found.sum()
    norm = inner_products(*wanted, *wanted).item()
    return found, max(0.0, (norm - 2 * found @ right + found @ gram @ found) / norm) ** 0.5
