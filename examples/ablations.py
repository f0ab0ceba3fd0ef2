"""What the experiments on digits share. Those of the ablations are jobs, each a training and its scores; several processes can do them at a time.

A job has a name, and what it found is kept as scores/NAME.json with the settings that it was found with. A script does the jobs that are
not there, and makes its table of those that are:

    python examples/distill_ablations.py --only few --processes 8      # eight jobs at a time, then the table
    python examples/distill_ablations.py --only few --minutes 15       # none begins after 15 minutes; the table of what is there
    python examples/distill_ablations.py --only few --variant dropout shift-2 --seeds 1      # of the group, these variants
    python examples/distill_ablations.py --only few --processes 0      # the table of what is there
    python examples/distill_ablations.py --only few --jobs             # a command for each job that is not there, for a pool of your own
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmgen.errors import ConfigError, TrainingError


@dataclass(frozen=True)
class Job:
    """name: of its file. conditions: what its result depends on. work: finds it, as a dictionary that JSON can hold."""

    name: str
    conditions: dict[str, Any]
    work: Callable[[], dict[str, Any]]


class Scores:
    """What jobs found, a file each."""

    def __init__(self, out: Path) -> None:
        self.folder = out / "scores"

    def get(self, job: Job) -> dict[str, Any] | None:
        """What a job found, or None; it raises TrainingError where it is there by other settings."""
        file = self.folder / f"{job.name}.json"
        if not file.is_file():
            return None
        kept = json.loads(file.read_text())
        if kept["conditions"] != _plain(job.conditions):
            raise TrainingError(f"{file} was measured with other settings or another teacher: choose another out (--out)")
        return kept["found"]

    def do(self, job: Job) -> dict[str, Any]:
        """What a job found, now or before. Its file is whole or not there."""
        if (found := self.get(job)) is not None:
            return found
        start = time.monotonic()
        found = _plain(job.work())
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".{job.name}.{os.getpid()}"
        temporary.write_text(json.dumps({"conditions": job.conditions, "seconds": round(time.monotonic() - start, 1), "found": found}))
        os.replace(temporary, self.folder / f"{job.name}.json")
        return found


def add_options(parser: argparse.ArgumentParser, out: str, seeds: str) -> None:
    parser.add_argument("--seeds", type=int, default=3, help=f"{seeds} (default 3)")
    parser.add_argument("--first-seed", type=int, default=0, help="the seeds are this and those after it (default 0)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of all that is compared")
    parser.add_argument("--device", default="cpu", help="that trains and samples: cpu, cuda or auto (default cpu)")
    parser.add_argument("--processes", type=int, default=1, help="jobs at a time; 0: only the table of what is there (default 1)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which no job begins, and those of several processes stop (default: no limit)")
    parser.add_argument("--variant", nargs="+", default=[], metavar="NAME", help="of what is compared only these, named as in the table or as their folders")
    parser.add_argument("--jobs", action="store_true", help="print the commands of the jobs that are not there")
    parser.add_argument("--job", metavar="NAME", help="do this job alone, and make no table")
    parser.add_argument("--out", type=Path, default=Path(out), help=f"folder of runs, scores, tables and pictures (default {out})")


def check_least(parser: argparse.ArgumentParser, options: argparse.Namespace, **least: int) -> None:
    for name, value in {"seeds": 1, "first_seed": 0, "processes": 0, **least}.items():
        if getattr(options, name) < value:
            parser.error(f"--{name.replace('_', '-')} must be at least {value}")


def carry_out(jobs: list[Job], options: argparse.Namespace) -> bool:
    """Does the jobs as the options say; whether a table is wanted. Jobs are done in their order."""
    scores = Scores(options.out)
    if options.job:
        asked = [job for job in jobs if job.name == options.job]
        if not asked:
            raise ConfigError(f"there is no job {options.job!r} here: --jobs lists those that are not done")
        scores.do(asked[0])
        return False
    missing = [job for job in jobs if scores.get(job) is None]
    if options.jobs:
        print("".join(f"{shlex.join(_command(job))}\n" for job in missing), end="")
        return False
    last = time.monotonic() + 60 * options.minutes
    if options.processes == 1:
        for number, job in enumerate(missing, 1):
            if time.monotonic() < last:
                print(f"{job.name} ({number} of {len(missing)})", file=sys.stderr, flush=True)
                scores.do(job)
    elif options.processes:
        with ThreadPoolExecutor(options.processes) as pool:  # trainings that are stopped save what they have, and go on the next time
            failed = list(pool.map(lambda job: _apart(job, last), missing))
        if any(failed):
            raise TrainingError(f"{sum(failed)} of {len(missing)} jobs failed: what they said is above, and the others are kept")
    return True


def _apart(job: Job, last: float) -> bool:
    """Does a job in a process of its own, of one thread, which is told to stop at the time `last`; whether it failed."""
    if time.monotonic() >= last:
        return False
    print(job.name, file=sys.stderr, flush=True)
    process = subprocess.Popen(_command(job), env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        return process.wait(None if last == float("inf") else max(0.0, last - time.monotonic())) != 0
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait()
        return False


def _command(job: Job) -> list[str]:
    return [sys.executable, sys.argv[0], *(each for each in sys.argv[1:] if each != "--jobs"), "--job", job.name]


def settings_of(given: list[str]) -> dict[str, Any]:
    """KEY=VALUE, the value as in JSON, or else a text."""
    found = {}
    for each in given:
        key, sign, value = each.partition("=")
        if not sign:
            raise ConfigError(f"--set takes KEY=VALUE, such as optimizer.lr=1e-3, not {each!r}")
        try:
            found[key] = json.loads(value)
        except json.JSONDecodeError:
            found[key] = value
    return found


def count(text: str) -> int:
    """5000, 5k or 1M."""
    return int(float(text.rstrip("kM")) * {"k": 1000, "M": 1_000_000}.get(text[-1:], 1))


def chosen(names: list[str], among: list[str]) -> set[str]:
    """The variants among those that are compared that are named, as in the table or as their folders; none named: all."""
    by_slug = {slug(name): name for name in among}
    for name in names:
        if slug(name) not in by_slug:
            raise ConfigError(f"--variant: there is no {name!r} here, but {', '.join(by_slug)}")
    return {by_slug[slug(name)] for name in names} or set(among)


def ended(run: Any) -> Any:
    """A run that was told to stop ends the script, too: half a training is no result."""
    if run.signal is not None:
        raise SystemExit(128 + run.signal)
    return run


def slug(name: str) -> str:
    """A name of variants as a name of files."""
    return "".join(c if c.isalnum() else "-" for c in name)


def spread(values: np.ndarray | list[float], digits: int) -> str:
    """The mean, and half the distance from the lowest to the highest."""
    return f"{np.mean(values):.{digits}f} ± {np.ptp(values) / 2:.{digits}f}"


def _plain(value: Any) -> Any:
    """As it comes back from a file."""
    return json.loads(json.dumps(value))
