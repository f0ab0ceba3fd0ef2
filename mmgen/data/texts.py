"""The captions of a data set as conditions: each different one is encoded once; features of a frozen encoder are kept in the cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..encoders.text import count_cut, encode, null_of, open_encoder
from ..errors import ConfigError, DataError, MmgenError, shortened
from ..networks.conditions import Text, concatenate
from ..networks.text import BYTES, TextSettings
from ..system.files import read_json, replacing_folder
from ..system.lock import one_at_a_time
from ..system.tensor_files import save_array
from .cache import cache_root
from .encoded_captions import CaptionsOnTheFly, Choices, EncodedCaptions, Ragged

if TYPE_CHECKING:
    import pyarrow as pa

_FORMAT = 2  # of the cache's entries


def encode_captions(
    captions: pa.ListArray, settings: TextSettings, device: str | torch.device = "cpu",
    tell: Callable[[int, int], None] = lambda done, of: None, cache_dir: Path | None = None,
) -> EncodedCaptions:  # fmt: skip
    """Encodes every different caption. Features come from `<cache>/text/<key>/` where they are there, else are put there.

    settings: `described`. tell: called with the number of texts encoded and of all. Raises MmgenError where nothing can be kept.
    """
    import pyarrow.compute as pc

    coded = pc.dictionary_encode(captions.flatten())
    texts, choices = coded.dictionary.to_pylist(), Choices.of(captions, coded.indices.to_numpy(zero_copy_only=False).astype(np.int64))
    if settings.encoder == BYTES:
        text = encode(settings, texts)
        return EncodedCaptions(text.tokens.numpy().astype(np.int16), text.mask.numpy(), None, choices, text.empty, count_cut(settings, texts))
    root = cache_root(cache_dir) / "text"
    content = {"text": {**asdict(settings), "encoder": ""}, "captions": hashlib.sha256(json.dumps(texts).encode()).hexdigest()}
    folder = root / hashlib.sha256(json.dumps([_FORMAT, content], sort_keys=True).encode()).hexdigest()
    found = _open(folder, choices)
    if found is None:
        with one_at_a_time(root / f"{folder.name}.lock"):
            found = _open(folder, choices)
            if found is None:
                text = encode(settings, texts, device, tell=lambda done: tell(done, len(texts)))
                _keep(folder, text, count_cut(settings, texts))
                found = _open(folder, choices)
    if found is None:
        raise DataError(f"the cache entry {folder} cannot be read back: is the disk failing?")
    return found


def encoded_on_the_fly(
    captions: pa.ListArray, settings: TextSettings, device: str | torch.device = "cpu"
) -> CaptionsOnTheFly:
    """Captions that the encoder turns into conditions on the device, at each step anew."""
    import pyarrow.compute as pc

    texts, encoder = captions.flatten(), open_encoder(settings)

    def encode_now(some: list[str]) -> Text:
        return Text(*encoder(some, str(device)))

    choices = Choices.of(captions, np.arange(len(texts)))
    return CaptionsOnTheFly(texts, choices, null_of(settings, "", device), encode_now, count_cut(settings, pc.unique(texts).to_pylist()))


def features(text: Text) -> dict[str, np.ndarray]:
    """What is kept of features, by name: those of tokens under the mask, float16 [T, D], the mask bool [M, L], and pooled float16 [M, P]
    where there are such vectors. Raises DataError where float16 cannot hold them."""
    tokens, mask = text.tokens.numpy(), text.mask.numpy()
    with np.errstate(over="ignore"):  # which is said below
        kept = {"tokens": tokens[mask].astype(np.float16), "mask": mask}
        if text.pooled is not None:
            kept["pooled"] = text.pooled.numpy().astype(np.float16)
    for name, array in kept.items():
        if not np.isfinite(array).all():
            raise DataError(f"the text encoder gives {name} that float16 cannot hold, or that are not finite: are its files damaged?")
    return kept


def _keep(folder: Path, text: Text, cut: int) -> None:
    """The last text is the null."""
    try:
        with replacing_folder(folder, keep=lambda: (folder / "meta.json").is_file()) as temporary:
            for name, array in features(concatenate([replace(text, empty=None), text.empty])).items():
                save_array(temporary / f"{name}.npy", array)
            (temporary / "meta.json").write_text(json.dumps({"cut": cut, "texts": len(text) + 1}) + "\n")
    except MmgenError as error:
        raise DataError(f"{error}; or set MMGEN_CACHE to a folder that can be written and has room") from error


def _open(folder: Path, choices: Choices) -> EncodedCaptions | None:
    """A cache entry; None where it is not there, or not whole."""
    try:
        meta = read_json(folder / "meta.json")
        names = [name for name in ("tokens", "mask", "pooled") if (folder / f"{name}.npy").is_file()]
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in names}
        tokens, mask, pooled = Ragged([arrays["tokens"]], arrays["mask"]), arrays["mask"], arrays.get("pooled")
        if any(len(array) != meta["texts"] for array in (mask, pooled) if array is not None):
            return None
        found = EncodedCaptions(tokens, mask, pooled, choices, None, int(meta["cut"]))
        return replace(found, empty=found.texts(np.array([meta["texts"] - 1])))
    except (OSError, ValueError, KeyError, TypeError, EOFError, IndexError):
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
