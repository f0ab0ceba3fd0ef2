"""Do models of the digits' captions draw what the prompt says, also combinations that training never named?

    mmgen train-teacher --preset digits-text
    mmgen distill --teacher runs/digits-text --steps 8 --out runs/digits-text-student
    python examples/digits_text.py runs/digits-text:64 runs/digits-text:8 runs/digits-text-student:8

The digit is judged by the nearest of the 1,797 real images (1-NN on pixels); its own held-out accuracy, each real image judged by
the nearest other one, is shown first. A thin digit must have less ink than the median of its class, a bold one more. FD is the Fréchet
distance of the pixels of 1,797 images, drawn by captions of the training data at random, from the real ones.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

import mmgen
from mmgen import data

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
THIN, BOLD = "thin", "bold"
STROKES = (THIN, "", BOLD)


def nearest(images: np.ndarray, real: np.ndarray, held_out: bool = False) -> np.ndarray:
    """The row of the nearest real image; `held_out`: images are `real`, and none is its own neighbour."""
    squares = torch.cdist(torch.from_numpy(images.reshape(len(images), -1)).double(), torch.from_numpy(real.reshape(len(real), -1)).double())
    if held_out:
        squares.fill_diagonal_(torch.inf)
    return squares.argmin(1).numpy()


def prompts() -> list[tuple[str, int, str]]:
    """(text, digit, stroke) of all 30 combinations."""
    return [
        (f"{'an' if digit == 8 and not stroke else 'a'} {stroke} {NAMES[digit]}".replace("  ", " "), digit, stroke)
        for digit in range(10)
        for stroke in STROKES
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL:STEPS[:GUIDANCE]")
    parser.add_argument("--per-prompt", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    real = data.load("digits")
    labels, ink = real.labels, real.images.astype(np.float64).sum((1, 2, 3))
    median = np.array([np.median(ink[labels == digit]) for digit in range(10)])
    print(f"1-NN on real digits, held out: {(labels[nearest(real.images, real.images, True)] == labels).mean():.2%}")
    asked = prompts()
    digit = np.tile([one[1] for one in asked], arguments.per_prompt)
    sign = np.tile([{THIN: -1, "": 0, BOLD: 1}[one[2]] for one in asked], arguments.per_prompt)
    print(f"{'model':40} {'steps':>5} {'w':>4}  {'FD':>6} {'digit':>7} {'stroke':>7}   left out: {'digit':>7} {'stroke':>7}")
    for given in arguments.models:
        name, steps, *guidance = given.split(":")
        model = mmgen.load(name, device=arguments.device)
        w = float(guidance[0]) if guidance else 1.0
        texts = tuple(one[0] for one in asked)
        images = model.sample(len(digit), steps=int(steps), seed=arguments.seed, guidance=w, prompts=texts).images.numpy()
        right = labels[nearest(images, real.images)] == digit
        stroke = sign * (images.astype(np.float64).sum((1, 2, 3)) - median[digit]) > 0
        trained_on = model.config.captions or []
        new = np.tile([one[0] not in trained_on for one in asked], arguments.per_prompt)
        cells = [right[~new].mean(), stroke[~new & (sign != 0)].mean()]
        cells += [right[new].mean(), stroke[new & (sign != 0)].mean()] if new.any() else [float("nan")] * 2
        scores = mmgen.fid(
            name, ref="digits", features="pixels", num=len(real.images), steps=int(steps), guidance=w, seed=arguments.seed, device=arguments.device
        ).scores
        distance = next(iter(scores.values()))
        print(f"{name:40} {steps:>5} {w:4.1f}  {distance:6.3f} {cells[0]:7.1%} {cells[1]:7.1%}             {cells[2]:7.1%} {cells[3]:7.1%}", flush=True)


if __name__ == "__main__":
    main()
