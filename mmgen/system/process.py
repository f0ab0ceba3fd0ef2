"""The process: settings that make small networks fast on a CPU and change no result; the cores that it may use."""

from __future__ import annotations

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # names of options in glibc's malloc.h
_MIB = 2**20


def tune() -> None:
    """To be called before torch is loaded."""
    _spin_briefly()
    _keep_freed_memory()


def cores() -> int:
    """How many cores this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _spin_briefly() -> None:
    """Makes waiting OpenMP threads spin for microseconds, then sleep; GNU's OpenMP, which torch brings, reads this.

    Threads that spin for long, the default, slow small networks down several times where another process shares the cores;
    threads that never spin cost a third of the speed where none does.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "10000"


def _keep_freed_memory() -> None:
    """Keeps glibc from returning the memory of every intermediate result to the system and fetching it anew, page by page.

    That took a third of the time of a training step of a small network. Up to 1 GiB stays with the process.
    """
    _set_malloc({_M_MMAP_THRESHOLD: 32 * _MIB, _M_TRIM_THRESHOLD: 1024 * _MIB})  # the former is the largest that it takes


def keep_large_blocks() -> None:
    """Keeps those beyond 32 MiB too, which `tune` cannot: for trainings on a CPU, which need the same ones at each step.

    With them a step of 8,192 small images took half as long, and a tenth more memory. Blocks that were needed only once, as for
    a file that was read, may stay with the process as well.
    """
    _set_malloc({_M_MMAP_MAX: 0})


def _set_malloc(options: dict[int, int]) -> None:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return
    for name, value in options.items():
        mallopt(name, value)
