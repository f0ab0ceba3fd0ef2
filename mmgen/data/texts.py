"""The captions of a data set as conditions: each different one is encoded once; features of a frozen encoder are kept in the cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..encoders.text import encode
from ..errors import ConfigError, DataError, MmgenError, shortened
from ..networks.conditions import Text
from ..networks.text import BYTES, TextSettings
from ..system.files import read_json, replacing_folder
from ..system.lock import one_at_a_time
from ..system.tensor_files import save_array
from .cache import cache_root
from .encoded_captions import EncodedCaptions

if TYPE_CHECKING:
    import pyarrow as pa

_NAMES = ("tokens", "mask", "pooled")


def encode_captions(
    captions: pa.ListArray, settings: TextSettings, device: str | torch.device = "cpu",
    tell: Callable[[int, int], None] = lambda done, of: None, cache_dir: Path | None = None,
) -> EncodedCaptions:  # fmt: skip
    """Encodes every different caption. Features come from `<cache>/text/<key>/` where they are there, else are put there.

    settings: `described`. tell: called with the number of texts encoded and of all. Raises MmgenError where nothing can be kept.
    """
    import pyarrow.compute as pc

    flat = captions.flatten()
    coded = pc.dictionary_encode(flat)
    texts, number = [*coded.dictionary.to_pylist(), ""], coded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    first = np.concatenate([[0], np.cumsum(pc.list_value_length(captions).to_numpy(zero_copy_only=False))]).astype(np.int64)
    if settings.encoder == BYTES:
        text, cut = encode(settings, texts)
        return EncodedCaptions(text.tokens.numpy().astype(np.int16), text.mask.numpy(), None, first, number, cut)
    root = cache_root(cache_dir) / "text"
    content = {"text": {**asdict(settings), "encoder": ""}, "captions": hashlib.sha256(json.dumps(texts).encode()).hexdigest()}
    folder = root / hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    found = _open(folder)
    if found is None:
        with one_at_a_time(root / f"{folder.name}.lock"):
            found = _open(folder)
            if found is None:
                text, cut = encode(settings, texts, device, tell=lambda done: tell(done, len(texts)))
                _keep(folder, text, cut)
                found = _open(folder)
    if found is None:
        raise DataError(f"the cache entry {folder} cannot be read back: is the disk failing?")
    arrays, cut = found
    return EncodedCaptions(*arrays, first, number, cut)


def _keep(folder: Path, text: Text, cut: int) -> None:
    try:
        with replacing_folder(folder, keep=lambda: _open(folder) is not None) as temporary:
            for name in _NAMES:
                value = getattr(text, name).numpy()
                save_array(temporary / f"{name}.npy", value if value.dtype == bool else value.astype(np.float16))
            (temporary / "meta.json").write_text(json.dumps({"cut": cut, "texts": len(text)}) + "\n")
    except MmgenError as error:
        raise DataError(f"{error}; or set MMGEN_CACHE to a folder that can be written and has room") from error


def _open(folder: Path) -> tuple[list[np.ndarray], int] | None:
    """The arrays and how many texts were cut; None where they are not there, or not whole."""
    try:
        meta = read_json(folder / "meta.json")
        arrays = [np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _NAMES]
        return (arrays, int(meta["cut"])) if all(len(array) == meta["texts"] for array in arrays) else None
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None


def without(captions: pa.ListArray, left_out: tuple[str, ...]) -> pa.ListArray:
    """The captions but those that are exactly one of `left_out`. Raises ConfigError for one that no image has, and where an image
    has no other."""
    from .captions import captions_of

    kept = [[text for text in texts if text not in left_out] for texts in captions.to_pylist()]
    there = set(captions.flatten().to_pylist())
    if absent := [text for text in left_out if text not in there]:
        raise ConfigError(f"data.leave_out: no image has the caption {shortened(absent[0])}")
    if bare := sum(not texts for texts in kept):
        raise ConfigError(f"data.leave_out: {bare:,} images have no other caption than those left out")
    return captions_of(kept)
