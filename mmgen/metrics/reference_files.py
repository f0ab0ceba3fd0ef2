"""The layouts of reference statistics that are in circulation, and mmgen's own: what lies in a file, not yet judged.

file                                        holds                              made by the protocol
EDM's fid-refs/*.npz                        mu, sigma                          tf, known by its name only
ADM's VIRTUAL_*.npz                         mu, sigma, mu_s, sigma_s, arr_0    tf
MAR's and JiT's adm_in256_stats.npz         mu, sigma                          tf, known by its name only
clean-fid's NAME_MODE_SPLIT_SIZE.npz        mu, sigma                          in the name only
clean-fid's NAME_MODE_SPLIT_SIZE_kid.npz    feats [N, D]                       in the name only
pytorch-fid --save-stats                    mu, sigma                          torch, which nothing in it says
MeanFlow's, iMF's, pMF's                    ref_mu, ref_sigma                  a JAX Inception
denoising-diffusion-pytorch's               m2, s2                             torch
EDM2's and TVM's *.pkl                      fid, fd_dinov2, num_images         tf; opened without executing anything
mmgen's .safetensors and .npz               mu, sigma and a statement          stated inside
"""

from __future__ import annotations

import math
import os
import pickletools
import re
import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..formats.safe_arrays import load_arrays, mistaken_download
from ..errors import DataError, shortened
from ..system.files import parse_json
from .frechet import GaussianStatistics, StatisticsError

TAKES = (
    "--ref takes a data set (whatever --data takes), a folder, zip or npz (arr_0) of images, or a file of statistics: an "
    ".npz with mu and sigma (EDM, ADM, MAR, JiT, clean-fid, pytorch-fid), feats (clean-fid's _kid.npz), ref_mu and ref_sigma "
    "(MeanFlow), or m2 and s2 (denoising-diffusion-pytorch), EDM2's .pkl, or what mmgen fid --save-stats writes"
)
STATEMENT = "mmgen_statistics"  # the entry of our own files that says what they are, JSON
FORMAT = 1

_OF_CLEAN_FID = {"legacy_tensorflow": "tf", "clean": "clean", "legacy_pytorch": "torch"}
_CLEAN_FID_NAME = re.compile(r"_(clean|legacy_tensorflow|legacy_pytorch)(_clip_vit_b_32)?_[^_]+_(?:\d+|na)(?:_kid)?$")
_KNOWN_NAMES = {
    "EDM": re.compile(r"(cifar10-32x32|imagenet-64x64(-baseline)?|ffhq-64x64|afhqv2-64x64)\.npz"),
    "ADM": re.compile(r"virtual_.+\.npz"),
    "MAR / JiT": re.compile(r"adm_in\d+_stats\.npz"),
}
_PICKLE_KEYS = {"fid", "fd_dinov2", "num_images"}
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, KeyError, RuntimeError, OSError, MemoryError)


@dataclass(frozen=True)
class Found:
    """What lies in a file, before it is judged."""

    mean: Any
    covariance: Any
    source: str
    says: dict[str, str]
    sign: str = ""  # by which `says` is known
    own: bool = False
    num: int | None = None
    features: Tensor | None = None
    has_images: bool = False
    fingerprint: str | None = None
    warnings: tuple[str, ...] = ()


def is_statistics(path: str | os.PathLike) -> bool:
    """Whether a file holds reference statistics, rather than images, a model or anything else: by its content, and cheaply."""
    path = Path(path)
    kind = _kind(path) if path.is_file() else None
    if kind == "npz":
        return _layout(_npz_keys(path)) is not None
    if kind == "safetensors":
        return f'"{STATEMENT}"'.encode() in _head(path)  # the metadata stand first
    return kind == "pickle" and _first_text(path) in _PICKLE_KEYS


def find(path: Path, features: str, keep_features: bool) -> Found:
    """What lies in a file; `features` picks one of EDM2's kinds. Raises DataError where it is damaged, or no statistics."""
    if not path.is_file():
        raise DataError(f"there is no file {path}: {TAKES}")
    kind = _kind(path)
    if kind is None:
        mistake = mistaken_download(_head(path))
        raise DataError(f"{path} {mistake}" if mistake else f"{path} holds no statistics that mmgen knows: {TAKES}")
    if kind == "npz":
        return _find_npz(path, keep_features)
    return _find_safetensors(path) if kind == "safetensors" else _find_pickle(path, features)


