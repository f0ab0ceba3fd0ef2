"""From images to the features that metrics are computed of: one `Extractor` for each network and protocol.

A score is called FID if and only if its features come from the published Inception network. All others are Fréchet
distances of other features and are named after them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, MmgenError, ModelError, nearest
from ..models.precision import float32_products
from ..system.files import sha256_of
from .frechet import pixel_features
from .inception import build_inception, load_torchscript, refusing
from ..formats.network_file import EXPORTED, TORCHSCRIPT, content
from .published_file import Progress
from .reference_files import find

SMALLEST_FOR_INCEPTION = 32  # side of images; it has not seen smaller ones
LARGEST_PIXELS = 4096  # C H W up to which FD-pixels is measured where nobody asks for it: its covariance has the square of that
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FILE_SUFFIXES = (".pt", ".pt2", ".pth", ".ts", ".onnx", ".bin", ".safetensors", ".pkl")


@dataclass(frozen=True)
class Extractor:
    """Turns uint8 images into feature vectors, by one protocol.

    Attributes:
        metric: the key of scores in JSON: "fid" if and only if it is the published Inception network, else "fd-pixels",
            "fd-dinov2" or "fd-" and the file's name.
        title: the same for people: "FID", "FD-pixels", "FD-DINOv2" or "FD-" and the file's name.
        protocol: what a score depends on, in JSON's types; scores and statistics of unequal protocols cannot be compared.
        same_size: all images of a scoring must be of one size; False: `prepare` brings each to one size.
        colour: grey images become colour by repetition before they get here.
        prepare: one image uint8 [H, W, 3] to float32 [299, 299, 3] of 0 to 255, to be called in decoding threads; None:
            nothing to do.
        extract: a batch on the device, uint8 [N, C, H, W] or, prepared, float32 [N, 3, 299, 299], to features [N, D] there.
            Raises ModelError where the network cannot take the images.
        probabilities: features [N, D] to class probabilities [N, K], for the Inception Score; None: there are none.
        warnings: sentences to be shown with every score.
    """

    metric: str
    title: str
    protocol: dict[str, str]
    same_size: bool
    colour: bool
    prepare: Callable[[np.ndarray], np.ndarray] | None
    extract: Callable[[Tensor], Tensor]
    probabilities: Callable[[Tensor], Tensor] | None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Wanted:
    """What the maker of an extractor is told: see `build_extractor`."""

    mode: str
    inception: Path | None
    device: torch.device | str
    progress: Progress | None


def build_extractor(
    features: str = "inception",
    mode: str = "tf",
    *,
    inception: Path | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Extractor:
    """Finds, checks and loads the network of a protocol.

    Args:
        features: "inception", "pixels" (no network), "dinov2" or a folder or hub id of DINOv2 weights, or a file of a
            TorchScript that takes uint8 [N, 3, H, W] to floats [N, D].
        mode: of Inception only: "tf", "clean" or "torch" (see `inception`).
        inception: the file of Inception's weights; None: looked for, or downloaded (see `inception.build_inception`).
        device: where `extract` computes, always in full float32: TensorFloat-32 would move a score by more than the
            agreement between implementations of the same protocol.
        progress: called with the bytes downloaded and their total, 0 where it is not known.

    Raises ConfigError for an unknown name or mode, ModelError where a network is missing, damaged or of another kind.
    """
    wanted = Wanted(mode, inception, device, progress)
    if features in EXTRACTORS:
        extractor = EXTRACTORS[features](wanted)
    elif Path(features).is_file():
        extractor = _file(Path(features), device)
    elif Path(features).is_dir() or _is_hub_id(features):
        extractor = _dinov2(wanted, features)
    elif Path(features).suffix in _FILE_SUFFIXES or Path(features).is_absolute():
        raise ModelError(f"the file of features {features} does not exist")
    else:
        raise ConfigError(f"features {features!r} are unknown, and no file: {nearest(features, tuple(EXTRACTORS))}, or the path of a file")
    return replace(
        extractor,
        extract=_precisely(extractor.extract),
        probabilities=extractor.probabilities and _precisely(extractor.probabilities),
    )


def auto_extractor(shape: Sequence[int], **options: Any) -> tuple[Extractor, str | None]:
    """What images (C, H, W) are scored by where nobody says, while training and afterwards, and a note where it is not the usual.

    Inception's features, or the pixels of images smaller than it has seen; also of images a little larger where Inception cannot be
    had. options: of `build_extractor`. Raises ModelError where Inception cannot be had and the images are too large.
    """
    small = math.prod(shape) <= LARGEST_PIXELS
    if small and max(shape[1:]) < SMALLEST_FOR_INCEPTION:
        return build_extractor("pixels"), None
    try:
        return build_extractor("inception", **options), None
    except MmgenError as error:  # no network, or a cache that cannot be written
        if not small:
            raise
        return build_extractor("pixels"), f"no FID, FD-pixels is measured instead: {error}"


def _inception(wanted: Wanted) -> Extractor:
    network = build_inception(wanted.mode, wanted.device, file=wanted.inception, progress=wanted.progress)
    path, digest = network.weights.path, network.weights.sha256
    protocol = {"features": "inception", "mode": wanted.mode, "network": path.name, "sha256": digest}
    metric, title, warnings = "fid", "FID", ()
    if not network.weights.published:
        metric, title = f"fd-{path.stem}", f"FD-{path.stem}"
        warnings = (f"{path} is not the published Inception network: the score is not FID and is called {title}",)
    prepared = network.prepare is not None
    return Extractor(
        metric, title, protocol, not prepared, True, network.prepare, network.extract, network.probabilities, warnings
    )


def _pixels(wanted: Wanted) -> Extractor:
    return Extractor("fd-pixels", "FD-pixels", {"features": "pixels"}, True, False, None, pixel_features, None)


def _dinov2(wanted: Wanted, path: str = "dinov2") -> Extractor:
    from .pretrained import build_dinov2

    network = build_dinov2(path, wanted.device)
    protocol = {"features": "dinov2", "network": network.name, "sha256": network.sha256}
    name = "DINOv2" if network.is_large else network.name
    metric = "fd-dinov2" if network.is_large else f"fd-{name}"
    return Extractor(metric, f"FD-{name}", protocol, True, True, None, network.extract, None)


# By the name of --features. A further extractor is a function in a file and a line here
EXTRACTORS: dict[str, Callable[[Wanted], Extractor]] = {"inception": _inception, "pixels": _pixels, "dinov2": _dinov2}


def features_in(path: Path) -> str:
    """The --features that a statistics file is for: what mmgen's own say, else Inception's."""
    found = find(path, "inception", False)
    return found.says["features"] if found.own and found.says.get("features") in EXTRACTORS else "inception"


def _file(path: Path, device: torch.device | str) -> Extractor:
    kind = content(path)
    if kind != TORCHSCRIPT:
        do = "; torch.jit.trace makes one of the same network" if kind == EXPORTED else ""
        raise ModelError(f"{path} is {kind}: features come from {TORCHSCRIPT}{do}")
    network = load_torchscript(path, device)

    @torch.no_grad()
    def extract(images: Tensor) -> Tensor:
        with refusing(path, images):
            return _checked(network(images), len(images), path)

    protocol = {"features": path.stem, "network": path.name, "sha256": sha256_of(path)}
    return Extractor(f"fd-{path.stem}", f"FD-{path.stem}", protocol, True, True, None, extract, None)


def _checked(features: object, count: int, path: Path) -> Tensor:
    """Features [N, D], also from [N, D, 1, 1], in float32 or float64; ModelError where they are something else."""
    if not isinstance(features, Tensor):
        raise ModelError(f"{path} returns a {type(features).__name__}: features are one tensor of floats [N, D]")
    if features.ndim > 2 and features.shape[2:].numel() == 1:
        features = features.flatten(1)
    if features.ndim != 2 or len(features) != count or not features.is_floating_point():
        shape = f"{features.dtype} {list(features.shape)}".removeprefix("torch.")
        raise ModelError(f"{path} returns {shape} for {count} images: features are floats [{count}, D]")
    return features if features.dtype in (torch.float32, torch.float64) else features.float()


def _is_hub_id(name: str) -> bool:
    return bool(_HUB_ID.fullmatch(name)) and not name.startswith(".") and Path(name).suffix not in _FILE_SUFFIXES


def _precisely(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def precise(batch: Tensor) -> Tensor:
        with float32_products("fp32"):  # a training in the same process may have allowed less
            return function(batch)

    return precise
