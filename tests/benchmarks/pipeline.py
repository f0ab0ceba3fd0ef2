"""The data pipeline alone: PNG files into the cache, the cache again, and batches out of it, against loops over the files."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mmgen import data
from mmgen.training.batches import fetch

from .measuring import Case, Row, Run, Size, compared, temporary_folder

NUM = {"tiny": 32, "quick": 2000, "full": 20_000}
BATCH, BATCHES = 128, 20
CLASSES = 10


def cases(size: Size, device: str) -> list[Case]:
    num, repetitions = NUM[size], 1 if size == "tiny" else 3
    batch = min(BATCH, num // 2)
    return [
        Case(f"data, {num} PNG files decoded", "images", num, partial(decoded, num), partial(read_all, num), repetitions),
        Case(f"data, {num} PNG files seen before", "images", num, partial(cached, num), partial(read_all, num), repetitions),
        Case(
            f"data, {BATCHES} batches of {batch} delivered", "images", BATCHES * batch, partial(delivered, num, batch, device),
            partial(loaded, num, batch, device), repetitions,
        ),
    ]  # fmt: skip


def rows(size: Size, device: str) -> Iterator[Row]:
    for one in cases(size, device):
        yield compared("data", one, size, device)


def make_folder(num: int) -> Path:
    """32 x 32 RGB in class folders."""
    place = temporary_folder()
    random = np.random.default_rng(0)
    for i in range(num):
        folder = place / "images" / f"{i % CLASSES}"
        folder.mkdir(parents=True, exist_ok=True)
        small = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(small).resize((32, 32), Image.Resampling.BICUBIC).save(folder / f"{i:06d}.png")
    return place


def decoded(num: int) -> Run:
    place, number = make_folder(num), itertools.count()
    return lambda: data.load(str(place / "images"), cache_dir=place / f"cache-{next(number)}")


def cached(num: int) -> Run:
    place = make_folder(num)
    return lambda: np.asarray(data.load(str(place / "images"), cache_dir=place / "cache").images)


def read_all(num: int) -> Run:
    """Every file by PIL, one after the other."""
    place = make_folder(num)

    def once() -> np.ndarray:
        files = sorted((place / "images").rglob("*.png"))
        return np.stack([np.asarray(Image.open(file).convert("RGB")).transpose(2, 0, 1) for file in files])

    return once


def delivered(num: int, batch: int, device: str) -> Run:
    place = make_folder(num)
    dataset, where = data.load(str(place / "images"), cache_dir=place / "cache"), torch.device(device)

    def once() -> None:
        for number in range(BATCHES):
            fetch(dataset, number * batch, batch, 0, where)

    return once


class Files(torch.utils.data.Dataset):
    """What a training script has: a file is opened when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(folder.rglob("*.png"))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        image = np.asarray(Image.open(self.files[i]).convert("RGB"))
        return torch.from_numpy(image.transpose(2, 0, 1).copy()), int(self.files[i].parent.name)


def loaded(num: int, batch: int, device: str) -> Run:
    files = Files(make_folder(num) / "images")

    def batches() -> Iterator:
        while True:
            yield from torch.utils.data.DataLoader(files, batch, shuffle=True, drop_last=True)

    def once() -> None:
        for images, labels in itertools.islice(batches(), BATCHES):
            images.to(device), labels.to(device)

    return once
