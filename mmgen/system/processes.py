"""The processes that share a job, as `accelerate launch` starts them; this one alone without it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def _alone(value: Any) -> list[Any]:
    return [value]


@dataclass(frozen=True)
class Team:
    """This process's number, how many there are, and two ways to meet the others."""

    index: int = 0
    size: int = 1
    wait: Callable[[], None] = lambda: None
    gather: Callable[[Any], list[Any]] = _alone  # the values of all processes, in order, for every one of them

    @property
    def is_main(self) -> bool:
        return self.index == 0


def find_team(cpu: bool = False) -> Team:
    """The processes that `accelerate launch` started. `cpu`: keep off the GPUs."""
    from accelerate import PartialState
    from accelerate.utils import get_int_from_env

    if get_int_from_env(["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"], 1) == 1:
        return Team()
    return team_of(PartialState(cpu=cpu))


def team_of(state: Any) -> Team:
    """The team of accelerate's state or Accelerator."""
    from accelerate.utils import gather_object

    if state.num_processes == 1:
        return Team()
    return Team(state.process_index, state.num_processes, state.wait_for_everyone, lambda value: gather_object([value]))