def _find_npz(path: Path, keep_features: bool) -> Found:
    keys = _npz_keys(path)
    layout = _layout(keys)
    if layout is None:
        if not zipfile.is_zipfile(path):
            raise _damaged(path, "its end is missing")
        held = ", ".join(sorted(keys)[:6]) or "no arrays"
        images = " are images, not statistics" if "arr_0" in keys else " are no statistics that mmgen knows"
        raise DataError(f"{path} holds {held}, which{images}: {TAKES}")
    if layout == STATEMENT:
        mean, covariance, text = _npz_arrays(path, "mu", "sigma", STATEMENT)
        return _stated(path, str(text), mean, covariance)
    named = _by_name(path)
    if layout == "feats":
        tensor = _read_features(path)
        statistics = GaussianStatistics()
        try:
            statistics.update(tensor)
            found = replace(named, mean=statistics.mean, covariance=statistics.covariance, num=statistics.count)
        except StatisticsError as error:
            raise DataError(f"the features in {path} give no statistics: {error}") from error
        return replace(found, features=tensor if keep_features else None)
    keys_of = {"mu": ("mu", "sigma"), "ref_mu": ("ref_mu", "ref_sigma"), "m2": ("m2", "s2")}[layout]
    mean, covariance = _npz_arrays(path, *keys_of)
    sign = f"it holds {keys_of[0]} and {keys_of[1]}"
    if layout == "ref_mu":
        says = {"features": "inception", "mode": "jax"}
        return Found(mean, covariance, "MeanFlow statistics (ref_mu, ref_sigma), JAX", says, sign)
    if layout == "m2":
        says = {"features": "inception", "mode": "torch"}
        return Found(mean, covariance, "denoising-diffusion-pytorch statistics (m2, s2)", says, sign)
    if keys & {"mu_s", "arr_0"} and not named.says:
        says, sign = {"features": "inception", "mode": "tf"}, f"it holds {'mu_s' if 'mu_s' in keys else 'arr_0'}, as ADM's do"
        named = replace(named, source="ADM statistics (mu, sigma)", says=says, sign=sign)
    found = replace(named, mean=mean, covariance=covariance, has_images="arr_0" in keys)
    neighbour = path.with_name(f"{path.stem}_kid.npz")
    return _with_neighbour(found, neighbour) if keep_features and neighbour.is_file() else found


def _by_name(path: Path) -> Found:
    """What the name alone says of an .npz."""
    if match := _CLEAN_FID_NAME.search(path.stem.lower()):
        mode, clip = match.groups()
        says = {"features": "clip"} if clip else {"features": "inception", "mode": _OF_CLEAN_FID[mode]}
        return Found(None, None, f"clean-fid statistics, {'CLIP' if clip else mode}", says, "by its name")
    for tool, pattern in _KNOWN_NAMES.items():
        if pattern.fullmatch(path.name.lower()):
            says = {"features": "inception", "mode": "tf"}
            return Found(None, None, f"{tool} statistics (mu, sigma), by its name", says, "by its name")
    return Found(None, None, "statistics of a tool that they do not name", {})


def _with_neighbour(found: Found, neighbour: Path) -> Found:
    """Adds the single features that clean-fid keeps in a second file, if they are of the same images."""
    features = _read_features(neighbour)
    mean = sum(block.sum(0, dtype=torch.float64) for block in features.split(4096)) / len(features)
    expected = np.asarray(found.mean)
    if mean.shape != expected.shape or not np.allclose(mean, expected, rtol=0, atol=1e-3 * np.abs(expected).max()):
        return replace(found, warnings=(f"{neighbour.name} is of other images than the file beside it: not used",))
    return replace(found, features=features, num=len(features))


def _read_features(path: Path) -> Tensor:
    (features,) = _npz_arrays(path, "feats")
    if features.ndim != 2 or not features.size or features.dtype.kind != "f":
        raise DataError(f"feats of {path} is {features.dtype} {list(features.shape)}: features must be floats [N, D]")
    return torch.from_numpy(features.astype(np.float32, copy=False))


def _find_safetensors(path: Path) -> Found:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            text = (file.metadata() or {}).get(STATEMENT)
            mean, covariance = (file.get_tensor(k) if text and k in file.keys() else None for k in ("mu", "sigma"))
    except (OSError, SafetensorError, MemoryError) as error:
        raise _damaged(path, error) from error
    if text is None:
        raise DataError(f"{path} is a .safetensors file without statistics, perhaps a model: {TAKES}")
    return _stated(path, text, mean, covariance)


