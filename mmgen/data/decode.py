"""One encoded image -> pixels, uint8 [C, H, W]: the one decoder of training, references and samples alike.

Upright by EXIF; 16-bit grey to the nearest 8 bits; transparency dropped; palettes, CMYK and the rest by Pillow's convert.
"""

from __future__ import annotations

import contextlib
import io
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from .image_source import CorruptImage
from .mending import without_metadata
from .plain_png import SIGNATURE, plain_png

MAX_PIXELS = 89_478_485  # Pillow's own limit: beyond it, a small file may be made to fill the memory
_LARGE = 1 << 24  # pixels: of images beyond, several at a time could fill the memory
# What images of training sets come in. Not among them: EPS, which Pillow has Ghostscript run, and other rare decoders
_FORMATS = ("PNG", "JPEG", "MPO", "JPEG2000", "WEBP", "AVIF", "GIF", "BMP", "DIB", "TIFF", "PPM", "ICO", "TGA")
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # metadata that are damaged: of pixels, it raises errors
_large_one = threading.RLock()
_GREY_MODES = ("1", "L", "LA", "La", "I")
_ORIENTATION = 0x0112
_UPRIGHT = {  # EXIF orientation -> what undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(raw: bytes | Image.Image, resolution: int, channels: int) -> np.ndarray:
    """An encoded image, or a PIL one -> uint8 [channels, resolution, resolution]. Raises CorruptImage."""
    with open_image(raw) as image:
        return to_pixels(image, resolution, channels)


@contextlib.contextmanager
def open_image(raw: bytes | Image.Image, most: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """Decodes an image fully and turns it as its EXIF orientation says. It is to be used within the block: of large images
    only one thread at a time has one.

    Damaged metadata are passed over where the pixels are sound. Raises CorruptImage where the bytes are no image, are cut
    short, or are more than `most` pixels.
    """
    with contextlib.ExitStack() as stack:
        yield opened(raw, most, stack.enter_context)


def opened(raw: bytes | Image.Image, most: int, alone: Callable[[Any], Any]) -> Image.Image:
    """The image of `open_image`; alone(lock) is called for a large one, which is to be used while the lock is held."""
    try:
        image = _loaded(raw, most, alone)
    except CorruptImage:
        mended = without_metadata(raw) if isinstance(raw, bytes) else None
        if mended is None:
            raise
        image = _loaded(mended, most, alone)
    return _upright(image)


def _loaded(raw: bytes | Image.Image, most: int, alone: Callable[[Any], Any]) -> Image.Image:
    plain = plain_png(raw) if isinstance(raw, bytes) else None
    if plain is not None:
        return plain
    try:
        image = raw if isinstance(raw, Image.Image) else _identified(raw)
        width, height = image.size  # the header alone has been read
        _check_size(width, height, most)
        if width * height > _LARGE:
            alone(_large_one)
        image.load()
        return image
    except CorruptImage:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise CorruptImage(_reason(raw, error)) from error


def _identified(raw: bytes) -> Image.Image:
    if raw.startswith(SIGNATURE):  # `Image.open` takes half as long again
        with contextlib.suppress(Exception):  # which says what is wrong
            return PngImageFile(io.BytesIO(raw))
    return Image.open(io.BytesIO(raw), formats=_formats())


def _upright(image: Image.Image) -> Image.Image:
    if not image.info and type(image) in (Image.Image, PngImageFile):
        return image
    try:
        turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF says nothing
        turn = None
    return image if turn is None else image.transpose(turn)


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


@cache
def image_suffixes() -> tuple[str, ...]:
    """The endings of file names, lower case, of all formats that are decoded: whatever this Pillow can of them."""
    known = Image.registered_extensions()
    return tuple(sorted(suffix for suffix, name in known.items() if name in (*_formats(), "MPO")))  # an MPO is opened as JPEG


def is_grey(image: Image.Image) -> bool:
    """Whether nothing is lost in one channel: a grey mode, or red, green and blue equal at every pixel."""
    if image.mode in _GREY_MODES or image.mode.startswith("I;16"):
        return True
    rgb = np.asarray(_to_mode(image, "RGB"))
    return bool((rgb[..., :1] == rgb[..., 1:]).all())


def to_pixels(image: Image.Image, resolution: int | None, channels: int) -> np.ndarray:
    """A loaded image of any mode and size -> uint8 [channels, resolution, resolution], contiguous; resolution None: its own size."""
    return np.array(pixels_of(image, resolution, channels), order="C")


def pixels_of(image: Image.Image, resolution: int | None, channels: int) -> np.ndarray:
    """`to_pixels` without the copy: a read-only view in Pillow's order of memory.

    Transparency is dropped, not blended, as every code base of the field does (`convert("RGB")`). Raises CorruptImage
    where the mode has no 8-bit meaning.
    """
    try:
        image = _to_mode(image, "L" if channels == 1 else "RGB")
        image = image if resolution is None else centre_crop(image, resolution)
    except ValueError as error:  # Pillow knows no conversion, from LAB for instance
        raise CorruptImage(f"mode {image.mode}: {error}") from error
    pixels = np.asarray(image)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def centre_crop(image: Image.Image, resolution: int) -> Image.Image:
    """ADM's preprocessing: halve while the short side is twice too long, resize it to `resolution`, crop the centre.

    Halving averages 2x2 pixels (BOX); the last step is BICUBIC. An image of that size is returned untouched.
    """
    if image.size == (resolution, resolution):
        return image
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    _check_size(*size, MAX_PIXELS)  # a strip of 1 x 100,000 pixels enlarged
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))


def crop_corner(height: int, width: int, resolution: int) -> tuple[int, int]:
    """Top and left of the square that `centre_crop` takes from an image of this size, in pixels of the image resized."""
    if (height, width) == (resolution, resolution):
        return 0, 0
    while min(height, width) >= 2 * resolution:
        height, width = height // 2, width // 2
    scale = resolution / min(height, width)
    return (round(height * scale) - resolution) // 2, (round(width * scale) - resolution) // 2


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    """To "L" or "RGB", 8 bits."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _eight_bits(image)
    if image.mode == "F":
        raise CorruptImage("its pixels are floating-point numbers of unknown range")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours; straight to RGB, Pillow warns about every image
    return image if image.mode == mode else image.convert(mode)


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey -> 8-bit: round(v / 257), which maps 65535 to 255. Pillow's own conversion clips at 255."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise CorruptImage("its grey values do not fit 16 bits")
    values = values.astype(np.int32)
    values += 128
    values //= 257
    return Image.fromarray(values.astype(np.uint8))


def _check_size(width: int, height: int, most: int) -> None:
    if width * height > most:
        raise CorruptImage(f"{width} x {height} pixels are more than the {most:,} that are safe to open")
    if width < 1 or height < 1:
        raise CorruptImage(f"{width} x {height} pixels are none")


def _reason(raw: bytes | Image.Image, error: Exception) -> str:
    if not isinstance(raw, bytes):
        return str(error)
    if not raw:
        return "empty"
    if raw.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the image itself: run `git lfs pull`"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image of a format that is known"
    return str(error) or type(error).__name__
