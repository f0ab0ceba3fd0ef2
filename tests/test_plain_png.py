"""The quick way to read small PNG files: what it reads is what Pillow reads, and whatever is unusual it leaves to Pillow."""

from __future__ import annotations

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from mmgen.data.decode import open_image
from mmgen.data.image_source import CorruptImage
from mmgen.data.plain_png import plain_png
from mmgen.report.images import png_bytes
from mmgen.system.files import read_bytes, read_parts

RANDOM = np.random.default_rng(0)


def picture(mode: str, width: int = 13, height: int = 9) -> Image.Image:
    smooth = Image.fromarray(RANDOM.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((width, height))
    return smooth.convert(mode)


def packed(image: Image.Image, **options) -> bytes:
    content = io.BytesIO()
    image.save(content, format="PNG", **options)
    return content.getvalue()


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_it_reads_what_pillow_reads(mode):
    for width, height in ((1, 1), (13, 9), (32, 32), (256, 256)):
        image = picture(mode, width, height)
        for raw in (packed(image), packed(image, optimize=True), packed(image, compress_level=0)):
            found = plain_png(raw)
            assert found.mode == mode and found.tobytes() == image.tobytes()
    array = np.asarray(picture(mode)).reshape(9, 13, -1).transpose(2, 0, 1)
    assert (np.asarray(plain_png(png_bytes(array))).reshape(9, 13, -1).transpose(2, 0, 1) == array).all()


def test_the_unusual_is_left_to_pillow():
    text, exif = PngImagePlugin.PngInfo(), Image.Exif()
    text.add_text("a", "b")
    exif[0x0112] = 6  # turned
    rgb = picture("RGB")
    for raw in (
        packed(rgb, pnginfo=text), packed(rgb, exif=exif), packed(rgb, transparency=(1, 2, 3)), packed(picture("RGB", 257, 256)),
        *(packed(picture(mode)) for mode in ("P", "1", "RGBA", "LA")), packed(picture("L").convert("I;16")), b"", packed(rgb)[:40],
    ):  # fmt: skip
        assert plain_png(raw) is None
    with open_image(packed(rgb, exif=exif)) as image:
        assert image.size == (9, 13)


def test_a_bomb_is_not_opened():
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = (header, b"IDAT" + zlib.compress(bytes(1 << 20)), b"IEND")
    raw = b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    assert plain_png(raw) is None
    with pytest.raises(CorruptImage, match="safe to open"), open_image(raw):
        pass


def test_damage_is_left_to_pillow():
    """Each byte changed, and each length: Pillow's reader says what is wrong, and what can be mended."""
    raw = packed(picture("RGB"))
    for i in range(len(raw)):
        assert plain_png(raw[:i] + bytes([raw[i] ^ 1 << i % 8]) + raw[i + 1 :]) is None
        assert plain_png(raw[:i]) is None


def test_checksums_that_are_right_over_pixels_that_are_not_there():
    for data in (b"", zlib.compress(bytes(10)), b"no zlib"):
        chunks = (b"IHDR" + struct.pack(">IIBBBBB", 4, 4, 8, 2, 0, 0, 0), b"IDAT" + data, b"IEND")
        raw = b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
        assert plain_png(raw) is None
        with pytest.raises(CorruptImage), open_image(raw):
            pass


def test_files_read_without_buffers(tmp_path):
    path, content = str(tmp_path / "a"), os.urandom(1000)
    for size in (0, 1, 1000):
        (tmp_path / "a").write_bytes(content[:size])
        assert read_bytes(path) == content[:size]
    assert read_parts(path, [-5, 400, 990], 100) == content[:100] + content[400:500] + content[990:]
    with pytest.raises(FileNotFoundError) as raised:
        read_bytes(str(tmp_path / "b"))
    assert raised.value.filename == str(tmp_path / "b")
