"""One thread or all of them, whichever makes a step on the CPU faster now.

On two idle cores two threads are a third faster than one; where another process works, they wait for each other at every
operation and are five times slower. Which of the two holds changes while a run lasts, so it is tried out again and again.
Steps with another number of threads round differently: two runs are equal bit for bit where they made the same choices.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable

import torch

WARM, MEASURED = 2, 4  # steps after a change that do not count, and that do; both even: a method's two networks take turns
GAIN = 0.95  # the other number is taken where its steps take at most this part of the time
OVERHEAD = 0.05  # trials take at most this part of the time, those that begin early apart:
CHANGED = 1.5  # where steps take so many times longer than when the choice was made, or so many times less
PATIENCE = 4.0  # times the length of the last trial, the least that lies between two


class ThreadChoice:
    """Told how long every step took, it sets the number of threads for the next.

    Attributes:
        now: threads of the next step.
        changes: number of the step -> threads from that step on, since `taken` was last called.
    """

    def __init__(self, most: int, set_threads: Callable[[int], None], fixed: bool = False) -> None:
        self.most, self._set, self._fixed = most, set_threads, fixed or most == 1
        self.steps, self.changes = 0, {}
        self.chosen = most
        self._use(most)
        self._usual: float | None = None  # seconds of MEASURED steps when the choice was made
        self._since, self._pause = 0.0, 0.0  # seconds since the last trial; until the next
        self._trial: float | None = None  # seconds of the trial under way

    def _use(self, threads: int) -> None:
        self.now, self._warm, self._recent = threads, 0, deque(maxlen=MEASURED)
        self.changes[self.steps] = threads
        self._set(threads)

    def taken(self) -> dict[int, int]:
        """`changes`, which begin anew."""
        changes, self.changes = self.changes, {}
        return changes

    def step(self, seconds: float) -> str | None:
        """After a step that took so long. Returns what to tell the user where the choice is another one now."""
        self.steps += 1
        if self._fixed:
            return None
        self._since += seconds
        if self._trial is not None:
            self._trial += seconds
            if seconds > 2 * self._slowest:  # no need to see more of it
                self._decide(None)
                return None
        if self._warm < WARM:
            self._warm += 1
            return None
        self._recent.append(seconds)
        if len(self._recent) < MEASURED:
            return None
        if self._trial is not None:
            return self._decide(sum(self._recent))
        self._usual = self._usual or sum(self._recent)
        if self._is_due():
            self._before, self._slowest, self._trial = sum(self._recent), max(self._recent), 0.0
            self._use(self._other())
        return None

    def _other(self) -> int:
        return 1 if self.chosen == self.most else self.most

    def _is_due(self) -> bool:
        change = sum(self._recent) / self._usual
        early = not 1 / CHANGED < change < CHANGED and self._since >= PATIENCE * self._pause * OVERHEAD
        return early or self._since >= self._pause

    def _decide(self, seconds: float | None) -> str | None:
        """seconds: of MEASURED steps with the other number; None: far too many."""
        better = seconds is not None and seconds <= GAIN * self._before
        self._usual = seconds if better else self._before
        self._since, self._pause, self._trial = 0.0, self._trial / OVERHEAD, None
        if not better:
            self._use(self.chosen)
            return None
        self.chosen = self.now
        return f"CPU threads: {self.chosen} from now on, a step takes {_ms(seconds)} (with {self._other()}: {_ms(self._before)})"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds / MEASURED:,.0f} ms"


def choice(wanted: int | str, processes: int) -> ThreadChoice:
    """For a run on the CPU. wanted: run.threads. A number given so or by OMP_NUM_THREADS stays, and so does that of processes
    which share the cores."""
    given = wanted != "auto"
    most = wanted if given else torch.get_num_threads()
    fixed = given or processes > 1 or "OMP_NUM_THREADS" in os.environ
    return ThreadChoice(most, torch.set_num_threads, fixed)
