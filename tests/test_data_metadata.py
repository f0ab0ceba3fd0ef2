"""Damaged metadata beside sound pixels: the pixels are read."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from mmgen.data import decode
from mmgen.data.image_source import CorruptImage
from mmgen.data.mending import without_metadata

RGB = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def encoded(format: str, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(RGB).save(file, format, **options)
    return file.getvalue()


def chunk(kind: bytes, content: bytes, wrong: int = 0) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content) ^ wrong)


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def orientation(number: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = number
    return exif.tobytes()


PNG, JPEG = encoded("PNG"), encoded("JPEG", quality=95)
BOMB = zlib.compress(bytes(2**21))
CHUNKS = {
    "text with a wrong sum": chunk(b"tEXt", b"a\0b", wrong=1),
    "text compressed in an unknown way": chunk(b"zTXt", b"a\0\x07junk"),
    "text that is a bomb": chunk(b"zTXt", b"a\0\0" + BOMB),
    "XMP that is a bomb": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + BOMB),
    "a profile with a wrong sum": chunk(b"iCCP", b"a\0\0" + zlib.compress(b"x"), wrong=1),
    "a profile compressed in an unknown way": chunk(b"iCCP", b"a\0\x05junk"),
    "EXIF that is none": chunk(b"eXIf", b"junk"),
    "EXIF that points nowhere": chunk(b"eXIf", b"II*\0\xff\xff\xff\xff"),
    "a density cut short": chunk(b"pHYs", b"\0"),
    "an animation cut short": chunk(b"acTL", b"\0"),
}
SEGMENTS = {
    "a profile cut short": segment(0xE2, b"ICC_PROFILE\0"),
    "an Adobe segment cut short": segment(0xEE, b"Adobe"),
    "EXIF that is none": segment(0xE1, b"Exif\0\0junk"),
    "XMP that is none": segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<<"),
    "a thumbnail that is none": segment(0xED, b"Photoshop 3.0\0008BIM\x04\x04\xff"),
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("name", CHUNKS)
def test_png(name):
    damaged = PNG[:33] + CHUNKS[name] + PNG[33:]  # behind the header
    np.testing.assert_array_equal(decode.decode(damaged, 8, 3), RGB.transpose(2, 0, 1))


@pytest.mark.parametrize("name", SEGMENTS)
def test_jpeg(name):
    damaged = JPEG[:2] + SEGMENTS[name] + JPEG[2:]
    np.testing.assert_array_equal(decode.decode(damaged, 8, 3), decode.decode(JPEG, 8, 3))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_webp():
    damaged = encoded("WEBP", lossless=True, exif=b"Exif\0\0II*\0junk", icc_profile=b"junk", xmp=b"<<")
    np.testing.assert_array_equal(decode.decode(damaged, 8, 3), RGB.transpose(2, 0, 1))


def test_nothing_is_shown_of_it(tmp_path):
    """Pillow warns of damaged metadata, with a path and a line of its own code."""
    (tmp_path / "x.webp").write_bytes(encoded("WEBP", exif=b"Exif\0\0II*\0junk"))
    code = "import sys; from mmgen.data import decode; decode.decode(open(sys.argv[1], 'rb').read(), 8, 3)"
    child = subprocess.run([sys.executable, "-c", code, tmp_path / "x.webp"], capture_output=True, text=True, timeout=60)
    assert (child.returncode, child.stderr) == (0, "")


def test_what_is_whole_among_it_still_counts():
    """The orientation, when only the text beside it is damaged."""
    turned = np.rot90(RGB).transpose(2, 0, 1)  # orientation 8: shown after a quarter turn counter-clockwise
    damaged = PNG[:33] + chunk(b"eXIf", orientation(8).removeprefix(b"Exif\0\0")) + CHUNKS["text with a wrong sum"] + PNG[33:]
    np.testing.assert_array_equal(decode.decode(damaged, 8, 3), turned)
    damaged = JPEG[:2] + segment(0xE1, orientation(8)) + SEGMENTS["a profile cut short"] + JPEG[2:]
    expected = np.rot90(decode.decode(JPEG, 8, 3), axes=(1, 2))
    np.testing.assert_array_equal(decode.decode(damaged, 8, 3), expected)


@pytest.mark.parametrize("raw", [PNG, JPEG])
def test_damaged_pixels_are_refused_all_the_same(raw):
    assert without_metadata(b"text") is None
    middle = len(raw) // 2
    for damaged in (raw[:middle], raw[:33] + CHUNKS["text with a wrong sum"] + raw[33:middle]):
        with pytest.raises(CorruptImage):
            decode.decode(damaged, 8, 3)
    with pytest.raises(CorruptImage):  # a critical chunk with a wrong sum
        decode.decode(PNG[:29] + b"junk" + PNG[33:], 8, 3)
