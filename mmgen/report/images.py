"""Images to pictures that a person looks at: PNG files, grids of tiles, captioned rows."""

from __future__ import annotations

import io
import math
import os
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..system.files import replacing

_SMALL = 64 * 64 * 3  # numbers: of larger images filters make the file smaller
READABLE = 64  # pixels: smaller tiles are enlarged to at least about this
_INK, _SOFT = "#222222", "#666666"


def save_png(path: str | os.PathLike, image: Tensor | np.ndarray | Image.Image) -> None:
    """Writes a PNG file, atomically: an image uint8 [C, H, W] with C = 1 (grey) or 3 (RGB), or a picture from below.

    Raises ValueError for an array of another type or shape, MmgenError where the file cannot be written.
    """
    content = png_bytes(image)
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def png_bytes(image: Tensor | np.ndarray | Image.Image) -> bytes:
    """What a PNG file of an image of `save_png` holds. Raises ValueError for an array of another type or shape."""
    if not isinstance(image, Image.Image):
        array = _array(image)
        if array.ndim != 3:
            raise ValueError(f"an image is [C, H, W], not of shape {list(array.shape)}")
        _check(array[None])
        pixels = np.ascontiguousarray(array.transpose(1, 2, 0) if len(array) == 3 else array[0])
        if 0 < pixels.size <= _SMALL:
            return _small_png(pixels)
        image = Image.fromarray(pixels)
    content = io.BytesIO()
    image.save(content, format="PNG")
    return content.getvalue()


