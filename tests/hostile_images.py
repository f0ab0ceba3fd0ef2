"""Images that are made to harm, and odd ones, as bytes; archives and tables of them."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib

import numpy as np
from PIL import Image


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def picture(side: int = 8, mode: str = "RGB", seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, depth: int = 8, colour: int = 2, content: bytes = b"", more: bytes = b"") -> bytes:
    """A PNG that says it has this size, whatever is in it."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + more + chunk(b"IDAT", content or zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def jpeg_of(width: int, height: int) -> bytes:
    content = bytearray(encoded(picture(), "JPEG"))
    place = content.index(b"\xff\xc0") + 5
    content[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(content)


def bmp_of(width: int, height: int) -> bytes:
    content = bytearray(encoded(picture(), "BMP"))
    content[18:26] = struct.pack("<ii", width, height)
    return bytes(content)


def gif_of(width: int, height: int) -> bytes:
    content = bytearray(encoded(picture(mode="P"), "GIF"))
    content[6:10] = struct.pack("<HH", width, height)
    return bytes(content)


def tiff_of(tag: int, value: int) -> bytes:
    """A TIFF with one number of its directory changed: 256 and 257 are the size, 273 and 279 where the pixels are."""
    content = bytearray(encoded(picture(), "TIFF"))
    (start,) = struct.unpack_from("<I", content, 4)
    for i in range(struct.unpack_from("<H", content, start)[0]):
        place = start + 2 + 12 * i
        if struct.unpack_from("<H", content, place)[0] == tag:
            struct.pack_into("<HII", content, place + 2, 4, 1, value)
    return bytes(content)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(harm) run\nshowpage\n%%EOF\n"
BAD = {
    "a PNG of 60,000 x 60,000": png(60_000, 60_000),
    "a PNG of 60,000 x 60,000, 1 bit": png(60_000, 60_000, 1, 0),
    "a PNG of 2^31": png(2**31 - 1, 2**31 - 1),
    "a PNG of 1 x 2^31": png(1, 2**31 - 1),
    "a PNG of nothing": png(0, 0),
    "a PNG without pixels": png(8, 8, content=b"x"),
    "a PNG with a long chunk": b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 2**31 - 1) + b"IHDR",
    "a JPEG of 65,535 x 65,535": jpeg_of(65_535, 65_535),
    "a JPEG of nothing": jpeg_of(0, 0),
    "a BMP of 2^31": bmp_of(2**31 - 1, 2**31 - 1),
    "a BMP of less than nothing": bmp_of(-8, -8),
    "a GIF of 65,535 x 65,535": gif_of(65_535, 65_535),
    "a TIFF of 2^31": tiff_of(256, 2**31 - 1),
    "a TIFF with pixels elsewhere": tiff_of(273, 2**31 - 1),
    "a PPM of 10^6 x 10^6": b"P6 1000000 1000000 255\n" + bytes(100),
    "a PPM with a number of thousands of digits": b"P6 " + b"9" * 5000 + b" 8 255\n" + bytes(100),
    "EPS, a program": EPS,
    "a text": b"this is no image at all, " * 10,
    "nothing": b"",
    "zeros": bytes(10_000),
    "a pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
    "cut short": encoded(picture(64))[:-2000],
    "a JPEG cut short": encoded(picture(64), "JPEG")[:700],
    "floats": encoded(Image.fromarray(np.full((8, 8), 0.5, np.float32)), "TIFF"),
    "a zip": b"PK\x05\x06" + bytes(18),
}
STRIP = encoded(Image.new("L", (100_000, 1)))  # which a resize would enlarge beyond any memory
ODD = {  # images that are whole, and are read
    "16 bits": encoded(Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000)),
    "palette": encoded(picture(mode="P")),
    "palette with transparency": encoded(picture(mode="P"), transparency=3),
    "1 bit": encoded(picture(mode="1")),
    "transparent": encoded(picture(mode="RGBA")),
    "grey and transparent": encoded(picture(mode="LA")),
    "CMYK": encoded(picture(mode="CMYK"), "JPEG"),
    "an animation": encoded(picture(), "GIF", save_all=True, append_images=[picture(seed=i) for i in range(50)]),
    "an animated PNG": encoded(picture(), save_all=True, append_images=[picture(seed=i) for i in range(9)]),
    "9,000 x 9,000": png(9000, 9000, 1, 0, zlib.compress(bytes(9000 * (1 + 1125)))),
    "a PNG with text that unpacks": png(8, 8, more=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(100_000_000)))),
    "another size": encoded(picture(50)),
    "WebP": encoded(picture(), "WEBP"),
}  # fmt: skip


def zip_of(entries: list[tuple[str, bytes]], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as file:
        for name, content in entries:
            file.writestr(name, content)
    return stream.getvalue()


def encrypted(content: bytes) -> bytes:
    """A zip whose directory says that its first entry is encrypted."""
    content = bytearray(content)
    for sign, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(sign) + place] |= 1
    return bytes(content)
