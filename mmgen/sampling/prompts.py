"""Which text an image is drawn of: the prompts in turn, or where none are given the captions of the training data at random."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from ..encoders.text import count_cut, encode
from ..errors import ConfigError
from ..models.config import ModelConfig
from ..networks.conditions import Text
from ..networks.text import TextSettings
from ..system.files import at_home
from ..system.random import keys, uniform

_MOST_BYTES = 1 << 28  # of a file of prompts
_CAPTION = 0  # purpose of random numbers; `drawing` has others


def read_prompts(path: Path) -> tuple[str, ...]:
    """The lines of a file in UTF-8 that are not empty. Raises ConfigError with one sentence."""
    path = at_home(path)
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ConfigError(f"{path} has more than {_MOST_BYTES:,} bytes: prompts are a text file, one a line")
        content = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 (byte {error.start:,}): save the prompts as UTF-8 text, one a line") from error
    return checked([line.strip() for line in content.split("\n") if line.strip()], str(path))


def checked(prompts: Sequence[str], where: str) -> tuple[str, ...]:
    """The prompts, stripped. Raises ConfigError where there are none, or one is empty or not one line."""
    stripped = tuple(prompt.strip() for prompt in prompts)
    if not stripped or not all(stripped):
        raise ConfigError(f"{where} holds {'an empty prompt' if stripped else 'no prompts'}: write at least one, one a line")
    for prompt in stripped:
        if any(ord(character) < 32 and character != "\t" for character in prompt) or "\x7f" in prompt:
            raise ConfigError(f"{where}: a prompt is one line of text without control characters, not {prompt[:40]!r}")
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError:
            raise ConfigError(f"{where}: the prompt {prompt[:40]!r} is not UTF-8") from None
    return stripped


def texts_of(config: ModelConfig, prompts: Sequence[str], seed: int, index: Tensor) -> list[str]:
    """The text of each of the images number `index`: prompt i mod P, or a caption of the training data, by (seed, i)."""
    if prompts:
        return [prompts[i % len(prompts)] for i in index.tolist()]
    captions = config.captions or [""]
    draw = uniform(keys(seed, index, _CAPTION)).cpu()
    return [captions[min(int(u * len(captions)), len(captions) - 1)] for u in draw.tolist()]


def text_condition(config: ModelConfig, texts: Sequence[str], negative: str, device: object) -> Text:
    """What a model is conditioned on. Every different text is encoded once."""
    different = tuple(dict.fromkeys(texts))
    row_of = {text: row for row, text in enumerate(different)}
    return _encoded(config.text, different, negative, str(device)).to(device)[[row_of[text] for text in texts]]


@lru_cache(maxsize=4)
def _encoded(settings: TextSettings, texts: tuple[str, ...], negative: str, device: str) -> Text:
    return encode(settings, texts, device, empty=negative)


@lru_cache(maxsize=4)
def cut_prompts(settings: TextSettings, prompts: tuple[str, ...]) -> int:
    """How many of the different prompts are longer than the encoder takes."""
    return count_cut(settings, tuple(dict.fromkeys(prompts)))


def prompts_sha256(prompts: Sequence[str]) -> str | None:
    """Of all prompts, in their order; None of none."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest() if prompts else None
