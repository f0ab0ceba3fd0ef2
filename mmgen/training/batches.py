"""Which images make up which part of which batch: a function of how many images were seen, so that a run resumes exactly."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ..data import Dataset
from ..data.latents import LatentDataset
from ..errors import ConfigError
from ..networks.conditions import Condition, Labels
from ..system.random import keys, uniform

CAPTION = 106  # purpose of random numbers: which of an image's captions is taken; see `inputs`


@dataclass
class Batch:
    """A part of the global batch, on the device. Consecutive `group_size` images are a group."""

    images: Tensor  # uint8 [N, C, H, W]; of latents their moments, float [N, 2C, h, w]
    condition: Condition | None
    index: Tensor  # int64 [N], the number of each image in the whole training; 0 is the first image of the first step
    first: int  # index[0], known without asking the device
    stride: int = 1  # between the numbers of the images

    @property
    def numbers(self) -> range:
        """`index`, on the host."""
        return range(self.first, self.first + self.stride * len(self.index), self.stride)


@dataclass(frozen=True)
class BatchSplit:
    """How the global batch is cut: `rounds` passes of `size` images on each of `processes` devices."""

    size: int
    rounds: int
    processes: int

    def __str__(self) -> str:
        devices, rounds = self.processes, self.rounds
        return f"{devices} device{'s' * (devices > 1)} x {rounds} accumulation step{'s' * (rounds > 1)} x {self.size}"

    def start(self, round_: int, process: int) -> int:
        """Where in the global batch a pass begins. Passes are the same whatever the number of devices if `size` is."""
        return (round_ * self.processes + process) * self.size


def split_batch(batch_size: int, group_size: int, processes: int, at_most: int) -> BatchSplit | None:
    """The largest equal parts of at most `at_most` images that hold whole groups; None where there are none."""
    sizes = [size for size in part_sizes(batch_size, group_size, processes) if size <= at_most]
    return BatchSplit(sizes[-1], batch_size // processes // sizes[-1], processes) if sizes else None


def share_batch(batch_size: int, group_size: int, processes: int, at_most: int) -> BatchSplit:
    """How the global batch is cut. Raises ConfigError where the devices cannot share it in whole groups."""
    parts = split_batch(batch_size, group_size, processes, at_most)
    if parts is None:
        groups = f" in groups of {group_size}" if group_size > 1 else ""
        raise ConfigError(
            f"train.batch_size {batch_size} cannot be shared by {processes} devices{groups}: choose a multiple of "
            f"{processes * group_size}"
        )
    return parts


def part_sizes(batch_size: int, group_size: int, processes: int) -> list[int]:
    """Every size that equal parts of whole groups can have, the least first; none where the devices cannot share the batch."""
    if batch_size % (processes * group_size):
        return []
    share = batch_size // processes
    return [size for size in range(group_size, share + 1, group_size) if share % size == 0]


@lru_cache(maxsize=2)  # a batch can straddle two epochs
def _order(length: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(length)


def data_indices(length: int, start: int, count: int, seed: int) -> np.ndarray:
    """Rows of the data set, int64 [count], for images number start, start + 1, ... of the training: epoch after epoch, each in
    an order of its own."""
    position = np.arange(start, start + count)
    epochs = position // length
    rows = np.empty(count, dtype=np.int64)
    for epoch in range(epochs[0], epochs[-1] + 1):
        inside = epochs == epoch
        rows[inside] = _order(length, seed, epoch)[position[inside] % length]
    return rows


def fetch(dataset: Dataset | LatentDataset, first: int, count: int, seed: int, device: torch.device) -> Batch:
    """Images number first to first + count - 1 of the training, copied to the device."""
    rows = data_indices(len(dataset), first, count, seed)
    stored = dataset.moments if isinstance(dataset, LatentDataset) else dataset.images
    images, condition = torch.from_numpy(stored[rows]), None
    texts = getattr(dataset, "texts", None)
    if texts is not None:
        condition = texts.condition(rows, uniform(keys(seed, np.arange(first, first + count), CAPTION)))
    elif dataset.labels is not None:
        condition = Labels(torch.from_numpy(dataset.labels[rows]), dataset.num_classes)
    if device.type == "cuda":  # pinned memory lets the copy overlap with the pass before
        images = images.pin_memory()
        if condition is not None and next(iter(condition.tensors().values())).device.type == "cpu":  # not encoded there just now
            condition = condition.pin_memory()
    return Batch(
        images.to(device, non_blocking=True),
        None if condition is None else condition.to(device, non_blocking=True),
        torch.arange(first, first + count, device=device),
        first,
    )


def crossed(before: int, after: int, every: int) -> bool:
    """Whether a multiple of `every` lies in (before, after]."""
    return before // every != after // every
