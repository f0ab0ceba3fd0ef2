"""Which two towers a place holds: a CLIP of transformers or of open_clip, or towers of one's own.

A folder of one's own holds `images.pt`, a TorchScript from uint8 images [N, 3, H, W] to floats [N, E]; `texts.pt`, one from the
pooled features of a text encoder, float32 [N, P], to [N, E]; and `towers.json`, {"text_encoder": FOLDER, "length": TOKENS}, the
encoder being a folder of transformers. Such towers give retrieval scores, never a CLIP score.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..encoders.text import frozen_encoder
from ..errors import ModelError
from ..system.files import read_json, sha256_of
from .inception import load_torchscript, refusing
from .open_clip_towers import OPEN_CLIP, WEIGHTS, open_clip_towers
from .pretrained import clip_towers
from .towers import Towers

OWN = "towers.json"


def build_towers(path: str, device: torch.device | str = "cpu") -> Towers:
    """The towers in a folder, or a CLIP of the hub by its id. Of a folder with both kinds of CLIP open_clip's is taken, as published scores do.
    Raises ConfigError and ModelError."""
    if (Path(path) / OWN).is_file():
        return _own(Path(path), device)
    if (Path(path) / OPEN_CLIP).is_file() and ((Path(path) / WEIGHTS).is_file() or not (Path(path) / "config.json").is_file()):
        return open_clip_towers(Path(path), device)
    return clip_towers(path, device)


def _own(folder: Path, device: torch.device | str) -> Towers:
    encoder, length = _settings(folder / OWN)
    networks = {name: load_torchscript(_there(folder / f"{name}.pt"), device) for name in ("images", "texts")}
    embed = frozen_encoder(str(encoder), length)

    @torch.no_grad()
    def images(batch: Tensor) -> Tensor:
        with refusing(folder / "images.pt", batch):
            return _checked(networks["images"](batch.to(device)), len(batch), folder / "images.pt")

    @torch.no_grad()
    def texts(batch: list[str]) -> Tensor:
        pooled = embed(batch, str(device))[2].to(device)
        with refusing(folder / "texts.pt", pooled):
            return _checked(networks["texts"](pooled), len(batch), folder / "texts.pt")

    width = texts(["a"]).shape[1]
    digest = hashlib.sha256("".join([sha256_of(folder / "images.pt"), sha256_of(folder / "texts.pt"), embed.sha256]).encode())
    return Towers(folder.resolve().name, digest.hexdigest(), False, width, images, texts)


def _settings(file: Path) -> tuple[Path, int]:
    """The text encoder's folder, from this file's where it is relative, and the number of tokens."""
    try:
        content: Any = read_json(file)
        encoder, length = content["text_encoder"], content["length"]
        if not isinstance(encoder, str) or type(length) is not int or not 2 <= length <= 4096:
            raise ValueError("text_encoder is a folder, length a number of tokens from 2 to 4096")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f'{file} is not {{"text_encoder": FOLDER, "length": TOKENS}}: {error}') from error
    return file.parent / encoder, length


def _there(file: Path) -> Path:
    if not file.is_file():
        raise ModelError(f"{file} is missing: two towers are images.pt, texts.pt and {OWN}")
    return file


def _checked(features: object, count: int, file: Path) -> Tensor:
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != count or not features.is_floating_point():
        shape = f"{features.dtype} {list(features.shape)}".removeprefix("torch.") if isinstance(features, Tensor) else type(features).__name__
        raise ModelError(f"{file} returns {shape} for {count} inputs: embeddings are floats [{count}, E]")
    return features
