"""Reference statistics: files of every layout in circulation are read and judged, mmgen's own are written as well."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import __version__
from ..errors import ConfigError, DataError, nearest
from ..system.files import replacing
from ..system.tensor_files import save_tensors
from .frechet import Gaussian, GaussianStatistics
from .reference_files import FORMAT, STATEMENT, TAKES, Found, find, is_statistics

__all__ = ["TAKES", "Reference", "is_statistics", "read_reference", "write_statistics"]

_MODES = ("tf", "clean", "torch")
_USUAL_SIZES = {2048: "Inception", 1024: "DINOv2", 512: "CLIP", 768: "another layer or network"}


@dataclass(frozen=True)
class Reference:
    """Statistics that a file holds, checked: of one size, finite, with a symmetric covariance."""

    name: str  # of the file
    gaussian: Gaussian  # float64 [D] and [D, D]
    num: int | None  # images behind it, if the file says
    protocol: dict[str, str]  # what the file, or a safe sign such as its keys or name, says: features, mode ...; may be empty
    source: str  # the layout, in words
    features: Tensor | None = None  # float32 [N, D], where clean-fid has kept them
    has_images: bool = False  # it also holds images, as `arr_0`, uint8 [N, H, W, 3]
    fingerprint: str | None = None  # of the images, in mmgen's own files
    warnings: tuple[str, ...] = ()


def read_reference(
    path: str | os.PathLike,
    *,
    features: str = "inception",
    mode: str = "tf",
    dim: int | None = 2048,
    ref_mode: str | None = None,
    extractor_protocol: dict[str, str] | None = None,
    keep_features: bool = True,
) -> Reference:
    """The statistics in a file of any layout in `reference_files`, refused where another protocol made them.

    Args:
        features: what the samples are described by: "inception", or another network's name. Of EDM2's two kinds,
            "inception" takes fid, and a name with "dinov2" in it fd_dinov2.
        mode: how images are resized for Inception: "tf", "clean" or "torch".
        dim: D of these features; None takes any.
        ref_mode: the mode by which the file was made, where the user knows it. It overrides keys and names, with a
            warning, but not what mmgen's own files state.
        extractor_protocol: what mmgen's own files must agree with in features, mode and sha256; else `features` and `mode`.
        keep_features: whether clean-fid's single features are wanted (50,000 of Inception take 400 MB).

    Raises ConfigError for a `mode` or `ref_mode` that does not exist or fit, DataError where the file is damaged, of
    another size or protocol, not finite, or no file of statistics at all.
    """
    path = Path(path)
    _check_modes(path, features, mode, ref_mode)
    found = find(path, features, keep_features)
    if found.own:
        _check_statement(path, found.says, extractor_protocol or _wanted(features, mode))
        warnings = found.warnings
    else:
        warnings = found.warnings + _check_sign(path, found, features, mode, ref_mode)
    gaussian = _checked(path, found.mean, found.covariance, features, dim)
    return Reference(
        path.name, gaussian, found.num, found.says, found.source, found.features, found.has_images, found.fingerprint, warnings
    )


def write_statistics(
    path: str | os.PathLike,
    statistics: GaussianStatistics,
    protocol: dict[str, str],
    *,
    source: str,
    fingerprint: str | None,
) -> None:
    """Writes statistics for `read_reference`, atomically, as .safetensors or as .npz, whose mu and sigma other tools read.

    `protocol`: features, mode, sha256 and what else is known of the extractor. `source`: the images, in words.
    Raises ConfigError for another suffix, StatisticsError for fewer than 2 images, MmgenError where it cannot be written.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".npz"):
        raise ConfigError(f"statistics are written as .safetensors or .npz, by the end of the name: {path} has neither")
    statement = {"format": FORMAT, "mmgen_version": __version__, "num": statistics.count, "protocol": protocol}
    text = json.dumps({**statement, "source": source, "fingerprint": fingerprint})
    mean, covariance = (x.cpu().contiguous() for x in (statistics.mean, statistics.covariance))
    with replacing(path) as temporary:
        if path.suffix == ".npz":
            np.savez(temporary, mu=mean.numpy(), sigma=covariance.numpy(), **{STATEMENT: np.array(text)})
        else:
            save_tensors({"mu": mean, "sigma": covariance}, temporary, metadata={STATEMENT: text})


