"""What samples are scored against: the features of real images, collected once and kept in the cache, or a statistics file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.cache import cache_root
from ..errors import DataError, MmgenError
from ..system.files import replacing, sha256_of
from ..system.processes import ProcessGroup
from ..system.tensor_files import save_tensors
from .collect import Collected, Progress, Wanted, collect
from .features import Extractor
from .frechet import Gaussian, GaussianStatistics
from .image_sets import ImageSet, image_set
from .references import read_reference

_CHEAP = 1e9  # multiply-adds of pixel statistics below which a cache would only be litter
FORMAT = 2  # raise it when the same images give other features


@dataclass(frozen=True)
class ReferenceSet:
    """A reference ready for comparison."""

    name: str
    source: str  # in words: which file or data set this is
    num: int | None  # images behind it; None if the file does not say
    gaussian: Gaussian | GaussianStatistics
    kept: Tensor | None = None  # float32 [N, D]: features of single images, for KID, precision, recall, density, coverage
    image: tuple[int, ...] | None = None  # (C, H, W) of its first image; None for a file without images
    warnings: tuple[str, ...] = ()
    path: str | None = None  # where it lies: see `ImageSet.path`
    fingerprint: str | None = None  # of its content


def collect_reference(
    images: ImageSet,
    extractor: Extractor,
    *,
    keep: bool = False,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    process_group: ProcessGroup = ProcessGroup(),
    progress: Progress | None = None,
) -> ReferenceSet:
    """The features of reference images: from the cache, where these very images have been seen by this protocol.

    `keep`: single features are needed as well. Raises as `collect.collect`.
    """
    file = _cache_file(images, extractor)
    found = _read(file, keep) if file is not None and process_group.is_main else None
    found = process_group.gather(found)[0]
    if found is None:
        collected = collect(
            images, extractor, Wanted(keep=keep), batch_size=batch_size, device=device, process_group=process_group, progress=progress
        )
        gaussian = Gaussian(collected.statistics.mean.cpu(), collected.statistics.covariance.cpu())
        found = gaussian, collected.kept
        if file is not None and process_group.is_main:
            _write(file, gaussian, collected)
    gaussian, kept = found
    fingerprint = images.fingerprint() if images.fingerprint is not None else None
    return ReferenceSet(
        images.name, images.description, images.length, gaussian, kept if keep else None, images.shape(extractor.colour),
        path=images.path, fingerprint=fingerprint,
    )  # fmt: skip


def file_reference(
    path: Path,
    extractor: Extractor,
    *,
    keep: bool = False,
    ref_mode: str | None = None,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    process_group: ProcessGroup = ProcessGroup(),
    progress: Progress | None = None,
) -> ReferenceSet:
    """The statistics in a file. `keep`: single features too, which ADM's files give through the images in them.

    Raises DataError where it cannot be read or is for other features, ConfigError where it is of another protocol.
    """
    protocol = extractor.protocol
    found = read_reference(
        path,
        features=protocol["features"],
        mode=protocol.get("mode", "tf"),
        dim=2048 if protocol["features"] == "inception" else None,
        ref_mode=ref_mode,
        extractor_protocol=protocol,
        keep_features=keep,
    )
    kept, image = found.features, None
    if found.has_images:
        image, own = _images_inside(
            path, extractor, keep and kept is None, batch_size=batch_size, device=device, process_group=process_group, progress=progress
        )
        kept = own if kept is None else kept
    return ReferenceSet(
        found.name, found.source, found.num, found.gaussian, kept, image, found.warnings, str(path.absolute()), sha256_of(path)
    )


def _images_inside(path: Path, extractor: Extractor, keep: bool, **options: Any) -> tuple[tuple[int, ...] | None, Tensor | None]:
    """(C, H, W) of the images in a file of statistics, and with `keep` their features, cached as those of any reference."""
    try:
        images = image_set(str(path))
        shape = images.shape(extractor.colour)
    except DataError:
        if keep:
            raise
        return None, None  # the statistics do not need them
    return shape, collect_reference(images, extractor, keep=True, **options).kept if keep else None


def _cache_file(images: ImageSet, extractor: Extractor) -> Path | None:
    if images.fingerprint is None:
        return None
    if extractor.metric == "fd-pixels" and images.length * math.prod(images.shape(False)) ** 2 < _CHEAP:
        return None
    parts = [FORMAT, extractor.protocol, images.fingerprint(), images.length]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return cache_root() / "features" / f"{key}.safetensors"


def _read(file: Path, keep: bool) -> tuple[Gaussian, Tensor | None] | None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Any] = load_file(file)
        if keep and "features" not in tensors:
            return None
        return Gaussian(tensors["mu"], tensors["sigma"]), tensors.get("features")
    except (OSError, SafetensorError, KeyError):  # not there, or damaged: collected anew
        return None


def _write(file: Path, gaussian: Gaussian, collected: Collected) -> None:
    tensors = {"mu": gaussian.mean.contiguous(), "sigma": gaussian.covariance.contiguous()}
    if collected.kept is not None:
        tensors["features"] = collected.kept
    # A cache that is full or cannot be written costs time, not the score
    with contextlib.suppress(MmgenError), replacing(file) as temporary:
        save_tensors(tensors, temporary)
