"""The captions beside latents: written shard by shard as the images are encoded, and what a pipeline's T5 or Gemma makes of them.

texts/captions.arrow      list<string>, those of each image
texts/sizes.npy           int32 [images, 6], for SDXL: original height and width, top and left of the crop, height and width
texts/000000.tokens ...   features float16 [T, D] of the tokens under the mask, of the captions of a shard's images
texts/mask.npy            bool [captions, L]
texts/pooled.npy          float16 [captions, P], where the pipeline has such vectors
texts/null.safetensors    what the pipeline makes of no text
Until all is encoded, each shard has a file of its own for the mask, the vectors and the sizes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..encoders.pipeline_text import CLIP_ONLY, WITH_SIZES
from ..encoders.text import BATCH, count_cut, null_of, open_encoder
from ..errors import ConfigError, DataError
from ..networks.conditions import Text
from ..networks.text import TextSettings
from ..system.files import replacing
from ..system.schema import from_dict
from ..system.tensor_files import save_array, save_tensors
from .captions import read_texts, write_texts
from .decode import crop_corner
from .encoded_captions import Choices, EncodedCaptions, Ragged
from .texts import features

if TYPE_CHECKING:
    import pyarrow as pa

FOLDER = "texts"
_COUNTED_AT_ONCE = 1 << 14  # images whose captions are counted
_LOOKED_AT = 1000  # captions whose tokens are counted to say how much disk all need


@dataclass(frozen=True)
class TextTask:
    """The captions of a source, and how they are kept."""

    captions: pa.ListArray  # of all its images
    settings: TextSettings | None  # of the pipeline that they are for; None: captions alone
    out: Path
    resolution: int
    device: str = "cpu"

    @property
    def stores_features(self) -> bool:
        """Those of CLIP are cheaper to make again than to keep."""
        return self.settings is not None and self.settings.pipeline not in CLIP_ONLY

    @property
    def stores_sizes(self) -> bool:
        return self.settings is not None and self.settings.pipeline in WITH_SIZES

    def job(self) -> dict[str, Any] | None:
        """What must be the same for a folder to be continued."""
        return None if self.settings is None else {**asdict(self.settings), "encoder": ""}

    def bytes_for(self, images: Sequence[range]) -> int:
        """About how much disk these images' captions need."""
        import pyarrow as pa

        chosen = self.captions.take(pa.array(np.concatenate([np.arange(0), *(np.arange(r.start, r.stop) for r in images)])))
        size, number = chosen.nbytes, len(chosen.flatten())
        if not self.stores_features or not number:
            return size
        few = np.unique(np.linspace(0, number - 1, min(number, _LOOKED_AT)).astype(int))
        tokens = open_encoder(self.settings).count_kept(chosen.flatten().take(pa.array(few)).to_pylist())
        settings = self.settings
        return size + int(number * (tokens / len(few) * settings.width * 2 + settings.length + settings.pooled * 2))

    @contextlib.contextmanager
    def shard(self, number: int) -> Iterator[Callable[[list[int], np.ndarray], None]]:
        """Yields write(images, their original heights and widths int [n, 2]), for the images of a shard in their order."""
        sizes, pieces = [np.empty((0, 6), np.int32)], []
        encoder = open_encoder(self.settings) if self.stores_features else None
        with contextlib.ExitStack() as stack:
            if encoder is not None:
                tokens_file = stack.enter_context(open(stack.enter_context(replacing(self._piece(number, "tokens"))), "wb"))

            def write(images: list[int], original: np.ndarray) -> None:
                if self.stores_sizes:
                    sizes.append(image_sizes(original, self.resolution))
                texts = self._of(images).flatten().to_pylist() if encoder is not None else []
                for start in range(0, len(texts), BATCH):
                    found = features(Text(*(None if p is None else p.cpu() for p in encoder(texts[start : start + BATCH], self.device))))
                    tokens_file.write(found.pop("tokens").tobytes())
                    pieces.append(found)

            yield write
        for name in pieces[0] if pieces else ():
            self._save(number, name, np.concatenate([piece[name] for piece in pieces]))
        if self.stores_sizes:
            self._save(number, "sizes", np.concatenate(sizes))

    def count_cut(self, images: np.ndarray) -> int:
        """How many captions of these images are longer than the pipeline's encoders take."""
        parts = [images[start : start + _COUNTED_AT_ONCE] for start in range(0, len(images), _COUNTED_AT_ONCE)]
        return 0 if self.settings is None else sum(count_cut(self.settings, self._of(part).flatten().to_pylist()) for part in parts)

    def finish(self, shards: int, kept: np.ndarray, cut: int) -> tuple[dict[str, Any], str]:
        """Joins the shards' files; kept: numbers of the images encoded. Returns what latents.json says of the texts, and a hash of them."""
        folder, own = self.out / FOLDER, self._of(kept)
        with replacing(folder / "captions.arrow") as temporary:
            write_texts(temporary, own)
        for name in ("mask", "pooled", "sizes"):
            files = [self._piece(i, f"{name}.npy") for i in range(shards)]
            there = [np.load(file, allow_pickle=False) for file in files if file.is_file()]
            if there:
                with replacing(folder / f"{name}.npy") as temporary:
                    save_array(temporary, np.concatenate(there))
        if self.stores_features:
            null = null_of(self.settings, "", self.device).to("cpu").tensors()
            with replacing(folder / "null.safetensors") as temporary:
                save_tensors(null, temporary)
        digest = hashlib.sha256(json.dumps([self.job(), own.to_pylist()], sort_keys=True).encode())
        if self.stores_sizes:
            digest.update(np.load(folder / "sizes.npy", allow_pickle=False).tobytes())
        settings = None if self.settings is None else asdict(self.settings)
        return {"settings": settings, "features": self.stores_features, "captions": len(own.flatten()), "cut": cut}, digest.hexdigest()

    def clear(self, shards: int) -> None:
        """Removes what `finish` joined."""
        for number in range(shards):
            for name in ("mask.npy", "pooled.npy", "sizes.npy"):
                self._piece(number, name).unlink(missing_ok=True)

    def _of(self, images: Sequence[int] | np.ndarray) -> pa.ListArray:
        import pyarrow as pa

        return self.captions.take(pa.array(images, pa.int64()))

    def _save(self, number: int, name: str, array: np.ndarray) -> None:
        with replacing(self._piece(number, f"{name}.npy")) as temporary:
            save_array(temporary, array)

    def _piece(self, number: int, name: str) -> Path:
        return self.out / FOLDER / f"{number:06d}.{name}"


