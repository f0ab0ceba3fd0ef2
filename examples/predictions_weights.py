"""How much each prediction of a sampler weighs in the final sample: ancestral (DDPM) forgets the early ones, DDIM keeps them.

    python examples/predictions_weights.py
    python examples/predictions_weights.py --steps 4 --schedule fm --out runs/weights.png

A sampler of k steps calls the network k times, at t = 1, (k - 1) / k, ..., 1 / k, and returns the last prediction. What that
last call is given is noise and a weighted sum of the predictions before it. The table has these weights: Salimans et al.,
arXiv:2406.04103, draw them for DDPM and DDIM. Stochasticity is 1 for the first and 0 for the second. Where z_1 is nothing but
noise, their sum is alpha at t = 1 / k; DDPM's are in proportion to the growth of the signal-to-noise ratio over a step, DDIM's to
that of its square root.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from mmgen.report.charts import Panel, line_chart
from mmgen.diffusion.process import posterior
from mmgen.diffusion.schedules import Schedule, ScheduleSettings, make_schedule

SCHEDULES = ("fm", "vp_cosine", "ddpm_linear", "edm")
SAMPLERS = {"DDPM": 1.0, "half": 0.5, "DDIM": 0.0}  # stochasticity


def weights(schedule: Schedule, steps: int, stochasticity: float) -> list[float]:
    """Of predictions 1 to steps - 1 in the input of the last call, in the order of the calls.

    Each step is linear, z_s = a z_t + b x_hat + noise, so that it multiplies the weights so far by a and adds its own, b.
    """
    found: list[float] = []
    for call in range(steps - 1):
        t, s = (torch.tensor([(steps - n) / steps], dtype=torch.float64) for n in (call, call + 1))
        on_z, on_x, _ = posterior(schedule, s, t, stochasticity=stochasticity)
        found = [weight * on_z.item() for weight in found] + [on_x.item()]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=8, help="calls of the network, at least 2 (default 8)")
    parser.add_argument("--schedule", choices=SCHEDULES, default="vp_cosine", help="noise schedule (default vp_cosine)")
    parser.add_argument("--out", type=Path, default=Path("runs/predictions-weights.png"), help="the picture")
    options = parser.parse_args()
    if options.steps < 2:
        parser.error("--steps must be at least 2: the sample of one step is its only prediction")
    schedule = make_schedule(ScheduleSettings(options.schedule))
    columns = {name: weights(schedule, options.steps, stochasticity) for name, stochasticity in SAMPLERS.items()}

    print(f"Weights of the predictions in the last call's input: {options.schedule}, {options.steps} steps\n")
    print("| call | at t | " + " | ".join(f"{name} ({SAMPLERS[name]:g})" for name in columns) + " |")
    print("|" + "---|" * (2 + len(columns)))
    for call, row in enumerate(zip(*columns.values(), strict=True)):
        t = (options.steps - call) / options.steps
        print(f"| {call + 1} | {t:.4g} | " + " | ".join(f"{weight:.4f}" for weight in row) + " |")

    print("| sum | | " + " | ".join(f"{sum(column):.4f}" for column in columns.values()) + " |")

    calls = [float(call) for call in range(1, options.steps)]
    series = {f"{name} ({SAMPLERS[name]:g})": (calls, column) for name, column in columns.items()}
    panels = [
        Panel(title, "call of the network, the first at t = 1", series, log_y)
        for title, log_y in (("weight in the sample", False), ("the same, logarithmic", True))
    ]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    line_chart(panels).save(options.out, format="png")
    print(f"\n{options.out}")


if __name__ == "__main__":
    main()