def _check_modes(path: Path, features: str, mode: str, ref_mode: str | None) -> None:
    for option, value in (("--mode", mode if features == "inception" else None), ("--ref-mode", ref_mode)):
        if value is not None and value not in _MODES:
            raise ConfigError(f"{option} {value!r} does not exist: {nearest(value, _MODES)}")
    if ref_mode is None:
        return
    if features != "inception":
        raise ConfigError(f"--ref-mode says how images were resized for Inception, and {features} is not Inception: leave it out")
    if ref_mode != mode:
        raise ConfigError(
            f"--ref-mode {ref_mode} says that {path} was made by mode {ref_mode}, but the samples are scored by mode {mode}, and "
            f"the two cannot be compared: add --mode {ref_mode}, or give another --ref"
        )


def _wanted(features: str, mode: str) -> dict[str, str]:
    return {"features": features, "mode": mode} if features == "inception" else {"features": features}


def _check_statement(path: Path, says: dict[str, str], wanted: dict[str, str]) -> None:
    for key in ("features", "mode", "sha256", "images"):  # images: how a protocol brings them to one size
        ours, theirs = wanted.get(key), says.get(key)
        if ours == theirs or key == "sha256" and ours is None:
            continue
        remedies = {"mode": f"add --mode {theirs}", "features": f"add --features {theirs}", "images": "give both the same --protocol"}
        do = remedies.get(key, "take the same network")
        raise DataError(
            f"{path} was made with {key} {theirs or 'not stated'}, and the samples are scored with {ours or 'none'}: {do}, or "
            "make the file again with --save-stats"
        )


def _check_sign(path: Path, found: Found, features: str, mode: str, ref_mode: str | None) -> tuple[str, ...]:
    """The warnings that keys and names give rise to. Raises DataError where they speak against the file."""
    theirs = found.says.get("features")
    if theirs == "clip" and features not in ("inception", "pixels"):
        return (f"{path.name} is of CLIP features ({found.sign}): taken as those of {features}",)
    if theirs not in (None, "dinov2", features):
        raise DataError(
            f"{path} is of {theirs} features ({found.sign}), and the samples are scored with {features}: give another"
        )
    if features != "inception":
        return () if theirs else (f"{path.name} does not say of which features it is: taken as those of {features}",)
    made = {"jax": "tf"}.get(found.says.get("mode"), found.says.get("mode"))
    if made is None and ref_mode is None:
        return (f"{path.name} does not say by which protocol it was made: taken as {mode}; --ref-mode tf|clean|torch says so",)
    if made not in (None, mode):
        if ref_mode is None:
            raise DataError(
                f"{path} is of mode {made} ({found.sign}), and the samples are scored by mode {mode}, with which it cannot be "
                f"compared: add --mode {made}, or --ref-mode {mode} if you know that it was made so"
            )
        return (f"{path.name} looks like mode {made} ({found.sign}): taken as {ref_mode}, as --ref-mode says",)
    if found.says.get("mode") == "jax":
        what = "another implementation of Inception, with the images resized outside it"
        return (f"{path.name} was made by {what} ({found.sign}): scores may differ from those of the tf protocol",)
    return ()


def _checked(path: Path, mean: Any, covariance: Any, features: str, dim: int | None) -> Gaussian:
    mean, covariance = np.asarray(mean), np.asarray(covariance)
    if mean.dtype.kind not in "fiu" or covariance.dtype.kind not in "fiu":
        raise DataError(f"the mean of {path} is {mean.dtype} and the covariance {covariance.dtype}: both must be real numbers")
    if mean.ndim != 1 or covariance.shape != 2 * mean.shape or not len(mean):
        shapes = f"{list(mean.shape)} and its covariance {list(covariance.shape)}"
        raise DataError(f"the mean of {path} has the shape {shapes}: they must be [D] and [D, D]")
    if dim is not None and len(mean) != dim:
        name = "Inception" if features == "inception" else features
        guess = _USUAL_SIZES.get(len(mean))
        raise DataError(
            f"{path} holds {len(mean)} numbers per image, {name} has {dim}"
            + (f": is it for {guess}?" if guess else ": give another")
        )
    mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise DataError(f"{path} holds numbers that are not finite: make or fetch it again")
    scale = np.abs(covariance).max()
    if np.abs(covariance - covariance.T).max() > 1e-5 * scale or np.diagonal(covariance).min() < -1e-6 * scale:
        raise DataError(f"{path} holds a covariance that is not symmetric or has a negative variance: make or fetch it again")
    return Gaussian(torch.from_numpy(mean), torch.from_numpy(covariance))
