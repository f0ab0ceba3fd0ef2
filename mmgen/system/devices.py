"""Which device a word means."""

from __future__ import annotations

import os
import re

from ..errors import ConfigError, nearest

DEVICES = ("auto", "cpu", "cuda")
_NUMBERED = re.compile(r"cuda:\d{1,3}")


def check_device(word: str, numbered: bool = True) -> None:
    """Raises ConfigError for an unknown word. Loads no torch. `numbered`: whether one GPU of several can be named, as cuda:1."""
    if _NUMBERED.fullmatch(word):
        if not numbered:
            raise ConfigError(f"--device {word}: a training takes the GPUs that it is shown; CUDA_VISIBLE_DEVICES={word[5:]} shows this one")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError(f"--device {word} is for one process, and several were launched: leave it out")
    elif word not in DEVICES:
        raise ConfigError(f"unknown device {word!r}: {nearest(word, (*DEVICES, 'cuda:N') if numbered else DEVICES)}")


def find_device(word: str) -> str:
    """cpu, cuda or cuda:N. Raises ConfigError for a GPU that torch does not find."""
    import torch

    check_device(word)
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if word.startswith("cuda") and there == 0:
        raise ConfigError(f"--device {word}: torch finds no GPU; use --device cpu, or install a torch that supports yours")
    if word.startswith("cuda:") and int(word[5:]) >= there:
        raise ConfigError(f"--device {word}: torch finds {there} GPU{'s' * (there > 1)}, numbered from 0")
    return ("cuda" if there else "cpu") if word == "auto" else word
