"""mmgen on a terminal of 80 columns: a pseudo-terminal, and what a person sees on it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import termios
import time
from pathlib import Path

from forks import Process

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def on_terminal(
    *arguments: str, cwd: Path, columns: int = 80, timeout: float = 120, program: tuple[str, ...] = ("-m", "mmgen"), **environment: str
) -> tuple[int, list[str]]:
    """The exit status, and every line that was ever shown, those drawn over included, without colours."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    without = dict.fromkeys(("COLUMNS", "LINES", "NO_COLOR", "CI"))
    process = Process(*program, *arguments, cwd=cwd, stdin=slave, stdout=slave, stderr=slave, **{"TERM": "xterm", **without, **environment})
    os.close(slave)
    shown, end = b"", time.monotonic() + timeout
    try:
        while time.monotonic() < end:
            try:
                piece = os.read(master, 65536)
            except OSError:  # the other side is closed
                break
            if not piece:
                break
            shown += piece
        else:
            raise AssertionError(f"still running after {timeout} s: {shown[-2000:]!r}")
    finally:
        process.kill() if time.monotonic() >= end else None
        os.close(master)
    text = _CONTROL.sub("", shown.decode()).replace("\r", "\n")
    return process.wait(), [line for line in text.split("\n") if line.strip()]


def bars(lines: list[str], what: str) -> list[str]:
    """The lines that show a bar of this name."""
    return [line for line in lines if line.startswith(what) and "/" in line and re.search("[━╸╺]", line)]
