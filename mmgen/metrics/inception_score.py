"""The Inception Score of images, from the class probabilities that a classifier gives them.

Salimans et al., "Improved Techniques for Training GANs" (2016, arXiv:1606.03498), section 4: exp of the mean over images of
KL(p(y|x) || p(y)), where p(y) is the mean of p(y|x) over the images; taken in splits, whose mean and standard deviation are
reported.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .frechet import StatisticsError


class InceptionScore:
    """The sums that the score needs, of probabilities that come in batches and in any order; float64, on the CPU.

    Since the mean of KL(p || q) with q the mean of p is the mean of sum_k p log p, less sum_k q log q, a split needs the sum
    of p and of p log p only: memory does not grow with the number of images. Processes are joined by `merge`.

    Args:
        total: how many images there will be.
        splits: into how many runs of consecutive images they are divided: split k holds the images k total // splits to
            (k + 1) total // splits - 1, as in the authors' code.
    """

    def __init__(self, total: int, splits: int = 10) -> None:
        if total < 1 or splits < 1:
            raise StatisticsError(f"the Inception Score needs at least 1 image and 1 split, not {total} and {splits}")
        self.total = total
        self.splits = splits
        self.counts = torch.zeros(splits, dtype=torch.int64)
        self.negentropy = torch.zeros(splits, dtype=torch.float64)  # sum over images of sum_k p log p
        self.probabilities: Tensor | None = None  # [splits, K], sum over images

    def update(self, indices: Tensor | np.ndarray, probabilities: Tensor | np.ndarray) -> None:
        """Adds images by their place in the whole, int64 [N] in 0..total-1, and their class probabilities, floats [N, K].

        Raises StatisticsError where an index is out of range, a row is not a distribution (negative, not finite, or its sum
        further than 1e-3 from 1, as that of logits is), or K differs from before.
        """
        indices = torch.as_tensor(indices).cpu()
        p = torch.as_tensor(probabilities).detach().cpu().to(torch.float64)
        if p.ndim != 2 or indices.shape != p.shape[:1]:
            raise StatisticsError(
                f"probabilities must be [N, K], one row an index, not {list(p.shape)} for {list(indices.shape)}"
            )
        if not len(p):
            return
        if indices.is_floating_point() or indices.min() < 0 or indices.max() >= self.total:
            raise StatisticsError(f"the indices of the images must be integers from 0 to {self.total - 1}")
        if not ((p >= 0).all() and (p.sum(1) - 1).abs().max() <= 1e-3):  # a NaN fails the first comparison
            raise StatisticsError("class probabilities must be at least 0 and add up to 1 (logits need a softmax first)")
        split = ((indices + 1) * self.splits - 1) // self.total  # the k with k total // splits <= index < (k + 1) total // splits
        sums = torch.zeros(self.splits, p.shape[1], dtype=torch.float64).index_add_(0, split, p)
        negentropy = torch.zeros(self.splits, dtype=torch.float64).index_add_(0, split, torch.xlogy(p, p).sum(1))
        self._add(torch.bincount(split, minlength=self.splits), negentropy, sums)

    def merge(self, other: InceptionScore) -> None:
        """Adds what another process has seen of the same images. Raises StatisticsError where the splits are not the same."""
        if (self.total, self.splits) != (other.total, other.splits):
            raise StatisticsError(
                f"scores of {self.total} images in {self.splits} splits and of {other.total} in {other.splits} cannot be joined"
            )
        if other.probabilities is not None:
            self._add(other.counts, other.negentropy, other.probabilities)

    def result(self) -> tuple[float, float]:
        """The mean of the score over the splits, and its standard deviation over them (divided by their number, as NumPy's).

        The score lies between 1 (every image has the same probabilities) and K (each image is sure, all classes are as
        frequent). It knows no reference images, and grows with the images in a split: 5,000 in the usual 10 splits of 50,000.

        Raises StatisticsError where there are fewer images than splits, or an image was not counted once.
        """
        if self.total < self.splits:
            raise StatisticsError(f"{self.total} images are too few for an Inception Score in {self.splits} splits")
        bounds = torch.arange(self.splits + 1) * self.total // self.splits
        if not torch.equal(self.counts, bounds.diff()):
            raise StatisticsError(f"the Inception Score was promised {self.total} images and given {int(self.counts.sum())}")
        marginal = self.probabilities / self.counts[:, None]
        divergence = self.negentropy / self.counts - torch.xlogy(marginal, marginal).sum(1)
        scores = divergence.clamp(min=0).exp()  # rounding alone can make a divergence negative
        return float(scores.mean()), float(scores.std(correction=0))

    def _add(self, counts: Tensor, negentropy: Tensor, probabilities: Tensor) -> None:
        if self.probabilities is None:
            self.probabilities = torch.zeros_like(probabilities)
        if probabilities.shape != self.probabilities.shape:
            k, before = probabilities.shape[1], self.probabilities.shape[1]
            raise StatisticsError(f"probabilities of {k} classes cannot join those of {before}")
        self.counts += counts
        self.negentropy += negentropy
        self.probabilities += probabilities
