"""The one lock of this package: flock, which the system frees when its process dies, by SIGKILL too.

Windows and some network file systems have none: whoever asks then goes on without.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import DataError, TrainingError, cannot_write, disk_errors

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK_FILE = ".lock"
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


class Held(Exception):
    """Another process, or another part of this one, has the lock."""


def try_lock(path: str | os.PathLike, wait: bool = False) -> int | None:
    """An open descriptor that locks an existing file or folder until it is closed, or None where there are no locks.

    wait: for whoever has it. Without, raises Held where it is locked; OSError where it cannot be opened.
    """
    if fcntl is None:
        return None
    mode = os.O_RDONLY if os.path.isdir(path) else os.O_RDWR  # NFS asks for writing
    descriptor = os.open(path, mode)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        os.close(descriptor)
        if error.errno in _HELD:
            raise Held from error
        return None
    return descriptor


def is_held(path: str | os.PathLike, otherwise: bool) -> bool:
    """Whether a living process has locked a file or folder. `otherwise`: the answer where there are no locks."""
    try:
        descriptor = try_lock(path)
    except Held:
        return True
    except OSError:  # gone meanwhile, or not to be opened
        return otherwise
    if descriptor is None:
        return otherwise
    os.close(descriptor)
    return False


@contextlib.contextmanager
def one_at_a_time(file: Path) -> Iterator[None]:
    """Waits for the lock of a file in the cache, made with its folder if it is not there, and holds it.

    Where there are no locks, goes on without: what several make at once is the same. Raises DataError where the file cannot be made.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        lock = try_lock(file, wait=True)
    except OSError as error:
        raise DataError(f"cannot write {file.parent}: {error.strerror or error}: set MMGEN_CACHE to another folder") from error
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


@contextlib.contextmanager
def only_run_in(folder: Path, note: Callable[[str], None]) -> Iterator[None]:
    """Keeps other runs out of a folder, which is made if it is not there, by a lock on `.lock` in it.

    note: told where there are no locks; then nothing keeps them out. Raises TrainingError naming the process that has the
    folder, MmgenError where it cannot be written.
    """
    file = folder / LOCK_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file.touch()
        lock = try_lock(file)
    except Held:
        raise TrainingError(
            f"another run is at work in {folder} ({_holder(file)}): wait for its end, stop it, or give another --out"
        ) from None
    except OSError as error:
        raise cannot_write(folder, error) from error
    if lock is None:
        note(f"the file system of {folder} has no locks: see to it that no second run works there")
        yield
        return
    try:
        with disk_errors(file):
            os.truncate(lock, 0)
            os.write(lock, json.dumps({"process": os.getpid(), "host": socket.gethostname()}).encode())
        yield
    finally:
        os.close(lock)


def _holder(file: Path) -> str:
    try:
        found = json.loads(file.read_text())
        return f"process {found['process']} on {found['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "a process that has not said its name yet"