def _small_png(pixels: np.ndarray) -> bytes:
    """uint8 [H, W] or [H, W, 3] as a PNG file without filters (https://www.w3.org/TR/png-3/): Pillow takes twice as long for it."""
    height, width = pixels.shape[:2]
    rows = np.zeros((height, 1 + pixels.size // height), np.uint8)  # the first byte says which filter the row has: 0, none
    rows[:, 1:] = pixels.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2 if pixels.ndim == 3 else 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes())), (b"IEND", b""))
    packed = (struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def is_whole_png(path: str | os.PathLike) -> bool:
    """Whether a file is a PNG file to its end, by the checksums in it."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # what Pillow raises for damaged files
        return False
    return True


def grid(
    images: Tensor | np.ndarray,
    columns: int,
    *,
    scale: int | None = None,
    padding: int = 2,
) -> Image.Image:
    """Images uint8 [N, C, H, W], C = 1 or 3, as rows of `columns` tiles on white: an RGB picture.

    Args:
        images: shown from left to right, then down.
        columns: tiles a row; fewer images than that make a narrower picture.
        scale: enlarges by repeating pixels; None enlarges small images to at least READABLE pixels.
        padding: white pixels between the tiles and around the picture.

    Raises ValueError for no images, another type or shape, or a number of columns or a scale below 1.
    """
    array = _array(images)
    _check(array)
    scale = _scale(array) if scale is None else scale
    if columns < 1 or scale < 1 or padding < 0:
        raise ValueError(f"cannot lay out {columns} columns at scale {scale} with padding {padding}")
    count, channels, height, width = array.shape
    columns = min(columns, count)
    lines = math.ceil(count / columns)

    tiles = np.broadcast_to(array, (count, 3, height, width)).transpose(0, 2, 3, 1)
    tiles = tiles.repeat(scale, axis=1).repeat(scale, axis=2)
    after = ((0, lines * columns - count), (0, padding), (0, padding), (0, 0))
    tiles = np.pad(tiles, after, constant_values=255)
    tall, wide = tiles.shape[1:3]
    tiles = tiles.reshape(lines, columns, tall, wide, 3).transpose(0, 2, 1, 3, 4)
    canvas = tiles.reshape(lines * tall, columns * wide, 3)
    before = ((padding, 0), (padding, 0), (0, 0))
    return Image.fromarray(np.ascontiguousarray(np.pad(canvas, before, constant_values=255)))


def labelled_rows(
    rows: Sequence[tuple[str, Tensor | np.ndarray]],
    *,
    columns: int = 10,
    names: Sequence[str] = (),
    scale: int | None = None,
    padding: int = 2,
) -> Image.Image:
    """Rows of images with a caption at the left of each: samples of 1, 2, 4, 8 steps above real images, say.

    Args:
        rows: captions with images uint8 [N, C, H, W]; a row of more than `columns` images goes on in the next line. What
            follows a caption's first line is written smaller.
        columns, scale, padding: as for `grid`.
        names: of the columns, written above them in up to three lines, and cut where they are longer.

    Raises ValueError for no rows, and what `grid` raises.
    """
    if not rows:
        raise ValueError("a picture needs at least one row")
    pictures = [grid(images, columns, scale=scale, padding=padding) for _, images in rows]
    tile = max(_array(images).shape[3] * (scale or _scale(_array(images))) for _, images in rows)
    size = min(max(tile // 4, 14), 28)  # the captions grow with the tiles, within what is readable and not loud
    large, small = ImageFont.load_default(size), ImageFont.load_default(max(size * 7 // 8, 12))
    margin, gap = size, max(size // 2, 3 * padding)

    captions = [[(line, small if i else large) for i, line in enumerate(caption.split("\n"))] for caption, _ in rows]
    widest = max(font.getlength(line) for caption in captions for line, font in caption)
    left = margin + math.ceil(widest) + margin // 2
    headings = [_lines(name, small, tile) for name in names[:columns]]
    heading = max(map(len, headings), default=0)
    first = margin + (round(size * (1 + 1.3 * (heading - 1))) + gap if headings else 0)
    width = left + max(picture.width for picture in pictures) + margin
    height = first + margin + sum(picture.height for picture in pictures) + gap * (len(rows) - 1)
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    for i, lines in enumerate(headings):
        middle = left + padding + i * (tile + padding) + tile / 2
        for j, line in enumerate(lines):  # the last one just above the tiles
            above = 1.3 * size * (heading - len(lines) + j)
            draw.text((middle, margin + size + above), line, fill=_INK, font=small, anchor="ms")
    top = first
    for caption, picture in zip(captions, pictures, strict=True):
        canvas.paste(picture, (left, top))
        y = top + picture.height / 2 - 0.65 * size * (len(caption) - 1)
        for i, (line, font) in enumerate(caption):
            draw.text((left - margin // 2, y), line, fill=_SOFT if i else _INK, font=font, anchor="rm")
            y += 1.3 * size
        top += picture.height + gap
    return canvas


def _lines(text: str, font: ImageFont.FreeTypeFont, width: float, most: int = 3) -> list[str]:
    """A text broken between words into at most so many lines that are not wider, with an ellipsis where it is cut."""
    lines: list[str] = []
    words = text.split(",")[0].split() or [""]  # ImageNet's names are lists of synonyms
    while words and len(lines) < most:
        count = len(words)
        while count > 1 and font.getlength(" ".join(words[:count])) > width:
            count -= 1
        if len(lines) == most - 1:
            count = len(words)
        lines.append(_fitting(" ".join(words[:count]), font, width))
        words = words[count:]
    return lines


def _fitting(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """As much of a text as is not wider, with an ellipsis where it is cut."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "\u2026") > width:
        text = text[:-1]
    return text.rstrip() + "\u2026"


def _scale(array: np.ndarray) -> int:
    return max(1, math.ceil(READABLE / max(array.shape[2:])))


def _array(images: Tensor | np.ndarray) -> np.ndarray:
    return images.detach().cpu().numpy() if isinstance(images, Tensor) else np.asarray(images)


def _check(array: np.ndarray) -> None:
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1] not in (1, 3) or 0 in array.shape:
        raise ValueError(f"images must be uint8 [N, C, H, W] with C = 1 or 3, not {array.dtype} {list(array.shape)}")
