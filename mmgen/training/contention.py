"""Whether a run on a CPU is slowed down by others: how long its threads were ready to run and waited for a core.

Linux counts that for every thread. CPU time against wall time would not tell: threads that have nothing to do, because a part of
a step is not parallel or data are awaited, use none either.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..system.process import cores

WAITED = 0.2  # this share of the time that threads wanted to run is worth a note
ENOUGH_SECONDS = 5.0  # of wanted time, before anything is said

_TASKS = Path("/proc/self/task")


@dataclass(frozen=True)
class CoreTime:
    """Of one thread, in nanoseconds since it began."""

    ran: int
    waited: int  # ready to run, and other threads, of this process or of others, had the cores


def read_core_times(tasks: Path = _TASKS) -> dict[str, CoreTime]:
    """Of each thread of this process, by its number; none where the system does not count."""
    times = {}
    for file in tasks.glob("*/schedstat"):
        try:
            ran, waited, _ = map(int, file.read_text().split())
        except (OSError, ValueError):  # the thread has ended, or another system's idea of this file
            continue
        times[file.parent.name] = CoreTime(ran, waited)
    return times


def waited_share(before: Mapping[str, CoreTime], after: Mapping[str, CoreTime]) -> tuple[float, float]:
    """(share of the time wanted between two looks that was waited for a core, the time wanted in seconds, over all threads).

    Threads that began in between count from their beginning, those that ended not at all.
    """
    none = CoreTime(0, 0)
    ran = sum(time.ran - before.get(thread, none).ran for thread, time in after.items())
    waited = sum(time.waited - before.get(thread, none).waited for thread, time in after.items())
    wanted = ran + waited
    return (waited / wanted if wanted > 0 else 0.0), wanted / 1e9


def note(share: float, threads: int, cores: int) -> str:
    """What to say, and what to do about it. threads: that torch computes with; cores: that this process may use."""
    text = f"slower than it could be: the run's threads wait for a CPU core {share:.0%} of the time that they could work. "
    if threads > cores:
        return text + f"It computes with {threads} threads on {cores} cores: set OMP_NUM_THREADS={cores}, or fewer"
    fewer = f", or fewer threads here (OMP_NUM_THREADS={threads - 1}; now {threads} on {cores} cores)" if threads > 1 else ""
    return text + f"Other processes share its cores: stop them, give the run cores of its own (taskset){fewer}"


class Watch:
    """From its beginning on; it says something once."""

    def __init__(self) -> None:
        self.before, self.said = read_core_times(), False

    def look(self, threads: int) -> str | None:
        """The note, the first time that there is reason for one. threads: that torch computes with."""
        if self.said:
            return None
        now = read_core_times()
        share, seconds = waited_share(self.before, now)
        if seconds < ENOUGH_SECONDS:
            return None
        self.before = now
        if share < WAITED:
            return None
        self.said = True
        return note(share, threads, cores())
