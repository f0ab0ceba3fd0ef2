"""Files that others have published: looked for in the usual places, checked by SHA-256, downloaded once where missing.

torch.hub's download waits for ever where a connection hangs, and draws a bar of its own: this one has neither.
"""

from __future__ import annotations

import http.client
import os
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.cache import cache_root
from ..errors import ModelError
from ..system.files import at_home, replacing, sha256_of
from ..system.lock import one_at_a_time

Progress = Callable[[int, int], None]

_TIMEOUT = 30  # seconds without a byte
_BLOCK = 1 << 18


@dataclass(frozen=True)
class Published:
    """A file that somebody publishes.

    Attributes:
        name: how it is called, there and here.
        url: where it is published.
        sha256: of its content.
        option: of the command line, by which a user names the file.
        variable: of the environment, likewise: the file, or a folder that holds it.
    """

    name: str
    url: str
    sha256: str
    option: str
    variable: str


@dataclass(frozen=True)
class Located:
    """A file that was found. `published`: its content is the published one, by its SHA-256."""

    path: Path
    sha256: str
    published: bool


def locate(
    file: Published,
    explicit: Path | None = None,
    *,
    others: Sequence[str] = (),
    elsewhere: Sequence[Path] = (),
    progress: Progress | None = None,
) -> Located:
    """Finds a published file: as named, in the variable's place, in the cache, elsewhere; else downloads it to the cache.

    A file that the user names, by the option or the variable, may have any content, and `published` says whether it is
    the published one. Found in another place it must be the published one.

    Args:
        explicit: a file, or a folder that holds it.
        others: names of files that the same variable may name, for other uses. Such a one is passed over, and `file` is
            looked for beside it.
        elsewhere: folders where other programs keep the file.
        progress: called with the bytes downloaded and their total, 0 where it is not known.

    Raises ModelError where the named file does not exist, a found one has another content, or there is none and it cannot
    be downloaded: the message says which file to put where.
    """
    if explicit is not None:
        path = explicit / file.name if explicit.is_dir() else explicit
        return _named(path, file, file.option)
    if value := os.environ.get(file.variable):
        path = at_home(value)
        if not path.exists():
            raise ModelError(f"${file.variable} names {path}, which does not exist")
        if path.name in others:
            path = path.parent
        if path.is_dir():
            path = path / file.name
        if path.is_file():
            return _named(path, file, "$" + file.variable)
    cached = cache_root() / file.name
    for path in (cached, *(folder / file.name for folder in elsewhere)):
        if path.is_file():
            return _found(path, file)
    with one_at_a_time(cached.with_name(f"{cached.name}.lock")):
        if not cached.is_file():  # another process may have fetched it in the meantime
            _download(file, cached, progress)
    return _found(cached, file)


def _named(path: Path, file: Published, by: str) -> Located:
    if not path.is_file():
        raise ModelError(f"{path}, named by {by}, does not exist")
    digest = sha256_of(path)
    return Located(path, digest, digest == file.sha256)


def _found(path: Path, file: Published) -> Located:
    digest = sha256_of(path)
    if digest != file.sha256:
        raise ModelError(
            f"{path} is damaged or another file than the published one (its SHA-256 is {digest}, not {file.sha256}): "
            f"delete it, or name another file with {file.option} FILE"
        )
    return Located(path, digest, True)


def _remedy(file: Published, cached: Path) -> str:
    return f"fetch {file.url} and put it at {cached}, or name it with {file.option} FILE"


def _download(file: Published, cached: Path, progress: Progress | None) -> None:
    """Fetches the file beside its place, checks it, and only then moves it there."""
    request = urllib.request.Request(file.url, headers={"User-Agent": "mmgen"})
    with replacing(cached) as temporary:
        try:
            response = urllib.request.urlopen(request, timeout=_TIMEOUT)
        except (OSError, http.client.HTTPException) as error:
            raise _failed(file, cached, error) from error
        with response, open(temporary, "wb") as output:
            total, done = int(response.headers.get("Content-Length") or 0), 0
            while True:
                try:  # around the reading alone: a full disk is another error than a lost connection
                    block = response.read(_BLOCK)
                except (OSError, http.client.HTTPException) as error:
                    raise _failed(file, cached, error) from error
                if not block:
                    break
                output.write(block)
                done += len(block)
                if progress is not None:
                    progress(done, total)
        if done < total:
            raise ModelError(f"the download of {file.url} ended after {done:,} of {total:,} bytes: try again")
        digest = sha256_of(temporary)
        if digest != file.sha256:
            raise ModelError(
                f"what came from {file.url} is not the published file (its SHA-256 is {digest}, not {file.sha256}) and "
                f"was thrown away: a proxy may have answered instead; {_remedy(file, cached)}"
            )


def _failed(file: Published, cached: Path, error: Exception) -> ModelError:
    reason = getattr(error, "reason", None) or error
    return ModelError(f"cannot download {file.name} ({reason or type(error).__name__}): {_remedy(file, cached)}")
