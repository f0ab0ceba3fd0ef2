"""PNG and JPEG files without their metadata: what is damaged there does not concern the pixels."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

_PNG = b"\x89PNG\r\n\x1a\n"
_NEEDED = (b"tRNS", b"eXIf")  # besides critical chunks: transparency, and which side is up
_APP0, _APP1, _APP14, _APP15, _COM, _SOS = 0xE0, 0xE1, 0xEE, 0xEF, 0xFE, 0xDA
_SHORTEST = {_APP0: 14, _APP14: 12}  # bytes of a whole JFIF and Adobe segment; both say which colours are meant


def without_metadata(raw: bytes) -> bytes | None:
    """The same image without text, profiles and damaged small parts. None where there is nothing to take out."""
    parts = list(_png(raw) if raw.startswith(_PNG) else _jpeg(raw) if raw.startswith(b"\xff\xd8") else ())
    mended = b"".join(parts)
    return mended if parts and mended != raw else None


def _png(raw: bytes) -> Iterator[bytes]:
    """Critical chunks as they are (their names begin with a capital letter), of the others those that matter and are whole."""
    yield _PNG
    start = len(_PNG)
    while start + 12 <= len(raw):
        (length,) = struct.unpack_from(">I", raw, start)
        kind, end = raw[start + 4 : start + 8], start + 12 + length
        whole = raw[end - 4 : end] == struct.pack(">I", zlib.crc32(raw[start + 4 : end - 4]))
        if kind[:1].isupper() or kind in _NEEDED and whole:
            yield raw[start:end]
        start = end


def _jpeg(raw: bytes) -> Iterator[bytes]:
    """All segments before the scan but comments and applications' own, of which EXIF, JFIF and Adobe stay."""
    yield raw[:2]
    start = 2
    while start + 4 <= len(raw) and raw[start] == 0xFF and raw[start + 1] != _SOS:
        marker, length = struct.unpack_from(">BH", raw, start + 1)
        content = raw[start + 4 : start + 2 + length]
        if marker == _APP1:
            keep = content.startswith(b"Exif\0")
        elif _APP0 <= marker <= _APP15:
            keep = len(content) >= _SHORTEST.get(marker, 1 << 16)
        else:
            keep = marker != _COM
        if keep:
            yield raw[start : start + 2 + length]
        start += 2 + max(length, 2)  # a length says at least itself
    yield raw[start:]
