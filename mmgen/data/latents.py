"""A data set of latents: what `mmgen cache-latents` wrote, mapped into memory.

latents.json             what these are: the VAE, its normalisation, the images they came from; written last
shards/000000.npy ...    moments [n, 2C, h, w], the mean above the standard deviation (of a tiny VAE the mean alone)
labels.npy               int64 [N], where the images have labels
texts/                   where the images have captions that are kept: see `latent_texts`
latents-unfinished.json  what was asked for, until all is encoded
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ConfigError, DataError
from ..system.files import read_json
from ..models.latents import LatentSettings
from ..system.schema import from_dict
from .dataset import Labelled

if TYPE_CHECKING:
    import pyarrow as pa

    from .encoded_captions import CaptionsOnTheFly, EncodedCaptions
    from .latent_texts import LatentTexts

FORMAT = 1
RECORD, JOB, LABELS, SHARDS = "latents.json", "latents-unfinished.json", "labels.npy", "shards"


class Rows:
    """Arrays [n_i, ...] one after the other, indexed as one. Memory-mapped arrays are read where they are asked for."""

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self.arrays = arrays
        self.starts = np.cumsum([0, *(len(array) for array in arrays)])
        self.shape = (int(self.starts[-1]), *arrays[0].shape[1:])
        self.dtype = arrays[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Rows int64 [M], in any order, copied: [M, ...]."""
        found = np.empty((len(rows), *self.shape[1:]), self.dtype)
        which = np.searchsorted(self.starts, rows, side="right") - 1
        for number in np.unique(which):
            here = which == number
            found[here] = self.arrays[number][rows[here] - self.starts[number]]
        return found


@dataclass(frozen=True)
class LatentDataset(Labelled):
    """What a `--data` that means latents becomes."""

    name: str  # what the user wrote
    moments: Rows  # float16 or float32 [N, 2C, h, w], or [N, C, h, w] of a tiny VAE
    labels: np.ndarray | None  # int64 [N], 0 <= label < num_classes
    class_names: list[str] | None
    description: str  # one line
    fingerprint: str  # SHA-256 of VAE, normalisation, moments and labels
    latents: LatentSettings
    source: str  # the name of the images
    path: str = ""  # of the folder, absolute
    images: dict[str, Any] = field(default_factory=dict)  # the images, for a scorer: name, place, content hash, reading options
    captions: pa.ListArray | None = None  # list<string> [N], at least one text each, where they were kept
    kept: LatentTexts | None = None  # the captions as the folder has them
    texts: EncodedCaptions | CaptionsOnTheFly | None = None  # the captions as a model is conditioned on them

    def __len__(self) -> int:
        return len(self.moments)

    @property
    def identity(self) -> dict[str, Any]:
        return {**super().identity, "images": self.images}

    @property
    def resolution(self) -> int:
        return self.moments.shape[-1]

    @property
    def channels(self) -> int:
        return len(self.latents.mean)


def is_latents(path: Path) -> bool:
    """Whether a folder holds latents, whole or not yet."""
    return (path / RECORD).is_file() or (path / JOB).is_file()


def source_of(path: Path) -> str:
    """The name of the images that a folder of latents came from, to be shown; the resolution is beside it."""
    try:
        record = read_json(path / (RECORD if (path / RECORD).is_file() else JOB))
        return f"{record['source']['word']} at {record['resolution']} pixels"
    except (OSError, ValueError, KeyError, TypeError):
        return "images"


def shard_file(path: Path, number: int) -> Path:
    return path / SHARDS / f"{number:06d}.npy"


def read_record(path: Path) -> dict[str, Any]:
    """latents.json. Raises DataError where it is not there yet, damaged, or of a later version."""
    file = path / RECORD
    if not file.is_file():
        raise DataError(f"{path} is not whole yet: the same `mmgen cache-latents` command that began it continues it")
    try:
        record = read_json(file)
        if record["format"] != FORMAT:
            raise DataError(f"{file} has format {record['format']}, this version of mmgen reads {FORMAT}: install a newer mmgen")
        return record
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is damaged: {error!r}") from error


def load_latents(path: Path, name: str = "") -> LatentDataset:
    """Maps a folder of latents. Raises DataError naming a file that is missing, damaged, or does not fit latents.json."""
    record = read_record(path)
    try:
        latents = from_dict(LatentSettings, record["latents"])
        shape = (record["channels"] * (2 if latents.kind == "kl" else 1), record["size"], record["size"])
        arrays = [_map(shard_file(path, i), (n, *shape), record["dtype"]) for i, n in enumerate(record["shards"])]
        labels = _map(path / LABELS, (record["number"],), "int64") if record["labelled"] else None
        kept = None
        if "text" in record:
            from .latent_texts import load_texts

            kept = load_texts(path, record, 2 if record["xflip"] else 1)
        if sum(record["shards"]) != record["number"] or not record["number"]:
            raise ValueError("its numbers contradict each other")
        return LatentDataset(
            name=name or str(path),
            moments=Rows(arrays),
            labels=None if labels is None else np.array(labels),
            class_names=record["class_names"],
            description=record["description"],
            fingerprint=record["fingerprint"],
            latents=latents,
            source=record["source"]["word"],
            path=str(path.absolute()),
            images=_images(record),
            captions=None if kept is None else kept.captions,
            kept=kept,
        )
    except (KeyError, TypeError, ValueError, IndexError, ConfigError) as error:
        raise DataError(f"{path / RECORD} is damaged: {error!r}") from error


def _images(record: dict[str, Any]) -> dict[str, Any]:
    """The images as latents.json describes them: name, path, content, and the options of `data.load` that read them."""
    source = record["source"]
    options = {"resolution": record["resolution"], "channels": 3, "on_corrupt": record["job"]["on_corrupt"]}
    options |= {"with_captions": True} if "text" in record else {}
    return {
        "word": source["word"],
        "place": source.get("place", ""),
        "content": record.get("content", ""),  # not of version 0.1
        "options": {**source.get("reading", {}), **options},
    }


def _map(file: Path, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """One array, mapped. Raises DataError."""
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise DataError(f"{file} is missing: copy it from where the others are, or encode again into another folder") from error
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{file} is damaged ({error}): copy it again, or encode again into another folder") from error
    if array.shape != shape or array.dtype != dtype:
        raise DataError(f"{file} holds {array.dtype} {list(array.shape)}, but latents.json says {dtype} {list(shape)}")
    return array
