"""What the tests of hostile input share: a command that must be refused, in bounded memory and time."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import accelerate  # noqa: F401  before memory is limited, of which their libraries take gigabytes of addresses
import datasets  # noqa: F401

import mmgen.metrics.evaluate
import mmgen.methods.distill.method
import mmgen.training.start  # noqa: F401
from mmgen.__main__ import main
from mmgen.errors import MmgenError

MEMORY = 3 * 1024**3 // 2  # bytes that a command may take beyond what the process has
SECONDS = 60  # of computing, after which a case is stopped as one that hangs; other work may run beside
WAITING = 600  # seconds, of waiting for whatever
LONGEST = 5000  # characters of a sentence: one lists all valid settings
tried: list[str] = []  # every case so far, for counting them


class Hangs(BaseException):
    """No part of the program catches this."""


@contextlib.contextmanager
def bounded(memory: int = MEMORY) -> Iterator[None]:
    """Memory beyond the limit is refused by the system; what takes too long is stopped. Both fail the test."""

    def stop(signum: int, frame: object) -> None:
        raise Hangs(f"more than {SECONDS} seconds of computing, or {WAITING} in all")

    restore = lambda: None  # noqa: E731
    if sys.platform == "linux":
        import resource

        before = resource.getrlimit(resource.RLIMIT_AS)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + memory, before[1]))
        restore = lambda: resource.setrlimit(resource.RLIMIT_AS, before)  # noqa: E731
    old = {number: signal.signal(number, stop) for number in (signal.SIGALRM, signal.SIGPROF)}
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.alarm(WAITING)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        for number, handler in old.items():
            signal.signal(number, handler)
        restore()


def command(*arguments: object) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of `mmgen ARGUMENTS`, run in this process. What it raises, a traceback, comes out."""
    argv, sys.argv = sys.argv, ["mmgen", *map(str, arguments)]
    out, err, status = io.StringIO(), io.StringIO(), 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), bounded():
            main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = argv
        os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    return status, out.getvalue(), err.getvalue()


def refused(*arguments: object, status: int | tuple[int, ...] = (1, 2, 3, 4, 5)) -> str:
    """The sentence with which a command ends; fails where it does not end with one and with the exit status."""
    tried.append(" ".join(map(str, arguments)))
    found, out, err = command(*arguments)
    wanted = status if isinstance(status, tuple) else (status,)
    assert found in wanted, f"exit status {found}, not of {wanted}: {arguments}\n{err[-2000:]}"
    lines = err.strip().splitlines()
    assert lines and lines[-1].startswith("error: "), f"{arguments}\n{err[-2000:]}"
    assert sum(line.startswith("error: ") for line in lines) == 1 and "Traceback" not in err + out
    sentence = lines[-1].removeprefix("error: ")
    assert 10 < len(sentence) < LONGEST, sentence[:2000]
    return sentence


def answered(function, *arguments: object, **options: object) -> str:
    """Likewise of a function of the library: the sentence of the MmgenError that it must raise."""
    tried.append(f"{getattr(function, '__name__', function)} {arguments}"[:200])
    with bounded():
        try:
            result = function(*arguments, **options)
        except MmgenError as error:
            sentence = str(error)
        else:
            raise AssertionError(f"accepted: {arguments} {options} -> {result!r}"[:500])
    assert "\n" not in sentence and 10 < len(sentence) < LONGEST, sentence[:2000]
    return sentence