def _stated(path: Path, text: str, mean: Any, covariance: Any) -> Found:
    """Statistics with mmgen's statement."""
    try:
        statement = parse_json(text)
        if statement["format"] != FORMAT:
            raise DataError(
                f"{path} has format {statement['format']} of statistics, and this mmgen reads {FORMAT}: install a newer mmgen"
            )
        says = {str(key): str(value) for key, value in statement["protocol"].items() if value is not None}
        num, source, fingerprint = int(statement["num"]), str(statement["source"]), statement["fingerprint"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"what {path} states about itself is damaged ({error!r}): make it again with --save-stats") from error
    if mean is None or covariance is None:
        raise DataError(f"{path} lacks mu or sigma: make it again with --save-stats")
    return Found(mean, covariance, f"mmgen statistics of {source}", says, own=True, num=num, fingerprint=fingerprint)


def _find_pickle(path: Path, features: str) -> Found:
    content = load_arrays(path)
    held = sorted(k for k in content if isinstance(k, str)) if isinstance(content, dict) else []
    key = "fid" if features == "inception" else "fd_dinov2" if "dinov2" in features.lower() else None
    if not _PICKLE_KEYS & set(held):
        raise DataError(f"{path} is a pickle, but not of EDM2's statistics: {TAKES}")
    if key not in held:
        raise DataError(f"{path} holds {', '.join(held)}, and no statistics for {features}: give another --ref")
    part, num = content[key], content.get("num_images")
    if not isinstance(part, dict) or not all(isinstance(part.get(k), np.ndarray) for k in ("mu", "sigma")):
        raise DataError(f"{key} of {path} is not a dict of the arrays mu and sigma: fetch or make it again")
    says = {"features": "inception", "mode": "tf"} if key == "fid" else {"features": "dinov2"}
    num = int(num) if isinstance(num, (int, np.integer)) else None
    return Found(part["mu"], part["sigma"], f"EDM2 pickle, {key}", says, f"it holds {key}, as EDM2's do", num=num)


def _head(path: Path, size: int = 4096) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(size)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _kind(path: Path) -> str | None:
    head = _head(path, 16)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "npz"
    if head[8:9] == b"{" and head[5:8] == b"\x00\x00\x00":
        return "safetensors"
    return "pickle" if head.startswith((b"\x80", b"(d", b"}")) else None


def _layout(keys: set[str]) -> str | None:
    """The entry by which a layout of .npz is known."""
    pairs = {STATEMENT: {"mu", "sigma"}, "mu": {"sigma"}, "ref_mu": {"ref_sigma"}, "m2": {"s2"}, "feats": set()}
    return next((key for key, others in pairs.items() if keys >= {key, *others}), None)


def _npz_keys(path: Path) -> set[str]:
    """The names of the arrays; of a file that is cut short, the first alone, and its pair."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")}
    except _ZIP_ERRORS:
        head = _head(path)
        first = head[30 : 30 + int.from_bytes(head[26:28], "little")].decode("latin-1").removesuffix(".npy")
        return next(({*pair} for pair in (("mu", "sigma"), ("ref_mu", "ref_sigma"), ("m2", "s2")) if first in pair), {first})


def _npz_arrays(path: Path, *names: str) -> list[np.ndarray]:
    """Arrays of numbers or text. The size that each states is compared with its member's before memory is taken for it."""
    arrays = []
    try:
        with zipfile.ZipFile(path) as archive:
            for name in names:
                with archive.open(f"{name}.npy") as file:
                    version = np.lib.format.read_magic(file)
                    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                    shape, _, dtype = read(file)
                    stated, there = math.prod(shape) * dtype.itemsize, archive.getinfo(f"{name}.npy").file_size - file.tell()
                if dtype.kind not in "fiubcU":
                    raise DataError(f"{name} of {path} is {dtype}, not numbers: it is not opened")
                if stated != there or min(shape, default=0) < 0:
                    raise ValueError(f"{name} states {stated} bytes and has {there}")
                with archive.open(f"{name}.npy") as file:
                    arrays.append(np.lib.format.read_array(file, allow_pickle=False))
    except _ZIP_ERRORS as error:
        raise _damaged(path, error) from error
    return arrays


def _first_text(path: Path) -> str | None:
    """The first text in a pickle: the first key of a dict. Nothing is executed."""
    try:
        for instruction, argument, _ in pickletools.genops(_head(path)):
            if isinstance(argument, str):
                return None if instruction.name in ("GLOBAL", "INST") else argument
    except ValueError:  # the head ends, or it is no pickle
        pass
    return None


def _damaged(path: Path, error: Exception | str) -> DataError:
    return DataError(
        f"{path} is cut short or damaged ({shortened(error, 200) if isinstance(error, Exception) else error}): make or fetch it again"
    )
