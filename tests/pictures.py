"""Small pictures of one colour each, as files, zips, tars and tables, for the tests of data."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

from PIL import Image

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9), (200, 100, 0), (0, 100, 200)]


def png(colour: int | tuple[int, ...], format: str = "PNG", size: int = 4) -> bytes:
    """A picture of a colour, or of number `colour` of COLOURS."""
    file = io.BytesIO()
    Image.new("RGB", (size, size), COLOURS[colour] if isinstance(colour, int) else colour).save(file, format)
    return file.getvalue()


def colours(source: Any) -> list[tuple[int, int, int]]:
    """The top left pixel of every image, by Pillow."""
    return [Image.open(io.BytesIO(source.read(i))).getpixel((0, 0)) for i in range(source.length)]


def encoded(content: bytes | str | dict | list) -> bytes:
    content = json.dumps(content) if isinstance(content, (dict, list)) else content
    return content.encode() if isinstance(content, str) else content


def folder_of(place: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(encoded(content))
    return place


def zip_of(place: Path, files: dict[str, Any]) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(place, "w", zipfile.ZIP_STORED) as archive:
        for name, content in files.items():
            archive.writestr(name, encoded(content))
    return place


def tar_of(place: Path, files: dict[str, Any]) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(place, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(encoded(content))
            archive.addfile(member, io.BytesIO(encoded(content)))
    return place


def parquet_of(place: Path, **columns: Any) -> Path:
    """Six pictures and other columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    place.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": png(colour), "path": None} for colour in COLOURS]
    pq.write_table(pa.table({"image": images, **columns}), place)
    return place
