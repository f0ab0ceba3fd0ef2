"""A source is decoded once, into `<cache>/data/<key>/{images.npy,labels.npy,captions.arrow,meta.json}`, and mapped ever after."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import ConfigError, DataError, MmgenError, nearest
from ..system.files import TEMPORARY, at_home, read_json, replacing_folder
from ..system.lock import one_at_a_time
from ..system.tensor_files import save_array
from .captions import read_texts, write_texts
from .dataset import Dataset
from .decoding import Plan, decode_all, settle
from .image_source import ImageSource

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT = 2  # raise it when the pixels that come out of the same source change
CORRUPT_POLICIES = ("stop", "skip")
_HEADER = 128  # bytes of images.npy before the pixels
_STALE = 24 * 3600  # seconds without a write after which an unfinished folder belongs to a process that was killed

Progress = Callable[[int, int], None]


def check_options(resolution: int | None, channels: int | None, on_corrupt: str) -> None:
    """Raises ConfigError where an option is impossible."""
    if resolution is not None and not 1 <= resolution <= 4096:
        raise ConfigError(f"resolution {resolution} is impossible: 1 to 4096")
    if channels not in (None, 1, 3):
        raise ConfigError(f"channels {channels} is impossible: 1 (grey) or 3 (colour)")
    if on_corrupt not in CORRUPT_POLICIES:
        raise ConfigError(f"on_corrupt {on_corrupt!r} is unknown: {nearest(on_corrupt, CORRUPT_POLICIES)}")


def prepare(
    source: ImageSource,
    resolution: int | None,
    channels: int | None,
    *,
    cache_dir: str | os.PathLike | None = None,
    on_corrupt: str = "stop",
    captions: pa.ListArray | None = None,
    progress: Progress | None = None,
    name: str = "",
) -> Dataset:
    """Decodes a source into the cache, unless it is there already and whole, and maps it.

    Several processes may ask for the same entry at once: one decodes, the others wait for it. Raises DataError where an
    image cannot be read (it says which) or does not fit, or the cache cannot be written.
    """
    check_options(resolution, channels, on_corrupt)
    root = cache_root(cache_dir) / "data"
    folder = root / _key(source, resolution, channels, on_corrupt, captions)
    dataset = _open(folder)
    if dataset is None:
        with one_at_a_time(root / f"{folder.name}.lock"):
            dataset = _open(folder)  # another process may have made it in the meantime
            if dataset is None:
                _remove_stale(root)
                _build(folder, source, settle(source, resolution, channels, on_corrupt), captions, progress)
                dataset = _open(folder)
    if dataset is None:
        raise DataError(f"the cache entry {folder} cannot be read back: is the disk failing?")
    return replace(dataset, name=name)


def decode_in_memory(
    source: ImageSource,
    resolution: int | None,
    channels: int | None,
    *,
    on_corrupt: str = "stop",
    captions: pa.ListArray | None = None,
    progress: Progress | None = None,
    name: str = "",
) -> Dataset:
    """Like `prepare`, for a source so small that a cache would only be litter."""
    check_options(resolution, channels, on_corrupt)
    plan = settle(source, resolution, channels, on_corrupt)
    chunks, skipped, kept = [], [], []
    for chunk in decode_all(source, plan, progress):
        chunks.append(chunk.pixels)
        kept += chunk.kept
        skipped += chunk.skipped
    images = np.concatenate(chunks)
    labels = None if source.labels is None else source.labels[kept]
    captions = None if captions is None else captions.take(kept)
    digest = _digest(plan)
    digest.update(images)
    description, identity = _describe(source, plan, skipped), _fingerprint(digest, labels, captions)
    return Dataset(name, images, labels, source.class_names, description, identity, captions)


def cache_root(cache_dir: str | os.PathLike | None = None) -> Path:
    """The folder given, else $MMGEN_CACHE, else ~/.cache/mmgen."""
    return at_home(cache_dir or os.environ.get("MMGEN_CACHE") or "~/.cache/mmgen")


def _key(
    source: ImageSource, resolution: int | None, channels: int | None, on_corrupt: str, captions: pa.ListArray | None
) -> str:
    parts = [FORMAT, source.fingerprint, resolution, channels, on_corrupt, captions is not None]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _open(folder: Path) -> Dataset | None:
    """The data set of a cache entry; None where there is none, or it is damaged: sizes must agree with meta.json."""
    try:
        meta = read_json(folder / "meta.json", 1 << 30)
        images = np.load(folder / "images.npy", mmap_mode="r", allow_pickle=False)
        labels = np.load(folder / "labels.npy", allow_pickle=False) if meta["labelled"] else None
        if images.dtype != np.uint8 or list(images.shape) != meta["shape"]:
            return None
        if (folder / "images.npy").stat().st_size != _HEADER + images.size:
            return None
        if labels is not None and (labels.dtype != np.int64 or labels.shape != images.shape[:1]):
            return None
        captions = read_texts(folder / "captions.arrow") if meta["captioned"] else None
        if captions is not None and len(captions) != len(images):
            return None
        return Dataset("", images, labels, meta["class_names"], meta["description"], meta["fingerprint"], captions)
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None


def _build(folder: Path, source: ImageSource, plan: Plan, captions: pa.ListArray | None, progress: Progress | None) -> None:
    size = source.length * plan.channels * plan.resolution**2
    free = shutil.disk_usage(folder.parent).free
    if free < size:
        raise DataError(
            f"decoding needs {size / 1e9:,.1f} GB in {folder.parent}, where {free / 1e9:,.1f} GB are free: "
            "set MMGEN_CACHE to a folder with more room"
        )
    try:
        # Without locks another process may be first: its entry is as good, and may be in use already.
        with replacing_folder(folder, keep=lambda: _open(folder) is not None) as temporary:
            _write(temporary, source, plan, captions, progress)
    except DataError:
        raise
    except MmgenError as error:
        raise DataError(f"{error}; or set MMGEN_CACHE to a folder that can be written and has room") from error


def _write(folder: Path, source: ImageSource, plan: Plan, captions: pa.ListArray | None, progress: Progress | None) -> None:
    """Writes the images in order: on a full disk a sparse memory map dies of SIGBUS, a write raises OSError."""
    kept: list[int] = []
    skipped: list[str] = []
    digest = _digest(plan)
    with open(folder / "images.npy", "wb") as file:
        file.write(_npy_header(source.length, plan))
        for chunk in decode_all(source, plan, progress):
            file.write(chunk.pixels)
            digest.update(chunk.pixels)
            kept += chunk.kept
            skipped += chunk.skipped
        file.seek(0)
        file.write(_npy_header(len(kept), plan))  # now that it is known how many were skipped
    labels = None if source.labels is None else source.labels[kept]
    if labels is not None:
        save_array(folder / "labels.npy", labels)
    if captions is not None:
        captions = captions.take(kept)
        write_texts(folder / "captions.arrow", captions)
    meta = {
        "format": FORMAT,
        "shape": [len(kept), plan.channels, plan.resolution, plan.resolution],
        "labelled": labels is not None,
        "captioned": captions is not None,
        "class_names": source.class_names,
        "description": _describe(source, plan, skipped),
        "fingerprint": _fingerprint(digest, labels, captions),
        "source": source.fingerprint,
        "plan": asdict(plan),
        "skipped": skipped,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


def _npy_header(length: int, plan: Plan) -> bytes:
    """NumPy's format 1.0, uint8 [length, C, R, R], always 128 bytes so that it can be rewritten in place."""
    shape = (length, plan.channels, plan.resolution, plan.resolution)
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}"
    body = text.ljust(_HEADER - 11) + "\n"  # 6 bytes of magic, 2 of version, 2 of length
    return b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body.encode("ascii")


