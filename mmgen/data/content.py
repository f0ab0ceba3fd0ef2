"""What the encoded images of a source are, by their bytes: a hash that is the same wherever they lie."""

from __future__ import annotations

import contextlib
import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

from PIL import Image

from ..errors import MmgenError
from ..system.files import read_json, replacing, write_json
from .cache import cache_root
from .image_source import ImageSource

_THREADS = 8  # that read files to hash them


def content_hash(source: ImageSource) -> str:
    """SHA-256 over all encoded images in order. Remembered for files that have not changed since."""
    memory = cache_root() / "content" / f"{source.fingerprint}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # not known yet, or damaged: the images are read
        return read_json(memory)["sha256"]
    digest = hashlib.sha256()
    with ThreadPoolExecutor(_THREADS) as threads:
        for start in range(0, source.length, 1024):
            for one in threads.map(partial(_read_digest, source), range(start, min(start + 1024, source.length))):
                digest.update(one)
    with contextlib.suppress(MmgenError):  # a cache that cannot be written costs time only
        write_json(memory, {"sha256": digest.hexdigest(), "images": source.length})
    return digest.hexdigest()


class Watched:
    """A source whose images are hashed as they are read, a part at a time: their `content_hash` without reading them again."""

    def __init__(self, source: ImageSource) -> None:
        self._read, self._found = source.read, {}
        self.source = replace(source, read=self._noting)

    def _noting(self, i: int) -> bytes | Image.Image:
        raw = self._read(i)
        self._found[i] = _digest(raw)
        return raw

    def keep(self, file: Path, images: range) -> None:
        """Writes the digests of these images, and forgets them. Those left out for want of a caption are read now."""
        with replacing(file) as temporary:
            temporary.write_bytes(b"".join(self._found.pop(i, None) or _digest(self._read(i)) for i in images))


def joined_hash(files: list[Path], length: int) -> str:
    """The `content_hash` of a source of so many images, from the files of `Watched.keep`; "" where one is missing."""
    try:
        digests = b"".join(file.read_bytes() for file in files)
    except OSError:  # made by a version that did not write them
        return ""
    return hashlib.sha256(digests).hexdigest() if len(digests) == 32 * length else ""


def _read_digest(source: ImageSource, i: int) -> bytes:
    return _digest(source.read(i))


def _digest(raw: bytes | Image.Image) -> bytes:
    if isinstance(raw, Image.Image):
        raw = repr((raw.mode, raw.size)).encode() + raw.tobytes()
    return hashlib.sha256(raw).digest()
