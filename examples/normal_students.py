"""Where algorithm 2 of moment matching ends on normal data, in numbers: whether its student keeps the variance, what its own noise changes, and what Neon does.

    python examples/normal_students.py               # a minute

Data are N(0, c^2), so the teacher is linear: g_theta(z_s) = alpha_s c^2 / v_s z_s with v_s = alpha_s^2 c^2 + sigma_s^2. A student is x~ = a(t) z_t + b(t) xi,
xi being its own noise; the auxiliary is exact, the slope of x~ on z_s over all t from which z_s is drawn (Salimans et al., arXiv:2406.04103, algorithm 2:
s ~ U(0, 1), t = min(1, s + delta), delta ~ U(0, 1/k)). a and b follow the gradient of the student's loss, each t with a step of its own size, from the teacher's a
and a share of the b with which x~ is distributed as the data behind z_t. Then the student is sampled in k steps. The table has the variance of z after
each, and at last of x~, in parts of the right one, and the largest error of the moments left.

The students without noise are then led away from the denoiser of their own samples, as `mmgen neon` does: a + w (a - a'), where a' has the variance of
those samples in place of c^2 (Neon, arXiv:2510.03597, eq. 1, with a' learned to its end).
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from mmgen.diffusion.process import posterior
from mmgen.diffusion.schedules import ScheduleSettings, make_schedule

SCHEDULE = make_schedule(ScheduleSettings("vp_cosine"))
PER_STEP = 8  # times in a step of the student
WEIGHTS = (0.1, 0.2, 0.5, 1.0)  # of Neon
LAST = 0.999  # in place of 1, where a teacher's largest sigma ends, too: at 1 the teacher's a is 0, from where it would not move


def times(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def variance(t: Tensor, c2: float) -> Tensor:
    """Of z_t."""
    return SCHEDULE.alpha(t) ** 2 * c2 + SCHEDULE.sigma(t) ** 2


def sampled(a: Tensor, b: Tensor, steps: int, c2: float) -> list[float]:
    """The variance after each of the student's steps, in parts of the data's. a, b: [steps * PER_STEP]."""
    v, found = times(1.0), []
    for j in range(steps, 0, -1):
        t, s, i = times(min(j / steps, LAST)), times((j - 1) / steps), j * PER_STEP - 1
        on_z, on_x, std = posterior(SCHEDULE, s, t)
        v = (on_z + on_x * a[i]) ** 2 * v + (on_x * b[i]) ** 2 + std**2
        found.append((v / variance(s, c2)).item())
    return found


def slope(t: Tensor, c2: float) -> Tensor:
    """a of the denoiser of N(0, c2): E[x | z_t] = a z_t."""
    return SCHEDULE.alpha(t) * c2 / variance(t, c2)


def grid(steps: int) -> Tensor:
    """The t of a and b."""
    count = steps * PER_STEP
    return ((torch.arange(count, dtype=torch.float64) + 1) / count).clamp(max=LAST)


def led_away(a: Tensor, samples: float, weight: float) -> Tensor:
    """A student without noise, led away from the denoiser of its own samples, of this variance."""
    return a + weight * (a - slope(grid(len(a) // PER_STEP), samples))


def student(steps: int, c2: float, own_noise: float, iterations: int = 40_000, rate: float = 0.02) -> tuple[Tensor, Tensor, float]:
    """a, b and the largest error of the moments. own_noise: the share of b at the beginning."""
    count, t = steps * PER_STEP, grid(steps)
    s = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    later = (torch.arange(count)[:, None] - torch.arange(count)) % count  # of t after s, [t, s]
    drawn = ((t[:, None] > s) & (later < PER_STEP)).double() / PER_STEP
    drawn[-1] += 1 - drawn.sum(0)  # t = 1 for all beyond
    on_z, on_x, std = (each.reshape(count, count) for each in posterior(SCHEDULE, torch.minimum(s, t[:, None]).flatten(), t[:, None].expand(count, count).flatten()))
    v, target = variance(t, c2)[:, None], slope(s, c2)
    weight = drawn * ((SCHEDULE.alpha(s) / SCHEDULE.sigma(s)) ** 2 + 1)  # w(s) = SNR + 1
    size = (weight * (on_z + on_x)).sum(1)
    a, b = slope(t, c2), own_noise * (c2 * SCHEDULE.sigma(t) ** 2 / variance(t, c2)).sqrt()
    for _ in range(iterations):
        on_data = on_z + on_x * a[:, None]  # of z_s on z_t
        spread = on_data**2 * v + (on_x * b[:, None]) ** 2 + std**2
        together = a[:, None] * on_data * v + on_x * b[:, None] ** 2
        error = (drawn * together).sum(0) / (drawn * spread).sum(0) - target  # slope of g_phi - g_theta
        a = a - rate * (weight * error * on_data * v).sum(1) / size
        b = b - rate * (weight * error * on_x * b[:, None]).sum(1) / size
    return a, b, error.abs().max().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=8, help="of the student (default 8)")
    parser.add_argument("--iterations", type=int, default=40_000, help="of its training (default 40,000)")
    options = parser.parse_args()
    print("| variance of the data | student | variance after each step, and of the samples | error |\n|---|---|---|---|")

    def row(c2: float, name: str, found: list[float], error: str) -> None:
        print(f"| {c2} | {name} | {' '.join(f'{value:.2f}' for value in found)} | {error} |", flush=True)

    for c2 in (0.1, 0.3):
        for own_noise in (0.0, 0.1, 0.5, 1.0):
            a, b, error = student(options.steps, c2, own_noise, options.iterations)
            found = sampled(a, b, options.steps, c2)
            row(c2, f"own noise at first: {own_noise}", found, f"{error:.4f}")
            for weight in WEIGHTS if own_noise == 0 else ():
                row(c2, f"that, by Neon with w = {weight}", sampled(led_away(a, found[-1] * c2, weight), b, options.steps, c2), "")


if __name__ == "__main__":
    main()
