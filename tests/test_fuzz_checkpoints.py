"""Damaged and hostile checkpoints: nearly 5,000 files, none of which executes anything, hangs, or takes much memory.

Measured: 4,962 files in 18 s of one core, the slowest 2 s (it has a million instructions). Watched with Python's own audit events
(imports, `exec`, `compile`, processes, sockets, files opened for writing, `pickle.find_class`), with a trap in each file, and
with a limit of the address space.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import mmap
import os
import pickle
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from original_files import (
    Persistent,
    original_modules,
    write_diffusers,
    write_edm2_pickle,
    write_edm_pickle,
    write_pt,
    write_safetensors,
)
from test_safe_pickle import Calls, inner_bytes, number, storage_file, tensor_file

from mmgen.formats.reading import Found, read
from mmgen.formats.recognise import describe
from mmgen.errors import MmgenError, ModelError

MEMORY = 256 * 1024**2  # bytes that reading a file of some kilobytes may take, far more than it needs
SECONDS = 10  # for one file: generous, as other work may run beside
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
pytestmark = pytest.mark.filterwarnings("ignore:invalid escape sequence")  # of pickletools, about the content
watching: list[str] | None = None


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


# Hostile files


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def module(state: bytes) -> bytes:
    return b"ctorch.nn.modules.container\nModuleDict\n)\x81}" + text("_modules") + state + b"sb"


def memoised(index: int) -> tuple[bytes, bytes]:
    return b"r" + struct.pack("<I", index), b"j" + struct.pack("<I", index)


def doubling(depth: int, wrap: Callable[[bytes, bytes], bytes], leaf: bytes) -> bytes:
    """A value that holds the one before twice, and so on: small in the file, 2^depth where it is opened out."""
    program = leaf
    for i in range(depth):
        put, get = memoised(i)
        program = wrap(program + put, get)
    return program


def beside(value: bytes) -> bytes:
    """{"model": weights, "steps": value}"""
    weights = tensor_file(0, b"K\x02\x85", b"K\x01\x85")[2:-1]
    return b"\x80\x02}" + text("model") + weights + b"s" + text("steps") + value + b"s."


def programs(mark: Path) -> dict[str, bytes]:
    """Pickles that are made to harm."""
    run = Calls(exec, f"open({str(mark)!r}, 'w').close()")
    shell = Calls(os.system, f"echo > '{mark}'")
    nested = Persistent("Net", {}, mark)
    for _ in range(10):
        nested, inside = Persistent("Net", {"inner": nested, "run": run}, mark), nested
        nested._modules["a"] = inside
    with original_modules():
        made = {
            f"{name}, protocol {protocol}": pickle.dumps(value, protocol)
            for protocol in (2, 3, 4, 5)
            for name, value in {
                "exec": run, "eval": Calls(eval, f"open({str(mark)!r}, 'w')"), "system": {"ema": shell},
                "nested": {"ema": nested},
                "getattr": Calls(Calls(getattr, Calls(__import__, "os"), "system"), "true"),
                "import": Calls(Calls(__import__, "antigravity")), "compile": Calls(compile, "1", "a", "eval"),
                "path": Calls(Path.write_text, mark, "x"), "torch.load": Calls(torch.load, str(mark)),
                "numpy": Calls(np.save, str(mark), np.zeros(1)), "class": {"model": Calls(torch.nn.Linear, 10**9, 10**9)},
            }.items()
        }  # fmt: skip
    reduce = pickle.dumps(run, 2)
    magic = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    made |= {
        f"inner bytes {i}": inner_bytes(content) for i, content in enumerate((reduce, magic + reduce, b"", magic, b"PK\x03\x04"))
    }
    made |= {f"older format {i}": content for i, content in enumerate((magic + reduce, magic + magic, magic))}
    inner = storage_file()
    for _ in range(50):
        inner = inner_bytes(inner)
    made["inner bytes of inner bytes"] = inner
    for size in (2**31, 2**40, 2**47, 2**62, -1):
        made[f"shape {size}"] = tensor_file(0, number(size) + b"\x85", b"K\x01\x85")
        made[f"stride {size}"] = tensor_file(0, b"K\x02\x85", number(size) + b"\x85")
        made[f"offset {size}"] = tensor_file(size if size < 2**62 else 2**62, b"K\x01\x85", b"K\x01\x85")
        made[f"repeated {size}"] = tensor_file(0, number(size) + b"\x85", b"K\x00\x85")
        made[f"storage {size}"] = inner_bytes(storage_file(size))
    for opcode in (b"\x8d", b"\x8e", b"\x96"):
        for size in (2**31, 2**40, 2**62, 2**64 - 1):
            made[f"{opcode!r} of {size}"] = b"\x80\x05" + opcode + struct.pack("<Q", size) + b"x."
    for opcode in (b"X", b"B", b"T", b"\x8b"):
        made[f"{opcode!r} of 2 GB"] = b"\x80\x05" + opcode + struct.pack("<I", 2**31 - 1) + b"x."
    linear = b"ctorch.nn.modules.linear\nLinear\n)\x81"
    long_a, long_b = text("a" * 150), text("b" * 150)
    itself = linear + b"q\x00}" + text("_modules") + b"}" + text("a") + b"h\x00ssb."
    made |= {
        "deep lists": b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
        "deep tuples": b"\x80\x02)" + b"\x85" * 400_000 + b".",
        "deep states": b"\x80\x02" + linear * 50_000 + (b"}" + text("a") + b"Nsb") + b".",
        "itself": b"\x80\x02" + itself,
        "dict of itself": b"\x80\x02}q\x00" + text("model") + b"h\x00s.",
        "many instructions": b"\x80\x02Nq\x00" + b"h\x00q\x00" * 600_000 + b".",
        "many marks": b"(" * 1_000_000 + b".",
        "many dicts": b"\x80\x02(" + b"}" * 300_000 + b"l.",
        "many tables": b"\x80\x02(" + b"}NNs" * 300_000 + b"l.",
        "long number": b"I" + b"9" * 500_000 + b"\n.",
        "long number in hex": beside(b"\x8b" + struct.pack("<i", 10**6) + b"\x7f" * 10**6),
        "long number as a key": beside(b"}\x8b" + struct.pack("<i", 10**5) + b"\x7f" * 10**5 + b"Ns"),
        "long float": b"F" + b"9" * 500_000 + b"\n.",
        "memo far away": b"\x80\x02Nr\xff\xff\xff\xff.",
        "escapes": b"S'" + b"\\x41" * 100_000 + b"'\n.",
        "lists that double": b"\x80\x02" + doubling(60, lambda inner, get: b"(" + inner + get + b"l", b"]") + b".",
        "settings that double": beside(doubling(60, lambda inner, get: b"(" + inner + get + b"l", b"]")),
        "keys that double": magic + b"\x80\x02N." + doubling(30, lambda inner, get: b"(" + inner + get + b"l", b"]") + b".",
        "modules that double": b"\x80\x02}" + text("model")
        + doubling(24, lambda inner, get: module(b"(" + text("a") + inner + text("b") + get + b"d"), linear + b"}b") + b"s.",
        "long names": b"\x80\x02}" + text("model")
        + doubling(24, lambda inner, get: module(b"(" + long_a + inner + long_b + get + b"d"), linear + b"}b") + b"s.",
    }  # fmt: skip
    return made


def test_hostile_pickles(reader):
    """As a pickle, as torch.save's older format, in a zip, and in the bytes of a storage: all are refused."""
    made = programs(reader.mark)
    magic = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    for name, program in made.items():
        zipped = io.BytesIO()
        with zipfile.ZipFile(zipped, "w") as file:
            file.writestr("archive/data.pkl", program)
            file.writestr("archive/version", "3\n")
        layouts = [program, magic + program + pickle.dumps([], 2), zipped.getvalue(), inner_bytes(program)]
        for content in layouts if len(program) < 100_000 else layouts[:1]:
            assert reader(content) is None or name.startswith("long number"), name
    assert reader.read <= 4 and reader.refused > 400


