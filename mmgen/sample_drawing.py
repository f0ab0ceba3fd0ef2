"""Drawing the images still missing, in batches, each process of `accelerate launch` its share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import MmgenError
from .models import Model
from .sampling import Plan, draw

Progress = Callable[[int, int], None]  # called with (images that are there, images in all), by the main process only


@dataclass(frozen=True)
class Team:
    """The processes that share the work: this one's number, how many, and a way to wait for the others."""

    index: int = 0
    size: int = 1
    wait: Callable[[], None] = lambda: None

    @property
    def is_main(self) -> bool:
        return self.index == 0


def find_team(cpu: bool = False) -> Team:
    """The processes that `accelerate launch` started; this one alone without it. `cpu`: keep off the GPUs."""
    from accelerate import PartialState
    from accelerate.utils import get_int_from_env

    if get_int_from_env(["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"], 1) == 1:
        return Team()
    state = PartialState(cpu=cpu)
    return Team(state.process_index, state.num_processes, state.wait_for_everyone)


def draw_missing(
    model: Model, chosen: Plan, missing: Sequence[int], num: int, team: Team, progress: Progress | None = None
) -> Iterator[tuple[list[int], Tensor]]:
    """Yields (image numbers, uint8 [N, C, H, W]) for this process's share of `missing`, a batch at a time.

    `missing` must be the same list in all processes. Progress assumes that the others are as fast as this one.
    Raises MmgenError where a batch does not fit into the GPU's memory.
    """
    report = progress if progress and team.is_main else lambda done, total: None
    there, drawn = num - len(missing), 0
    report(there, num)
    size = max(1, min(chosen.batch_size, math.ceil(len(missing) / team.size)))
    batches = [list(missing[i : i + size]) for i in range(0, len(missing), size)]
    for indices in batches[team.index :: team.size]:
        try:
            images, _ = draw(model, chosen, indices)
        except torch.OutOfMemoryError as error:
            raise MmgenError(
                f"the GPU's memory is too small for {len(indices)} images at a time: lower --batch-size, the images stay the same"
            ) from error
        yield indices, images
        drawn += len(indices)
        report(min(num, there + drawn * team.size), num)


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
