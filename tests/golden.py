"""What the original implementations compute, kept in tests/golden, and the rule that makes their weights."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parent / "golden"
DEVICE = os.environ.get("MMGEN_TEST_DEVICE", "cpu")  # `tests.gpu` compares on a GPU
torch.backends.cudnn.allow_tf32 = False  # what is compared is float32


def arrays(name: str) -> dict[str, torch.Tensor]:
    """The arrays of a .npz file."""
    with np.load(FOLDER / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]).to(DEVICE) for key in file.files}


def settings(name: str) -> dict:
    """Settings of the network, and `shapes`, its original state dict as key -> shape."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def weight(key: str, shape: list[int]) -> torch.Tensor:
    """The value of a tensor follows from its name."""
    z = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
    if len(shape) >= 2:
        z = z / np.sqrt(np.prod(shape[1:]))
    else:
        z = 1 + 0.1 * z if key.endswith("weight") else 0.05 * z
    return torch.from_numpy(z.astype(np.float32)).to(DEVICE)


def state(name: str) -> dict[str, torch.Tensor]:
    """The official state dict."""
    kept = {key.removeprefix("kept/"): value for key, value in arrays(name).items() if key.startswith("kept/")}
    return {key: kept[key] if key in kept else weight(key, shape) for key, shape in settings(name)["shapes"].items()}
