"""A reader that is watched, for tests."""

from __future__ import annotations

import codecs
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from original_files import (
    write_edm2_pickle,
    write_edm_pickle,
    write_pt,
    write_safetensors,
)

from mmgen.errors import MmgenError
from mmgen.formats.reading import Found, read
from mmgen.formats.recognise import describe

MEMORY = 256 * 1024**2  # bytes that reading a file of some kilobytes may take, far more than it needs
SECONDS = 10  # for one file: generous, as other work may run beside
watching: list[str] | None = None

_DANGEROUS = ("import", "exec", "compile", "pickle.find_class", "marshal.loads", "ctypes.dlopen", "shutil.", "webbrowser.open")
_DANGEROUS += (
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "os.remove",
    "os.rename",
    "os.mkdir",
    "subprocess.",
)
_DANGEROUS += ("socket.connect", "socket.getaddrinfo", "urllib.")


def _hook(event: str, arguments: tuple) -> None:
    if watching is None:
        return
    writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if event.startswith(_DANGEROUS) or writes:
        watching.append(f"{event} {arguments[:1]!r}"[:200])


sys.addaudithook(_hook)  # cannot be removed again, but is quiet unless `watching`


@contextlib.contextmanager
def watched() -> Iterator[list[str]]:
    """Notes what Python reports as done within; memory beyond MEMORY is refused by the system, where that can be asked for."""
    global watching
    watching = noted = []
    restore = lambda: None  # noqa: E731
    if sys.platform == "linux":
        import resource

        before = resource.getrlimit(resource.RLIMIT_AS)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, before[1]))
        restore = lambda: resource.setrlimit(resource.RLIMIT_AS, before)  # noqa: E731
    try:
        yield noted
    finally:
        restore()
        watching = None


class Reader:
    """Reads contents under one name, and counts what became of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path, self.mark = folder / "file", folder / "mark"
        self.read = self.refused = 0
        self.slowest = 0.0

    def __call__(self, content: bytes) -> Found | None:
        self.path.write_bytes(content)
        found, start = None, time.perf_counter()
        with watched() as noted:
            try:
                found = read(self.path)
                describe(found)
            except MmgenError as error:
                self.refused += 1
                assert "\n" not in str(error) and len(str(error)) < 1000
            else:
                self.read += 1
        spent = time.perf_counter() - start
        self.slowest = max(self.slowest, spent)
        assert spent < SECONDS, content[:200]
        assert noted == [], content[:200]
        assert not self.mark.exists(), content[:200]
        return found


@pytest.fixture
def reader(tmp_path) -> Reader:
    for codec in ("cp437", "raw_unicode_escape", "unicode_escape", "latin-1"):  # imports that are put off until the first file
        codecs.lookup(codec)  # are done with: these are what zipfile and pickletools use
    with watched():
        pass
    for content in seeds(tmp_path).values():
        with contextlib.suppress(MmgenError):
            (tmp_path / "file").write_bytes(content)
            describe(read(tmp_path / "file"))
    return Reader(tmp_path)


def seeds(folder: Path) -> dict[str, bytes]:
    """One small file of each container, with the trap."""
    state = {
        "enc.8x8_conv.weight": torch.ones(2, 3, 1, 1),
        "map_layer0.weight": torch.ones(2, 2),
        "map_noise.freqs": torch.ones(2),
    }
    edm = {f"model.{key}": value for key, value in state.items()}
    mark, made = folder / "mark", folder / "seed"
    optimizer = {"opt": {"state": {0: {"step": torch.tensor(1.0)}}}, "model": state}
    names, fourier = {"model": "DiT-XL/2", "lr": 1e-4}, {"unet.emb_fourier.freqs": torch.ones(2)}
    writers: dict[str, Callable] = {
        "edm": lambda: write_edm_pickle(made, edm, mark=mark, sigma_data=np.float64(0.5)),
        "edm, protocol 2": lambda: write_edm_pickle(made, edm, "IMMPrecond", mark=mark, protocol=2),
        "edm2": lambda: write_edm2_pickle(made, fourier, mark=mark, encoder="StabilityVAEEncoder"),
        "zip": lambda: write_pt(made, state, wrap="ema", namespace=names, extra=optimizer),
        "legacy": lambda: write_pt(made, state, wrap="ema", namespace=names, extra=optimizer, legacy=True),
        "safetensors": lambda: write_safetensors(made, state, {"mmgen": json.dumps({"config": {"resolution": 8}})}),
    }
    return {name: write().read_bytes() for name, write in writers.items()}