def zip_of(entries: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, content in entries:
            file.writestr(name, content)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_hostile_zips(reader):
    program = pickle.dumps({"a": 1}, 2)
    bombs = [
        zip_of([("archive/data.pkl", bytes(100_000_000))], zipfile.ZIP_DEFLATED),
        zip_of([("archive/data.pkl", program), ("archive/data/0", bytes(50_000_000))], zipfile.ZIP_DEFLATED),
        zip_of([("archive/data.pkl", bytes(10_000_000))], zipfile.ZIP_BZIP2),
        zip_of([("archive/data.pkl", bytes(10_000_000))], zipfile.ZIP_LZMA),
        zip_of([("archive/data.pkl", program)] * 2),
        zip_of([("a/data.pkl", program), ("b/data.pkl", program)]),
        zip_of([("archive/data.pkl", program), *((f"archive/data/{i}", b"") for i in range(20_000))]),
        zip_of([("../data.pkl", program)]),
        zip_of([("/data.pkl", program)]),
        zip_of([("archive/data.pkl", zip_of([("archive/data.pkl", program)]))]),
    ]
    for content in bombs:
        assert reader(content) is None
    stored = zip_of([("archive/data.pkl", program), ("archive/data/0", b"x")])
    start = stored.index(b"PK\x01\x02")
    for size in (2**31, 2**32 - 1):  # what the directory says of sizes, and of where an entry is
        for place in (20, 24, 42):
            for entry in (start, stored.index(b"PK\x01\x02", start + 1)):
                assert reader(stored[: entry + place] + struct.pack("<I", size) + stored[entry + place + 4 :]) is None
    assert reader.refused == len(bombs) + 12


def test_hostile_safetensors(reader):
    def content(header: str | bytes, data: bytes = bytes(8), length: int | None = None) -> bytes:
        header = header.encode() if isinstance(header, str) else header
        return struct.pack("<Q", len(header) if length is None else length) + header + data

    entry = '{{"a":{{"dtype":"{}","shape":{},"data_offsets":{}}}}}'.format
    good = content(entry("F32", "[2]", "[0,8]"))
    assert reader(good) is not None
    bad = [
        content(entry("F32", "[2]", "[0,8]"), length=2**62), content(entry("F32", "[2]", "[0,8]"), length=0),
        content(entry("F32", f"[{2**40}]", "[0,8]")), content(entry("F32", f"[{2**40},{2**40}]", "[0,8]")),
        content(entry("F32", "[2]", f"[0,{2**40}]")), content(entry("F32", "[-2]", "[0,8]")),
        content(entry("F99", "[2]", "[0,8]")),
        content("{" * 100_000), content("[" * 100_000), content(b"{\xff}"), content("{}"), content("null"), content(good + b"{"),
        content('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'),
        content('{"__metadata__":{"mmgen":"' + "[" * 100_000 + '"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'),
        content('{"__metadata__":{"mmgen":"{"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'),
    ]  # fmt: skip
    for content_ in bad:
        assert reader(content_) is None, content_[:100]


def test_the_watch_sees(tmp_path):
    """What these tests look for, they do see: a file opened by pickle, and memory that is taken."""
    path = write_edm_pickle(tmp_path / "a.pkl", {"model.b.weight": torch.ones(2)}, mark=tmp_path / "mark")
    with original_modules(), watched() as noted:
        pickle.loads(path.read_bytes())
    assert {event.split(" ")[0] for event in noted} >= {"pickle.find_class", "exec", "compile", "open"}


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_the_watch_limits_memory():
    """New memory beyond the limit is refused: asked of the system itself, as an allocator may have some left from before."""
    limited = "import mmap, resource; resource.setrlimit(resource.RLIMIT_AS, (2**30,) * 2); mmap.mmap(-1, 2**31)"
    if subprocess.run([sys.executable, "-c", limited], capture_output=True).returncode == 0:
        pytest.skip("this system does not limit the address space")
    with watched(), pytest.raises(OSError, match="[Cc]annot allocate"):
        mmap.mmap(-1, 2 * MEMORY)
