"""Texts as what a network is conditioned on: bytes, or the features of a frozen encoder of transformers or of a pipeline."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch

from ..errors import ConfigError, ModelError, shortened
from ..networks.conditions import Text
from ..networks.text import BYTES, TextSettings, byte_text
from ..system.files import at_home, sha256_of
from .pipeline_text import Encoded, pipeline_encoder
from .quiet import quiet_libraries

BATCH = 64  # texts that a frozen encoder sees at a time
_SUFFIXES = (".safetensors", ".json", ".txt", ".model")  # of the files in a folder that decide what a text becomes


class Encoder(Protocol):
    """A frozen encoder: what it makes of texts, tokens float32 [N, L, D], mask bool [N, L] and a vector each [N, P] or None.

    Results are on the device, where its model is moved to and stays.
    """

    sha256: str

    def __call__(self, texts: Sequence[str], device: str) -> Encoded: ...

    def null(self, negative: str, device: str) -> Encoded:
        """One row: what guidance leads away from, a negative prompt or, where it is "", no text at all."""

    def count_cut(self, texts: Sequence[str]) -> int:
        """How many of the texts are longer than it takes."""


@dataclass(frozen=True)
class FrozenEncoder:
    """A text model of transformers in evaluation mode, float32, with its tokenizer."""

    model: torch.nn.Module
    tokenizer: Any
    sha256: str
    length: int

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], device: str = "cpu") -> Encoded:
        """The vector of a text is the mean of its features under the mask."""
        given = self.tokenizer(list(texts), padding="max_length", truncation=True, max_length=self.length, return_tensors="pt")
        ids, mask = given["input_ids"].to(device), given["attention_mask"].to(device)
        features = self.model.to(device)(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        there = mask[:, :, None].float()
        return features, mask.bool(), (features * there).sum(1) / there.sum(1).clamp(min=1)

    def null(self, negative: str = "", device: str = "cpu") -> Encoded:
        return self([negative], device)

    def count_cut(self, texts: Sequence[str]) -> int:
        ids = self.tokenizer(list(texts), truncation=False, verbose=False)["input_ids"] if texts else []
        return sum(len(one) > self.length for one in ids)


def encode(
    settings: TextSettings, texts: Sequence[str], device: str | torch.device = "cpu", empty: str = "",
    tell: Callable[[int], None] = lambda done: None,
) -> Text:  # fmt: skip
    """The condition of these texts, on the CPU.

    `empty` is the text whose encoding is the null: "" as in training, or a negative prompt. tell: called with the number done.
    """
    if settings.encoder == BYTES:
        text = byte_text(texts, settings.length)[0]
        return replace(text, empty=replace(byte_text([empty], settings.length)[0], empty=None))
    encoder = open_encoder(settings)
    parts = []
    for start in range(0, len(texts), BATCH):
        parts.append([None if part is None else part.cpu() for part in encoder(texts[start : start + BATCH], str(device))])
        tell(min(start + BATCH, len(texts)))
    null = null_of(settings, empty, device).to("cpu")
    return Text(*(None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)), empty=null)


def null_of(settings: TextSettings, negative: str = "", device: str | torch.device = "cpu") -> Text:
    """What a frozen encoder makes of no text, or of a negative prompt: one row, on the device."""
    return Text(*open_encoder(settings).null(negative, str(device)))


def count_cut(settings: TextSettings, texts: Sequence[str]) -> int:
    """How many of the texts are longer than the encoder takes."""
    if settings.encoder == BYTES:
        return byte_text(texts, settings.length)[1]
    return open_encoder(settings).count_cut(texts)


def open_encoder(settings: TextSettings) -> Encoder:
    """The frozen encoder of a model, looked for at $MMGEN_ENCODER if that is set.

    Raises ModelError where it is not there or cannot be read, ConfigError where it is not the one of the training.
    """
    path = os.environ.get("MMGEN_ENCODER") or settings.encoder
    try:
        if settings.pipeline:
            encoder = pipeline_encoder(path, settings.pipeline, settings.length)
        else:
            encoder = frozen_encoder(path, settings.length)
    except ModelError as error:
        raise ModelError(f"{error}; $MMGEN_ENCODER may name another place of the text encoder") from error
    if settings.sha256 and encoder.sha256 != settings.sha256:
        raise ConfigError(
            f"the text encoder in {path} is not the one of the training, or has changed since: bring that back, or set "
            "$MMGEN_ENCODER to its folder"
        )
    return encoder


def described(settings: TextSettings) -> TextSettings:
    """With what follows from the encoder's folder: its sizes and its hash. Raises ConfigError and ModelError."""
    if settings.encoder == BYTES:
        return replace(settings, pooled=settings.width, sha256="")
    path = at_home(settings.encoder)
    folder = str(path.absolute()) if path.exists() or not settings.pipeline else settings.encoder
    if settings.pipeline:
        encoder = pipeline_encoder(folder, settings.pipeline, None if settings.length == TextSettings().length else settings.length)
    else:
        encoder = frozen_encoder(folder, settings.length)
    tokens, _, pooled = encoder(["a"], "cpu")
    sizes = {"length": tokens.shape[1], "width": tokens.shape[2], "pooled": 0 if pooled is None else pooled.shape[1]}
    return replace(settings, encoder=folder, **sizes, depth=0, sha256=encoder.sha256)


def sizes_of(settings: TextSettings) -> TextSettings:
    """As `described`; of an encoder that is not there with the sizes that are set, for a dry run."""
    if settings.encoder == BYTES or at_home(settings.encoder).exists():
        return described(settings)
    return replace(settings, depth=0)


@lru_cache(maxsize=1)
def frozen_encoder(path: str, length: int) -> FrozenEncoder:
    """The text model in a folder of transformers: BERT's kind, the encoder of T5's kind, the text tower of CLIP's.

    Weights are read as safetensors only, and no code of the folder is run. Raises ConfigError where transformers is missing or the
    model has not so many positions, ModelError where the folder is missing.
    """
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise ConfigError("a frozen text encoder needs transformers: pip install 'mmgen[clip]'") from error
    folder = at_home(path)
    if not (folder / "config.json").is_file():
        raise ModelError(f"there is no text encoder in {path}: give a folder saved by transformers, with config.json")
    with _readable(path), quiet_libraries():
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model = AutoModel.from_pretrained(folder, local_files_only=True, trust_remote_code=False, use_safetensors=True)
        if model.config.is_encoder_decoder:
            model = model.get_encoder()
        model = getattr(model, "text_model", model)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
    most = getattr(model.config, "max_position_embeddings", None) or length  # T5 has no such table
    if length > most:
        raise ConfigError(f"text.length is {length}, and the text encoder in {path} takes at most {most} tokens: set text.length={most}")
    return FrozenEncoder(model.float().eval().requires_grad_(False), tokenizer, folder_sha256(folder), length)


def folder_sha256(folder: Path) -> str:
    """The SHA-256 of an encoder: of the names and contents of its weights, settings and vocabulary."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in _SUFFIXES):
        digest.update(f"{path.name} {sha256_of(path)}\n".encode())
    return digest.hexdigest()


@contextlib.contextmanager
def _readable(path: str) -> Iterator[None]:
    """Whatever transformers raises for a folder that it cannot read becomes one sentence."""
    try:
        yield
    except Exception as error:
        raise ModelError(f"{path} cannot be read as a text encoder of transformers, with its tokenizer: {shortened(error, 300)}") from error
