"""Writing that never half-finishes, beside the final name and then renamed; JSON from anywhere; a file's hash."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ..errors import DataError, ModelError, disk_errors
from .lock import Held, is_held, try_lock

_UMASK = threading.Lock()
_READ = os.O_RDONLY | getattr(os, "O_BINARY", 0)  # Windows would change the ends of lines
TEMPORARY = ".tmp-"  # names that start so are unfinished: never read, and of a killed process, safe to delete
MOST_JSON = 1 << 26  # bytes of a JSON file: once read, it takes up to twenty times as many


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path beside `path`, to be written to; renames it to `path` if the block succeeds.

    The content is flushed to disk before the rename, so that a power cut leaves the old file or the new, never a part.
    Raises MmgenError with one sentence where the disk is full or the folder cannot be written.
    """
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=_prefix(path), suffix=path.suffix, dir=path.parent)
        os.close(handle)
        os.chmod(name, 0o666 & ~_umask())
    temporary = Path(name)
    try:
        with disk_errors(path), _in_use(temporary):
            yield temporary
            flush_to_disk(temporary)
            os.replace(temporary, path)
            flush_to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def staging(folder: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary folder within `folder`, for many small files that are renamed out of it as soon as each is whole.

    A quarter of the cost of `replacing` each. Nothing is flushed: a process that is killed leaves whole files, and whoever reads
    them after a power cut must look whether they are. Raises MmgenError with one sentence where the folder cannot be written.
    """
    with disk_errors(folder):
        temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=folder))
    try:
        with _in_use(temporary):
            yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def replacing_folder(path: str | os.PathLike, keep: Callable[[], bool] = lambda: False) -> Iterator[Path]:
    """Like `replacing`, for a new folder: yields a temporary folder, renamed to `path` if the block succeeds.

    A folder that already stands at `path` is replaced, unless `keep()`, asked once the new one is complete, says that the
    old one is as good. Then `path` is never missing, not even for a moment, for those who read it meanwhile.
    """
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=_prefix(path), dir=path.parent))
        os.chmod(temporary, 0o777 & ~_umask())
    try:
        with disk_errors(path), _in_use(temporary):
            yield temporary
            for one in (*temporary.rglob("*"), temporary):
                flush_to_disk(one)
            while not _renamed_folder(temporary, path) and not keep():
                old = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=path.parent))
                with contextlib.suppress(FileNotFoundError):  # another process moved it away first
                    os.replace(path, old / path.name)
                shutil.rmtree(old, ignore_errors=True)
            flush_to_disk(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_bytes(path: str) -> bytes:
    """The whole file; of a small one in half the time of `open`, whose buffers are made for nothing. Raises OSError."""
    file = os.open(path, _READ)
    try:
        return _read(file, os.fstat(file).st_size)
    finally:
        os.close(file)


def read_parts(path: str, starts: Iterable[int], size: int) -> bytes:
    """Up to `size` bytes from each start (a negative one is the beginning), joined. Raises OSError."""
    file, parts = os.open(path, _READ), []
    try:
        for start in starts:
            os.lseek(file, max(start, 0), os.SEEK_SET)
            parts.append(_read(file, size))
        return b"".join(parts)
    finally:
        os.close(file)


def _read(file: int, size: int) -> bytes:
    """A system call returns less than it was asked for at 2 GiB."""
    parts = []
    while size > 0 and (part := os.read(file, size)):
        parts.append(part)
        size -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def flush_to_disk(path: str | os.PathLike) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk. Raises OSError where it cannot get there."""
    folder, windows = os.path.isdir(path), os.name == "nt"
    if folder and windows:  # which opens no folders
        return
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not folder:
            raise  # of folders, some file systems cannot
    finally:
        os.close(descriptor)


def _renamed_folder(source: Path, path: Path) -> bool:
    """Renames a folder; False where one with content stands at `path`, which no system call replaces."""
    try:
        os.replace(source, path)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST) or path.is_dir():  # Windows: access denied
            return False
        raise
    return True


def at_home(path: str | os.PathLike) -> Path:
    """A path in which ~ is the home folder; of somebody unknown it stays as it is."""
    return Path(os.path.expanduser(path))


def exists(path: Path) -> bool:
    """Whether something is there. A name that no file can have is not."""
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or with a zero in it
        return False


def resolved(path: Path) -> Path:
    """Without links. Raises DataError where they go round."""
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:
        raise DataError(f"{path} is a link that leads nowhere") from error


def read_json(path: str | os.PathLike, most: int = MOST_JSON) -> Any:
    """What a JSON file holds. Raises OSError where it cannot be read, ValueError where it is no JSON, or none that is sane."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(size + 1) if size <= most else b""  # as much is set aside as is asked for
    if size > most:
        raise ValueError(f"it is larger than {most:,} bytes")
    return parse_json(content)


def parse_json(text: str | bytes) -> Any:
    """`json.loads`, which raises ValueError for whatever is wrong: also for what is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


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


def remove_leftovers(folder: str | os.PathLike, name: str | None = None) -> None:
    """Deletes what killed processes left in a folder; what a living one is writing to stays.

    name: only what was to become this file or folder, where others write to the folder too. Then nothing is deleted on file
    systems without locks, which do not tell whether a process lives.
    """
    prefix = TEMPORARY if name is None else _prefix(Path(name))
    for entry in list(os.scandir(folder)) if os.path.isdir(folder) else ():
        if not entry.name.startswith(prefix) or is_held(entry.path, otherwise=name is not None):
            continue
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)
        else:
            Path(entry.path).unlink(missing_ok=True)


def _prefix(path: Path) -> str:
    """How the names of temporary files begin that are to become `path`; names have at most 255 bytes."""
    return f"{TEMPORARY}{path.name[:40]}-"


@contextlib.contextmanager
def _in_use(path: Path) -> Iterator[None]:
    """Locks a temporary file or folder, so that `remove_leftovers` of other processes leaves it alone."""
    try:
        lock = try_lock(path)
    except Held:  # by a process that looks whether it may delete it
        lock = None
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _umask() -> int:
    with _UMASK:  # it is the process's: two threads that ask at once could leave it at 0
        current = os.umask(0)
        os.umask(current)
    return current
