"""Drawing the images still missing, in batches, each process of `accelerate launch` its share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import MmgenError
from ..models.build import AnyModel
from .drawing import Plan, draw
from ..system.processes import ProcessGroup

Progress = Callable[[float, int], None]  # called with (images that are there, images in all), by the main process only


def draw_missing(
    model: AnyModel, chosen: Plan, missing: Sequence[int], num: int, process_group: ProcessGroup, progress: Progress | None = None
) -> Iterator[tuple[list[int], Tensor]]:
    """Yields (image numbers, uint8 [N, C, H, W]) for this process's share of `missing`, a batch at a time.

    `missing` must be the same list in all processes. Progress assumes that the others are as fast as this one.
    Raises MmgenError where a batch does not fit into the GPU's memory.
    """
    report = progress if progress and process_group.is_main else lambda done, total: None
    there, drawn = num - len(missing), 0
    report(there, num)
    size = max(1, min(chosen.batch_size, math.ceil(len(missing) / process_group.size)))
    chosen = replace(chosen, batch_size=size)
    batches = [list(missing[i : i + size]) for i in range(0, len(missing), size)]

    def tell(part: float) -> None:
        report(min(num, there + (drawn + part) * process_group.size), num)

    for indices in batches[process_group.index :: process_group.size]:
        try:
            images, _ = draw(model, chosen, indices, tell)
        except torch.OutOfMemoryError as error:
            raise MmgenError(
                f"the GPU's memory is too small for {len(indices)} images at a time: lower --batch-size, the images stay the same"
            ) from error
        yield indices, images
        drawn += len(indices)


def contiguous(indices: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(start, stop) positions of the runs of consecutive numbers in ascending `indices`.

    >>> list(contiguous([3, 4, 7]))
    [(0, 2), (2, 3)]
    """
    start = 0
    for i in range(1, len(indices) + 1):
        if i == len(indices) or indices[i] != indices[i - 1] + 1:
            yield start, i
            start = i
