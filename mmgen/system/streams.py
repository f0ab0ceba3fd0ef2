"""Standard streams that may be closed, full, or gone with their terminal: what cannot be shown never ends the work."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any


class Stream:
    """A text stream whose errors are kept in `error`, once, instead of raised; what is written after that goes nowhere."""

    def __init__(self, stream: Any) -> None:
        self._stream, self.error = stream, None
        self._terminal = stream.isatty()
        if hasattr(stream, "reconfigure"):  # names of files can hold what an encoding cannot
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError) as error:  # ValueError: it is closed
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._give_up(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _give_up(self, error: Exception) -> None:
        self.error = self.error or error
        with contextlib.suppress(OSError, ValueError):  # what is in its buffer would fail again, at the end of Python
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)

    @property
    def loss(self) -> str | None:
        """Why something was not written that somebody wanted, in words: not where a reader (`| head`) or a terminal is gone."""
        if not isinstance(self.error, OSError) or self.error.errno == errno.EPIPE or self._terminal:
            return None
        return self.error.strerror or str(self.error)


@contextlib.contextmanager
def standard_streams() -> Iterator[Stream]:
    """Makes sys.stdout and sys.stderr such streams until the end of the block; yields the former."""
    _open_closed()
    before = sys.stdout, sys.stderr
    out, err = (Stream(open(os.devnull, "w") if stream is None else stream) for stream in before)
    sys.stdout, sys.stderr = out, err
    try:
        yield out
    finally:
        out.flush()
        err.flush()
        sys.stdout, sys.stderr = before


def _open_closed() -> None:
    """Closed standard descriptors become /dev/null: else the next file that is opened has the number that libraries print to."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
