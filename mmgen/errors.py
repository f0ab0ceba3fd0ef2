"""The errors a user can cause or meet: each carries one sentence that says what to do, and an exit status."""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_NOT_ALLOWED = (errno.EROFS, errno.EACCES, errno.EPERM)
_OPTION = re.compile(r"(?<![\w(-])--([a-z]+(?:-[a-z]+)*)(?![\w-])")


class MmgenError(Exception):
    """Base of all errors that the command line reports as one sentence, without a traceback."""

    exit_status = 1


class ConfigError(MmgenError):
    """A setting is unknown, of the wrong type, or impossible."""

    exit_status = 2


class DataError(MmgenError):
    """A data set cannot be found, read or understood."""

    exit_status = 3


class ModelError(MmgenError):
    """A model file cannot be found, read or understood."""

    exit_status = 4


class TrainingError(MmgenError):
    """Training cannot go on: a loss that is not finite, a damaged checkpoint, a run folder of another run."""

    exit_status = 5


def cannot_write(path: str | os.PathLike, error: OSError) -> MmgenError:
    """Says which file could not be written, why, and what to do."""
    reason, remedy = error.strerror or str(error), ""
    if error.errno in _NO_ROOM:
        remedy = ": make room there, then run the same command again"
    elif error.errno in _NOT_ALLOWED:
        remedy = ": choose a place that can be written"
    elif error.errno is None:  # NumPy counts what it could not write, and forgets the reason
        remedy = ": is the disk full?"
    return MmgenError(f"cannot write {path}: {reason}{remedy}")


@contextlib.contextmanager
def disk_errors(path: str | os.PathLike) -> Iterator[None]:
    """What the system says against writing to a path, or clearing it, becomes a MmgenError of one sentence."""
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from error


@contextlib.contextmanager
def in_python(settings: Mapping[str, str] = {}) -> Iterator[None]:
    """Errors of a call from Python name its arguments beside the options of the command: `batch_size (--batch-size)`.

    Commands within backticks stay as they are. settings: option -> what it is in Python, where that is no argument of its name.
    """

    def argument(found: re.Match) -> str:
        name = found[1].replace("-", "_")
        return f"{settings.get(name, name)} ({found[0]})"

    try:
        yield
    except MmgenError as error:
        pieces = re.split("(`[^`]*`)", str(error))
        error.args = ("".join(piece if piece.startswith("`") else _OPTION.sub(argument, piece) for piece in pieces), *error.args[1:])
        raise


def shortened(value: object, most: int = 80) -> str:
    """A value that may come from anywhere, or what an exception says, as one line that is fit for a sentence.

    >>> shortened([1, 2, "a"]), shortened("x" * 1000, 5)
    ("[1, 2, 'a']", "'xxxx...")
    """
    if isinstance(value, Exception):
        text = str(value) or type(value).__name__
    else:
        text = _short.repr(value)
    text = " ".join(text.split())
    return text if len(text) <= most else text[:most] + "..."


class _Short(reprlib.Repr):  # which does not go far into what is long or deep
    def repr_int(self, x: int, level: int) -> str:
        return "a number of hundreds of digits" if x.bit_length() > 1000 else str(x)  # Python refuses to write very long ones


_short = _Short()
_short.maxstring = _short.maxother = _short.maxlong = 200
_short.maxlist = _short.maxtuple = _short.maxdict = 10


def nearest(name: str, valid: Iterable[str], prefix: str = "") -> str:
    """Ends a refusal: the most similar words, then all valid ones, each shown with `prefix` before it.

    >>> nearest("laplac", ["laplace", "rbf"])
    "did you mean 'laplace'? Valid: laplace, rbf"
    """
    valid = list(dict.fromkeys(valid))
    close = difflib.get_close_matches(name, valid, n=3, cutoff=0.5)
    if not close:  # a dotted key whose last part matches, such as k for loss.k
        close = [v for v in valid if v.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
    listing = "Valid: " + ", ".join(prefix + v for v in valid)
    return f"did you mean {' or '.join(repr(prefix + c) for c in close)}? {listing}" if close else listing
