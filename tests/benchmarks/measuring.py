"""Two sides of a comparison, run in turns in one process; the peak memory of each, in a process of its own; the table."""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

ROOT = Path(__file__).parents[2]
Size = Literal["tiny", "quick", "full"]  # tiny: for the tests, of no meaning as a figure
Run = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """mmgen's way and the plain one to do the same work. Each is made first, then run once to warm up, then in turns."""

    name: str
    unit: str  # of what a run does `amount` of, such as images
    amount: float
    ours: Callable[[], Run]
    plain: Callable[[], Run]
    repetitions: int = 5
    note: Callable[[float], str] = lambda rate: ""  # of mmgen's rate, units/s


@dataclass(frozen=True)
class Row:
    """A line of the table. `ratio`: how many times as fast mmgen is as the plain reference."""

    name: str
    unit: str
    ours: float
    plain: float | None = None
    ratio: float | None = None
    ours_mib: float | None = None
    plain_mib: float | None = None
    note: str = ""


def temporary_folder() -> Path:
    """A folder that goes when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="mmgen-benchmark-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def synchronise() -> None:
    """Waits for the GPU, where there is one, so that a clock that is read next tells the truth."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(run: Run) -> float:
    synchronise()
    start = time.perf_counter()
    run()
    synchronise()
    return time.perf_counter() - start


def in_turns(runs: dict[str, Run], repetitions: int) -> dict[str, float]:
    """The least seconds of each, after one run of each that does not count. Others on the machine only ever add time."""
    for run in runs.values():
        run()
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(repetitions):
        for name in list(runs)[:: -1 if number % 2 else 1]:
            found[name].append(seconds(runs[name]))
    return {name: min(times) for name, times in found.items()}


def compared(benchmark: str, case: Case, size: Size, device: str) -> Row:
    """Speed side by side, and the memory of each side alone."""
    least = in_turns({"ours": case.ours(), "plain": case.plain()}, case.repetitions)
    ours, plain = case.amount / least["ours"], case.amount / least["plain"]
    memory = {side: peak_of(benchmark, case.name, side, size, device) for side in ("ours", "plain")}
    note = case.note(ours)
    return Row(case.name, f"{case.unit}/s", ours, plain, ours / plain, memory["ours"], memory["plain"], note)


def peak_of(benchmark: str, case: str, side: str, size: Size, device: str) -> float | None:
    """Peak resident MiB of a process that does one side of a case twice; None at size tiny."""
    if size == "tiny":
        return None
    command = [sys.executable, "-m", "tests.benchmarks", "--peak", benchmark, case, side, "--device", device]
    return process([*command, *(["--full"] if size == "full" else [])])[1]


# A process begins with the peak memory of whoever forked it, so that a small one starts the command and reads the clock.
STARTER = """
import os, sys, time
start = time.perf_counter()
pid = os.spawnvp(os.P_NOWAIT, sys.argv[1], sys.argv[1:])
_, status, usage = os.wait4(pid, 0)
print("\\nmeasured", time.perf_counter() - start, usage.ru_maxrss / 1024)
sys.exit(os.waitstatus_to_exitcode(status) != 0)
"""


def process(command: list[str], environment: dict[str, str] | None = None) -> tuple[float, float, str]:
    """(seconds, peak MiB of the process itself, output) of a command; SystemExit where it fails."""
    done = subprocess.run(
        [sys.executable, "-S", "-c", STARTER, *command], cwd=ROOT, env={**os.environ, **(environment or {})}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    text, _, figures = done.stdout.rpartition("\nmeasured ")
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:6])} failed: {done.stdout[-2000:]}")
    passed, mib = map(float, figures.split())
    return passed, mib, text


HEADER = f"{'':44}{'':>11}{'mmgen':>11}{'plain':>11}{'ratio':>8}{'MiB':>8}{'plain':>8}"


def line(row: Row) -> str:
    """A row of the table below HEADER."""
    numbers = f"{row.ours:11.4g}{_number(row.plain, '11.4g')}{_number(row.ratio, '8.2f')}"
    memory = f"{_number(row.ours_mib, '8.0f')}{_number(row.plain_mib, '8.0f')}"
    return f"{row.name:46}{row.unit:>9}{numbers}{memory}  {row.note}".rstrip()


def show(rows: Iterable[Row]) -> list[Row]:
    """Prints the table, each row as soon as it is measured."""
    print(HEADER, flush=True)
    shown = []
    for row in rows:
        print(line(row), flush=True)
        shown.append(row)
    return shown


def _number(value: float | None, form: str) -> str:
    return format(value, form) if value is not None else " " * int(form.partition(".")[0])
