"""Crafted files as checkpoints: pickles, zips and safetensors that lie."""

# ruff: noqa: F811 (fixtures are imported)

from __future__ import annotations

import io
import mmap
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzz_tools import MEMORY, reader, watched  # noqa: F401
from original_files import (
    Persistent,
    original_modules,
    write_edm_pickle,
)
from test_safe_pickle import Calls, inner_bytes, number, storage_file, tensor_file

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:invalid escape sequence")]  # of pickletools, about the content


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
