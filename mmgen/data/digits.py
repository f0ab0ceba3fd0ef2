"""The handwritten digits that come with mmgen: where they are, and texts that say of each what it is and how it is drawn."""

from __future__ import annotations

from importlib import resources

import numpy as np

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
THIN, BOLD = "thin", "bold"
SHARE = 0.25  # of the images of each class are called thin, and as many bold: those with the least and the most ink


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, 8, 8], 0 (paper) to 16 (ink), and labels int64 [N]."""
    with resources.files(__package__).joinpath("digits.npz").open("rb") as file, np.load(file, allow_pickle=False) as stored:
        return stored["images"], stored["labels"].astype(np.int64)


def strokes(images: np.ndarray, labels: np.ndarray) -> list[str]:
    """`thin`, `bold` or "" for each image [N, H, W], by its sum (the ink) relative to the other images of its class.

    In each class the SHARE with the least ink is thin, the SHARE with the most bold; among equals, the earlier one has less.
    """
    ink, found = images.astype(np.float64).sum((1, 2)), [""] * len(images)
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        order = own[np.argsort(ink[own], kind="stable")]
        count = round(SHARE * len(own))
        for row in order[:count]:
            found[row] = THIN
        for row in order[len(order) - count :]:
            found[row] = BOLD
    return found


def captions(images: np.ndarray, labels: np.ndarray) -> list[list[str]]:
    """The texts of each image: ["a thin seven", "a seven"], or ["a seven"] where its stroke is neither thin nor bold."""
    plain = [f"{'an' if NAMES[label] == 'eight' else 'a'} {NAMES[label]}" for label in labels]
    return [
        [f"a {stroke} {NAMES[label]}", text] if stroke else [text]
        for stroke, label, text in zip(strokes(images, labels), labels, plain, strict=True)
    ]
