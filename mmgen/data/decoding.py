"""All images of a source, in order, decoded by several threads, with only one chunk of them in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from ..errors import DataError
from ..system.process import cores
from .decode import MAX_PIXELS, is_grey, open_image, opened, pixels_of
from .image_source import CorruptImage, ImageSource

PROBED = 16  # images that decide whether a source is grey
_CHUNK_BYTES = 1 << 25
_MOST_THREADS = 16
_AT_ONCE = 32  # images that a thread is given at a time: handing over one takes a third as long as decoding a small one


@dataclass(frozen=True)
class Plan:
    resolution: int
    channels: int
    same_size: bool  # the resolution is the first image's own: an image of another size is an error
    only_grey: bool  # one channel was chosen because the first images are grey: a colour image is an error
    skip_corrupt: bool


@dataclass(frozen=True)
class Chunk:
    numbers: range  # the images of the source that were looked at
    pixels: np.ndarray  # uint8 [n, C, R, R]
    kept: list[int]  # which images of the source these are, [n]
    skipped: list[str]  # names of those that cannot be read
    sizes: np.ndarray  # int64 [n, 2]: heights and widths of the images themselves


def settle(source: ImageSource, resolution: int | None, channels: int | None, on_corrupt: str) -> Plan:
    """Fills in what was left open from the first images that can be read: the resolution from 1, the channels from 16.

    Raises DataError where the first image is not square and no resolution is given, or no image can be read.
    """
    own_size, grey, colour = resolution, 0, False
    for i in range(source.length):
        if own_size is not None and (channels is not None or colour or i >= PROBED and grey):
            break
        try:
            with open_image(source.read(i)) as image:
                if own_size is None:
                    if image.width != image.height:
                        size = f"{image.width}x{image.height}"
                        raise DataError(f"{source.names(i)} is {size}, not square: give --resolution to resize and crop")
                    own_size = image.width
                colour = colour or not is_grey(image)
                grey += not colour
        except CorruptImage as error:
            if on_corrupt != "skip":
                raise _stop(source.names(i), error) from error
    if own_size is None or channels is None and not (colour or grey):
        raise DataError(f"none of the {source.length:,} images can be read")
    return Plan(
        resolution=own_size,
        channels=channels or (3 if colour else 1),
        same_size=resolution is None,
        only_grey=channels is None and not colour,
        skip_corrupt=on_corrupt == "skip",
    )


def decode_all(source: ImageSource, plan: Plan, progress: Callable[[int, int], None] | None = None) -> Iterator[Chunk]:
    """Yields all images of a source in order. Raises DataError, naming the image, where one does not fit the plan."""
    size = min(max(_CHUNK_BYTES // (plan.channels * plan.resolution**2), 16), 1024)
    found = False
    for chunk in decode_chunks(source, plan, range(source.length), size):
        found = found or bool(chunk.kept)
        yield chunk
        if progress is not None:
            progress(chunk.numbers.stop, source.length)
    if not found:
        raise DataError(f"none of the {source.length:,} images can be read")


def decode_chunks(source: ImageSource, plan: Plan, numbers: range, size: int) -> Iterator[Chunk]:
    """Yields the images `numbers` of a source in order, up to `size` at a time. Raises DataError as `decode_all`."""
    count = min(cores(), _MOST_THREADS)
    with ThreadPoolExecutor(count) as threads:
        for start in range(numbers.start, numbers.stop, size):
            part = range(start, min(start + size, numbers.stop))
            few = min(max(len(part) // (4 * count), 1), _AT_ONCE)
            pixels = np.empty((len(part), plan.channels, plan.resolution, plan.resolution), np.uint8)

            def decode(some: range, pixels: np.ndarray = pixels, first: int = start) -> list[tuple[int, int] | None]:
                return [_decode_into(pixels[i - first], source, i, plan) for i in some]

            found = [size for some in threads.map(decode, _pieces(part, few)) for size in some]
            kept = [i for i, size in zip(part, found) if size is not None]
            skipped = [source.names(i) for i, size in zip(part, found) if size is None]
            sizes = np.array([size for size in found if size is not None], np.int64).reshape(-1, 2)
            yield Chunk(part, pixels[[i - start for i in kept]] if skipped else pixels, kept, skipped, sizes)


def _pieces(numbers: range, size: int) -> list[range]:
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]


def ahead(chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    """The same chunks; each is decoded while the caller works on the one before."""
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(next, chunks, None)
        while (chunk := waiting.result()) is not None:
            waiting = thread.submit(next, chunks, None)
            yield chunk


def _decode_into(pixels: np.ndarray, source: ImageSource, i: int, plan: Plan) -> tuple[int, int] | None:
    """Image i to `pixels` uint8 [C, R, R] -> its own height and width; None where it cannot be read and may be skipped."""
    try:
        with contextlib.ExitStack() as stack:
            image = opened(source.read(i), MAX_PIXELS, stack.enter_context)
            if plan.same_size and image.size != (plan.resolution, plan.resolution):
                first = f"{plan.resolution}x{plan.resolution}"
                raise DataError(
                    f"{source.names(i)} is {image.width}x{image.height}, but the first image is {first}: "
                    "give --resolution to resize and crop all of them"
                )
            if plan.only_grey and not is_grey(image):
                raise DataError(f"{source.names(i)} is in colour, but the first images are grey: give --channels 3, or 1")
            pixels[...] = pixels_of(image, plan.resolution, plan.channels)
            return image.height, image.width
    except CorruptImage as error:
        if plan.skip_corrupt:
            return None
        raise _stop(source.names(i), error) from error


def _stop(name: str, error: CorruptImage) -> DataError:
    return DataError(f"{name} cannot be read as an image ({error}): mend it, or leave such out with --on-corrupt skip")
