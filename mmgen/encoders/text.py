"""Texts as what a network is conditioned on: bytes, or the features of a frozen encoder in a folder of transformers."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, ModelError, shortened
from ..networks.conditions import Text
from ..networks.text import BYTES, TextSettings, byte_text
from ..system.files import at_home, sha256_of

_BATCH = 64  # texts that a frozen encoder sees at a time
_SUFFIXES = (".safetensors", ".json", ".txt", ".model")  # of the files in a folder that decide what a text becomes


@dataclass(frozen=True)
class FrozenEncoder:
    """A text model of transformers in evaluation mode, float32, with its tokenizer."""

    model: torch.nn.Module
    tokenizer: Any
    sha256: str

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], length: int) -> tuple[Tensor, Tensor, Tensor, int]:
        """Features float32 [N, length, D], mask bool [N, length], their mean under the mask [N, D], and how many were cut."""
        whole = self.tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]
        given = self.tokenizer(list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        device = next(self.model.parameters()).device
        ids, mask = given["input_ids"].to(device), given["attention_mask"].to(device)
        features = self.model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        there = mask[:, :, None].float()
        pooled = (features * there).sum(1) / there.sum(1).clamp(min=1)
        return features.cpu(), mask.bool().cpu(), pooled.cpu(), sum(len(one) > length for one in whole)


def encode(
    settings: TextSettings, texts: Sequence[str], device: str | torch.device = "cpu", empty: str = "",
    tell: Callable[[int], None] = lambda done: None,
) -> tuple[Text, int]:  # fmt: skip
    """The condition of these texts, on the CPU, and how many of them were cut at `settings.length`.

    `empty` is the text whose encoding is the null: "" as in training, or a negative prompt. tell: called with the number done.
    """
    if settings.encoder == BYTES:
        text, cut = byte_text(texts, settings.length)
        return replace(text, empty=replace(byte_text([empty], settings.length)[0], empty=None)), cut
    encoder = frozen_encoder(settings.encoder, str(device))
    if settings.sha256 and encoder.sha256 != settings.sha256:
        raise ConfigError(f"the text encoder in {settings.encoder} has changed since the training: bring the old one back")
    parts, cut = [], 0
    for start in range(0, len(texts), _BATCH):
        *part, more = encoder(texts[start : start + _BATCH], settings.length)
        parts.append(part)
        cut += more
        tell(min(start + _BATCH, len(texts)))
    *null, _ = encoder([empty], settings.length)
    return Text(*(torch.cat(column) for column in zip(*parts, strict=True)), empty=Text(*null)), cut


def described(settings: TextSettings) -> TextSettings:
    """With what follows from the encoder's folder: its sizes and its hash. Raises ConfigError and ModelError."""
    if settings.encoder == BYTES:
        return replace(settings, pooled=settings.width, sha256="")
    folder = str(at_home(settings.encoder).absolute())
    encoder = frozen_encoder(folder)
    width = encoder(["a"], settings.length)[0].shape[2]
    return replace(settings, encoder=folder, width=width, pooled=width, depth=0, sha256=encoder.sha256)


@lru_cache(maxsize=1)
def frozen_encoder(place: str, device: str = "cpu") -> FrozenEncoder:
    """The text model in a folder of transformers: BERT's kind, the encoder of T5's kind, the text tower of CLIP's.

    Weights are read as safetensors only, and no code of the folder is run. Raises ConfigError where transformers is missing,
    ModelError where the folder is.
    """
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise ConfigError("a frozen text encoder needs transformers: pip install 'mmgen[clip]'") from error
    folder = at_home(place)
    if not (folder / "config.json").is_file():
        raise ModelError(f"there is no text encoder in {place}: give a folder saved by transformers, with config.json")
    with _readable(place):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model = AutoModel.from_pretrained(folder, local_files_only=True, trust_remote_code=False, use_safetensors=True)
        if model.config.is_encoder_decoder:
            model = model.get_encoder()
        model = getattr(model, "text_model", model)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
    return FrozenEncoder(model.float().eval().requires_grad_(False).to(device), tokenizer, folder_sha256(folder))


def folder_sha256(folder: Path) -> str:
    """The SHA-256 of an encoder: of the names and contents of its weights, settings and vocabulary."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in _SUFFIXES):
        digest.update(f"{path.name} {sha256_of(path)}\n".encode())
    return digest.hexdigest()


@contextlib.contextmanager
def _readable(place: str) -> Iterator[None]:
    """Whatever transformers raises for a folder that it cannot read becomes one sentence."""
    try:
        yield
    except Exception as error:
        raise ModelError(f"{place} cannot be read as a text encoder of transformers, with its tokenizer: {shortened(error, 300)}") from error
