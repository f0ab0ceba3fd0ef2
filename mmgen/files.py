"""Writing that never half-finishes, beside the final name and then renamed; and what a file is, by its hash."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .errors import MmgenError, ModelError

_UMASK = threading.Lock()
TEMPORARY = ".tmp-"  # names that start so are leftovers of a killed process: never read, safe to delete


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path beside `path`, to be written to; renames it to `path` if the block succeeds.

    The content is flushed to disk before the rename, so that a power cut leaves the old file or the new, never a part.
    Raises MmgenError with one sentence where the disk is full or the folder cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=TEMPORARY, suffix=path.suffix, dir=path.parent)
        os.close(handle)
        os.chmod(name, 0o666 & ~_umask())
    except OSError as error:
        raise MmgenError(f"cannot write {path}: {error.strerror or error}") from error
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise MmgenError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: str | os.PathLike, keep: Callable[[], bool] = lambda: False) -> Iterator[Path]:
    """Like `replacing`, for a new folder: yields a temporary folder, renamed to `path` if the block succeeds.

    A folder that already stands at `path` is replaced, unless `keep()`, asked once the new one is complete, says that the
    old one is as good. Then `path` is never missing, not even for a moment, for those who read it meanwhile.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=path.parent))
        os.chmod(temporary, 0o777 & ~_umask())
    except OSError as error:
        raise MmgenError(f"cannot write {path}: {error.strerror or error}") from error
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
        while not _renamed_folder(temporary, path) and not keep():
            old = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=path.parent))
            with contextlib.suppress(FileNotFoundError):  # another process moved it away first
                os.replace(path, old / path.name)
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise MmgenError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _renamed_folder(source: Path, path: Path) -> bool:
    """Renames a folder; False where one with content stands at `path`, which no system call replaces."""
    try:
        os.replace(source, path)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST) or path.is_dir():  # Windows: access denied
            return False
        raise
    return True


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Writes indented JSON, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def sha256_of(path: str | os.PathLike) -> str:
    """The SHA-256 of a file of weights, in hexadecimal. Raises ModelError where it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    return digest.hexdigest()


def remove_leftovers(folder: str | os.PathLike) -> None:
    """Deletes what killed processes left in a folder that this process owns."""
    for leftover in Path(folder).glob(TEMPORARY + "*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _umask() -> int:
    with _UMASK:  # it is the process's: two threads that ask at once could leave it at 0
        current = os.umask(0)
        os.umask(current)
    return current
