"""Images to be scored, wherever they come from: a folder, an npz, a data set, a model that draws them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..data import Dataset
from ..data.content import content_hash
from ..data.decode import is_grey, open_image, to_pixels
from ..data.decoding import PROBED
from ..data.image_source import CorruptImage, ImageSource
from ..data.resolve import locate, resolve
from ..errors import DataError
from ..system.files import at_home
from ..sampling.folder import RECORD
from ..sampling.record import read_record
from .npz_images import NpzImages

if TYPE_CHECKING:
    from ..models.build import AnyModel
    from ..sampling.drawing import Plan

_TYPES = {"model": str, "model_sha256": str, "sampler": str, "grid": str, "data": str | None, "data_options": dict,
          "data_place": str, "data_fingerprint": str, "data_content": str,
          "steps": int, "nfe": int, "guidance": int | float, "seed": int}  # fmt: skip
MOST_PIXELS = 1 << 24  # of one image that is scored: a batch of them is in memory in its own size


@dataclass(frozen=True)
class ImageSet:
    """Images in a fixed order.

    Attributes:
        name: as the user called it.
        description: one line: layout, number, classes.
        length: how many.
        read: (start, stop, colour) -> uint8 [n, C, H, W], or a list of uint8 [C, H, W] of any sizes. `colour` makes three
            channels of grey images. Raises DataError naming an image that cannot be read.
        names: what image i is called in messages.
        threaded: whether `read` may run in several threads at once, and gains by it; else blocks are asked for in order.
        fingerprint: () -> a digest of the content; None of images that are drawn.
        path: where they lie, an absolute path, or a name that means the same in every folder; None of images that are drawn.
        record: how samples were made, as `sample_record.make_record` has it; None if nothing says.
        beside: the file that keeps their scores; None where there is no place for it.
        captions: of images that are drawn by a model of text, what each is drawn of.
        telling: of images that are drawn when they are read: telling(tell) is the same set, which calls tell(images drawn).
    """

    name: str
    description: str
    length: int
    read: Callable[[int, int, bool], np.ndarray | list[np.ndarray]]
    names: Callable[[int], str]
    threaded: bool = True
    fingerprint: Callable[[], str] | None = None
    path: str | None = None
    record: dict[str, Any] | None = None
    beside: Path | None = None
    telling: Callable[[Callable[[float], None]], ImageSet] | None = None
    captions: Callable[[], list[str]] | None = None

    def first(self, num: int | None) -> ImageSet:
        """The first `num` images. Raises DataError where there are fewer."""
        if num is None or num == self.length:
            return self
        if num > self.length:
            raise DataError(f"{self.name} has {self.length:,} images, fewer than the {num:,} asked for")
        return replace(self, length=num, description=f"the first {num:,} of {self.description}")

    def shape(self, colour: bool) -> tuple[int, ...]:
        """(C, H, W) of the first image."""
        return tuple(self.read(0, 1, colour)[0].shape)


def image_set(
    name: str, *, split: str = "train", image_column: str | None = None, follow_links: bool = False,
    record: dict[str, Any] | None = None,
) -> ImageSet:
    """The images that a name means, each in its own size: an npz (`arr_0`), or anything that `--data` takes.

    Images are decoded as for training (`data.decode`), but neither resized nor cropped. Samples that `mmgen sample` wrote
    bring their record with them. Raises DataError.
    """
    path = at_home(name)
    if path.is_file() and path.suffix.lower() == ".npz":
        if split != "train" or image_column is not None:
            what = f"the split {split}" if image_column is None else f"the column {image_column}"
            raise DataError(f"{name} is an npz, whose images are arr_0: it has not {what}, leave that out")
        return _npz(name, path)
    source = resolve(name, split=split, image_column=image_column, follow_links=follow_links)
    found = _record_of(name, path / RECORD, source.length) if path.is_dir() else None
    beside = None
    if path.is_dir():
        beside = path / "scores.json"
    elif path.is_file():
        beside = path.with_name(path.name + ".scores.json")
    return ImageSet(
        name=name,
        description=source.description,
        length=source.length,
        read=_reader(source),
        names=source.names,
        fingerprint=partial(content_hash, source),
        path=locate(name),
        record=found or record,
        beside=beside,
    )


def dataset_images(dataset: Dataset) -> ImageSet:
    """The images of a decoded data set: the pixels that training sees."""

    def read(start: int, stop: int, colour: bool) -> np.ndarray:
        return _coloured(np.asarray(dataset.images[start:stop]), colour)

    return ImageSet(
        name=dataset.name,
        description=dataset.description,
        length=len(dataset),
        read=read,
        names=lambda i: f"image {i} of {dataset.name}",
        threaded=False,
        fingerprint=lambda: dataset.fingerprint,
        path=dataset.path,
    )


def drawn_images(
    model: AnyModel, chosen: Plan, num: int, *, name: str, first: int = 0, record: dict[str, Any] | None = None,
    beside: Path | None = None,
) -> ImageSet:  # fmt: skip
    """Images number `first` to `first + num - 1` of a model, drawn when they are asked for and kept nowhere."""
    import torch

    from ..sampling.drawing import draw
    from ..sampling.prompts import texts_of

    def read(start: int, stop: int, colour: bool, tell: Callable[[float], None] | None = None) -> np.ndarray:
        told = None if tell is None or stop - start <= 1 else lambda done: tell(start + done)  # one alone: to know its shape
        return _coloured(draw(model, chosen, range(first + start, first + stop), told)[0].numpy(), colour)

    images = ImageSet(
        name=name,
        description=f"{num:,} samples of {name}",
        length=num,
        read=read,
        names=lambda i: f"sample {first + i} of {name}",
        threaded=False,
        record=record,
        beside=beside,
    )
    if model.config.text is not None:
        numbers = torch.arange(first, first + num)
        images = replace(images, captions=lambda: texts_of(model.config, chosen.prompts, chosen.seed, numbers))
    return replace(images, telling=lambda tell: replace(images, read=partial(read, tell=tell)))


def _npz(name: str, path: Path) -> ImageSet:
    file = NpzImages(path)
    record = _record_of(name, path.with_name(path.name + ".json"), file.length)

    def digest() -> str:
        sha256 = hashlib.sha256(b"arr_0" + repr(file.shape).encode())
        for start in range(0, file.length, 256):
            sha256.update(np.ascontiguousarray(file.read(start, min(start + 256, file.length))))
        return sha256.hexdigest()

    channels, height, width = file.shape
    return ImageSet(
        name=name,
        description=f"npz: {file.length:,} images of {width}x{height}, {channels} channel{'s' * (channels > 1)}",
        length=file.length,
        read=lambda start, stop, colour: _coloured(file.read(start, stop), colour),
        names=lambda i: f"image {i} of {name}",
        threaded=False,
        fingerprint=digest,
        path=str(path.absolute()),
        record=record,
        beside=path.with_name(path.name + ".scores.json"),
    )


def _record_of(name: str, path: Path, length: int) -> dict[str, Any] | None:
    """The record beside samples, if there is one. Raises DataError where it is not of these `length` images."""
    record = read_record(path)
    if record is None:
        return None
    if not record.get("complete"):
        raise DataError(f"{name} holds a part only of its {record['num']:,} samples: run the same `mmgen sample` command again")
    if record["num"] != length:
        raise DataError(
            f"{name} holds {length:,} images, and its record {path.name} says {record['num']:,}: take away what is no sample, "
            "run the same `mmgen sample` command again, or delete the record"
        )
    for key, kind in _TYPES.items():
        if key in record and (not isinstance(record[key], kind) or isinstance(record[key], bool)):
            raise DataError(f"{path} has been changed: {key} is {record[key]!r}; delete it, or draw the samples anew")
    return record


def _reader(source: ImageSource) -> Callable[[int, int, bool], list[np.ndarray]]:
    """`ImageSet.read` of a source: one channel where training would take one, the first images being grey."""

    @cache
    def grey() -> bool:
        return all(_opened(source, i, is_grey) for i in range(min(PROBED, source.length)))

    def pixels(image: Image.Image, channels: int) -> np.ndarray:
        if channels == 1 and not is_grey(image):
            raise CorruptImage("it is in colour, but the first images are grey")
        return to_pixels(image, None, channels)

    def read(start: int, stop: int, colour: bool) -> list[np.ndarray]:
        channels = 1 if not colour and grey() else 3
        return [_opened(source, i, partial(pixels, channels=channels)) for i in range(start, stop)]

    return read


def _opened(source: ImageSource, i: int, use: Callable[[Image.Image], Any]) -> Any:
    """use(image i), of the decoded image. Raises DataError naming an image that cannot be read."""
    try:
        with open_image(source.read(i), most=MOST_PIXELS) as image:
            return use(image)
    except CorruptImage as error:
        raise DataError(f"{source.names(i)} cannot be scored: {error}") from error


def _coloured(images: np.ndarray, colour: bool) -> np.ndarray:
    return np.repeat(images, 3, axis=1) if colour and images.shape[1] == 1 else images