def _describe(source: ImageSource, plan: Plan, skipped: list[str]) -> str:
    text = f"{source.description}, {plan.channels}x{plan.resolution}x{plan.resolution}"
    if skipped:
        more = ", ..." if len(skipped) > 3 else ""
        text += f", {len(skipped):,} that cannot be read left out ({', '.join(skipped[:3])}{more})"
    return text


def _digest(plan: Plan) -> hashlib._Hash:
    return hashlib.sha256(f"{plan.channels}x{plan.resolution}".encode())


def _fingerprint(digest: hashlib._Hash, labels: np.ndarray | None, captions: pa.ListArray | None) -> str:
    if labels is not None:
        digest.update(labels.astype("<i8").tobytes())
    for texts in captions if captions is not None else ():
        digest.update(json.dumps(texts.as_py()).encode())
    return digest.hexdigest()


def _remove_stale(root: Path) -> None:
    """Deletes what killed processes left: unfinished folders, of gigabytes perhaps, that nobody writes to any more."""
    for folder in root.glob(TEMPORARY + "*"):
        with contextlib.suppress(OSError):  # another process deletes it at the same time
            newest = max(p.stat().st_mtime for p in (folder, *folder.iterdir()))
            if time.time() - newest > _STALE:
                shutil.rmtree(folder, ignore_errors=True)
