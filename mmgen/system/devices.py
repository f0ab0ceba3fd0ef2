"""Which device a name means."""

from __future__ import annotations

import os
import re

from ..errors import ConfigError, nearest

DEVICES = ("auto", "cpu", "cuda")
_NUMBERED = re.compile(r"cuda:\d{1,3}")


def check_device(name: str, numbered: bool = True) -> None:
    """Raises ConfigError for an unknown name. Loads no torch. `numbered`: whether one GPU of several can be named, as cuda:1."""
    if _NUMBERED.fullmatch(name):
        if not numbered:
            raise ConfigError(f"--device {name}: a training takes the GPUs that it is shown; CUDA_VISIBLE_DEVICES={name[5:]} shows this one")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError(f"--device {name} is for one process, and several were launched: leave it out")
    elif name not in DEVICES:
        raise ConfigError(f"unknown device {name!r}: {nearest(name, (*DEVICES, 'cuda:N') if numbered else DEVICES)}")


def find_device(name: str) -> str:
    """cpu, cuda or cuda:N. Raises ConfigError for a GPU that torch does not find."""
    import torch

    check_device(name)
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name.startswith("cuda") and there == 0:
        raise ConfigError(f"--device {name}: torch finds no GPU; use --device cpu, or install a torch that supports yours")
    if name.startswith("cuda:") and int(name[5:]) >= there:
        raise ConfigError(f"--device {name}: torch finds {there} GPU{'s' * (there > 1)}, numbered from 0")
    return ("cuda" if there else "cpu") if name == "auto" else name