def image_sizes(original: np.ndarray, resolution: int) -> np.ndarray:
    """Heights and widths int [n, 2] before the crop -> SDXL's sizes int32 [n, 6]."""
    corners = [crop_corner(int(height), int(width), resolution) for height, width in original]
    corners = np.array(corners, np.int32).reshape(-1, 2)
    return np.concatenate([original.astype(np.int32), corners, np.full((len(original), 2), resolution, np.int32)], axis=1)


@dataclass(frozen=True)
class LatentTexts:
    """The captions of a folder of latents, mapped."""

    captions: pa.ListArray  # of each row of the latents
    settings: TextSettings | None  # of the pipeline that they are for
    path: str
    own: pa.ListArray  # of each image
    sizes: np.ndarray | None  # int32 [rows, 6]
    tokens: Ragged | None = None  # of all captions; None: they are encoded when they are drawn
    pooled: np.ndarray | None = None
    empty: Text | None = None
    cut: int = 0

    def encoded(self, captions: pa.ListArray, text: TextSettings) -> EncodedCaptions:
        """The features of `captions`, all of which are among these. Raises ConfigError where the model takes others' features."""
        if (self.settings.sha256, self.settings.length) != (text.sha256, text.length):
            what = f"texts of {self.settings.length} tokens by a {self.settings.pipeline}, and the model takes {text.length} by a {text.pipeline}"
            if self.settings.length == text.length:
                what = f"texts by the encoders of {self.settings.encoder}, and the model's are those of {text.encoder}, which differ"
            raise ConfigError(f"{self.path} holds {what}: make latents for it with `mmgen cache-latents --pipeline {text.encoder}`")
        import pyarrow.compute as pc

        coded = pc.dictionary_encode(self.own.flatten())
        first = np.unique(coded.indices.to_numpy(zero_copy_only=False), return_index=True)[1]  # a text may be there several times
        number = first[pc.index_in(captions.flatten(), value_set=coded.dictionary).to_numpy(zero_copy_only=False)]
        return EncodedCaptions(self.tokens, self.tokens.mask, self.pooled, Choices.of(captions, number), self.empty, self.cut)


def load_texts(path: Path, record: dict[str, Any], rows_per_image: int) -> LatentTexts:
    """Raises DataError or ValueError for what is missing or damaged."""
    import pyarrow as pa
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    known, folder = record["text"], path / FOLDER
    settings = None if known["settings"] is None else from_dict(TextSettings, known["settings"])
    try:
        own = read_texts(folder / "captions.arrow")
        images = np.arange(len(own)).repeat(rows_per_image)
        if len(images) != record["number"] or len(own.flatten()) != known["captions"]:
            raise ValueError("it holds the captions of other images")
        sizes = np.load(folder / "sizes.npy", allow_pickle=False)[images] if (folder / "sizes.npy").is_file() else None
        captions = own if rows_per_image == 1 else own.take(pa.array(images))
        found = LatentTexts(captions, settings, str(path), own, sizes, cut=known["cut"])
        if not known["features"]:
            return found
        mask = np.load(folder / "mask.npy", mmap_mode="r", allow_pickle=False)
        pooled = np.load(folder / "pooled.npy", mmap_mode="r", allow_pickle=False) if (folder / "pooled.npy").is_file() else None
        arrays = [_tokens(folder / f"{i:06d}.tokens", settings.width) for i in range(len(record["shards"]))]
        null = load_file(folder / "null.safetensors")
        return replace(found, tokens=Ragged(arrays, mask), pooled=pooled, empty=Text(**null))
    except (OSError, ValueError, EOFError, pa.ArrowInvalid, SafetensorError) as error:
        raise DataError(f"{folder} is damaged ({error}): copy it again, or encode again into another folder") from error


def _tokens(file: Path, width: int) -> np.ndarray:
    if not file.stat().st_size:  # of images that could not be read, all of them
        return np.empty((0, width), np.float16)
    return np.memmap(file, np.float16, "r").reshape(-1, width)
