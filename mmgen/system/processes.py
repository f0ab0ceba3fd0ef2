"""The processes that share a job, as `accelerate launch` and torchrun start them; this one alone without them.

Gradients travel in collectives of the devices, which end the job after COLLECTIVE_TIMEOUT: then a process hangs. Where processes
wait for one that works alone (it draws a picture, writes a checkpoint, is slower than the others), they meet on the CPU instead, in
a process group of their own that is as patient as need be. What only one process must make, such as a cache entry, is waited for by
its own lock.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

COLLECTIVE_TIMEOUT = timedelta(hours=1)
MEETING_TIMEOUT = timedelta(days=7)


def _alone(value: Any) -> list[Any]:
    return [value]


@dataclass(frozen=True)
class ProcessGroup:
    """This process's number, how many there are, and two ways to meet the others."""

    index: int = 0
    size: int = 1
    wait: Callable[[], None] = lambda: None
    gather: Callable[[Any], list[Any]] = _alone  # the values of all processes, in order, for every one of them

    @property
    def is_main(self) -> bool:
        return self.index == 0


def find_process_group(cpu: bool = False) -> ProcessGroup:
    """The processes that were launched. `cpu`: keep off the GPUs."""
    from accelerate import PartialState
    from accelerate.utils import get_int_from_env

    if get_int_from_env(["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"], 1) == 1:
        return ProcessGroup()
    return process_group_of(PartialState(cpu=cpu, timeout=COLLECTIVE_TIMEOUT))


def process_group_of(state: Any) -> ProcessGroup:
    """The process group of accelerate's state or Accelerator. The first call is a collective: all processes make it at the same time."""
    if state.num_processes == 1:
        return ProcessGroup()
    import torch.distributed as dist

    group = _meeting_group(dist.group.WORLD)

    def gather(value: Any) -> list[Any]:
        values = [None] * state.num_processes
        dist.all_gather_object(values, value, group=group)
        return values

    return ProcessGroup(state.process_index, state.num_processes, lambda: dist.barrier(group), gather)


@functools.lru_cache(maxsize=1)
def _meeting_group(world: Any) -> Any:
    """One group on the CPU for each group of all processes."""
    import torch.distributed as dist

    return dist.new_group(backend="gloo", timeout=MEETING_TIMEOUT)
