"""Images -> features, a batch at a time: reading, decoding and resizing run in threads beside the network."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError, MmgenError
from ..system.process import cores
from .features import Extractor
from .image_sets import ImageSet

_MOST_THREADS = 16
_AHEAD = 2  # batches that are read while the network works on another


def features_of(
    images: ImageSet, ranges: Iterable[range], extractor: Extractor, device: torch.device | str, *, pixels: bool = False
) -> Iterator[tuple[range, Tensor, list[np.ndarray]]]:
    """Yields (image numbers, features float [n, D] on the device, images uint8 [C, H, W] if `pixels`) for each range, in order.

    At most three batches are in memory. Raises DataError naming an image that cannot be read or has another size than the
    first where the protocol needs one size, and MmgenError where a batch does not fit into the GPU's memory.
    """
    size = images.shape(extractor.colour) if extractor.same_size else None
    for numbers, batch, block in _batches(images, ranges, extractor, size, pixels):
        try:
            with torch.no_grad():  # around no yield: it would hold for whoever asks, too
                features = extractor.extract(_sent(torch.from_numpy(batch), torch.device(device)))
        except torch.OutOfMemoryError as error:
            raise MmgenError(
                f"the GPU's memory is too small for {len(numbers)} images at a time: lower --batch-size; the scores stay the same"
            ) from error
        yield numbers, features, block


def _sent(batch: Tensor, device: torch.device) -> Tensor:
    """To the device, from pinned memory where that is a GPU: else the copy waits until the network is through with the batch before."""
    return batch.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else batch.to(device)


def _batches(
    images: ImageSet, ranges: Iterable[range], extractor: Extractor, size: tuple[int, ...] | None, pixels: bool
) -> Iterator[tuple[range, np.ndarray, list[np.ndarray]]]:
    """(image numbers, uint8 [n, C, H, W], or float32 as `extractor.prepare` makes it, the images if `pixels`), read ahead."""
    workers = min(cores(), _MOST_THREADS)
    with ThreadPoolExecutor(workers) as threads:
        waiting: deque[tuple[range, list[Future]]] = deque()
        try:
            for numbers in ranges:
                if images.threaded:
                    pieces = [threads.submit(_read_piece, images, piece, extractor, size) for piece in _cut(numbers, workers)]
                else:  # blocks in order, on this thread; only what comes after in the others
                    block = images.read(numbers.start, numbers.stop, extractor.colour)
                    pieces = [
                        threads.submit(_prepare, images, piece, block[piece.start - numbers.start : piece.stop - numbers.start],
                                       extractor, size)
                        for piece in _cut(numbers, workers if extractor.prepare else 1)
                    ]  # fmt: skip
                waiting.append((numbers, pieces))
                if len(waiting) > _AHEAD:
                    yield _joined(*waiting.popleft(), pixels)
            while waiting:
                yield _joined(*waiting.popleft(), pixels)
        finally:
            for _, pieces in waiting:
                for piece in pieces:
                    piece.cancel()


def _joined(numbers: range, pieces: list[Future], pixels: bool) -> tuple[range, np.ndarray, list[np.ndarray]]:
    parts, blocks = zip(*(piece.result() for piece in pieces), strict=True)
    return numbers, parts[0] if len(parts) == 1 else np.concatenate(parts), [image for block in blocks for image in block] if pixels else []


def _read_piece(
    images: ImageSet, numbers: range, extractor: Extractor, size: tuple[int, ...] | None
) -> tuple[np.ndarray, np.ndarray | list[np.ndarray]]:
    return _prepare(images, numbers, images.read(numbers.start, numbers.stop, extractor.colour), extractor, size)


def _prepare(
    images: ImageSet,
    numbers: range,
    block: np.ndarray | list[np.ndarray],
    extractor: Extractor,
    size: tuple[int, ...] | None,
) -> tuple[np.ndarray, np.ndarray | list[np.ndarray]]:
    """What the network sees, and the images themselves."""
    if size is not None:
        for i, image in zip(numbers, block, strict=True):
            if image.shape != size:
                raise DataError(
                    f"{images.names(i)} is {_words(image.shape)}, but the first image is {_words(size)}, and {extractor.title} "
                    "needs images of one kind: resize them all alike, or score with --mode clean"
                )
    if extractor.prepare is not None:
        prepared = [extractor.prepare(np.ascontiguousarray(image.transpose(1, 2, 0))) for image in block]
        return np.ascontiguousarray(np.stack(prepared).transpose(0, 3, 1, 2)), block
    batch = np.ascontiguousarray(block if isinstance(block, np.ndarray) else np.stack(block))
    return (batch if batch.flags.writeable else batch.copy()), block  # torch warns about memory that it may not write to


def _cut(numbers: range, parts: int) -> list[range]:
    """A range in up to `parts` ranges of about the same length."""
    size = -(-len(numbers) // max(1, min(parts, len(numbers))))
    return [range(i, min(i + size, numbers.stop)) for i in range(numbers.start, numbers.stop, size)]


def _words(shape: tuple[int, ...]) -> str:
    channels, height, width = shape
    return f"{width}x{height} {'grey' if channels == 1 else 'colour'}"
