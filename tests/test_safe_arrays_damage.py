"""Pickles of arrays that are damaged, too large or something else: each is refused in one sentence."""

from __future__ import annotations

import io
import pickle
import struct

import numpy as np
import pytest
from pickled_arrays import BLOCK, BUFFER, DTYPE, F8, HUGE, PROTOCOLS, blank, of_bytes, opened, refusal, text

import mmgen.formats.safe_arrays as safe_arrays
from mmgen.errors import DataError
from mmgen.formats.safe_arrays import load_arrays, mistaken_download

EIGHT = struct.pack("<d", 1)
DAMAGES = {
    "shape too large": of_bytes(EIGHT, b"K\x02\x85"),
    "shape too small": of_bytes(EIGHT * 2, b"K\x01\x85"),
    "huge shape": of_bytes(EIGHT, HUGE + b"\x85"),
    "huge empty shape": of_bytes(b"", b"K\x00" + HUGE + b"\x86"),
    "large empty shape": of_bytes(b"", b"(K\x00" + b"J\xff\xff\xff\x7f" * 3 + b"t"),
    "negative shape": of_bytes(EIGHT, b"J\xff\xff\xff\xff\x85"),
    "two negatives": of_bytes(EIGHT, b"J\xff\xff\xff\xffJ\xff\xff\xff\xff\x86"),
    "shape of floats": of_bytes(EIGHT, b"G?\xf0\x00\x00\x00\x00\x00\x00\x85"),
    "shape of bools": of_bytes(EIGHT, b"\x88\x85"),
    "shape of a list": of_bytes(EIGHT, b"](K\x01e"),
    "too many axes": of_bytes(EIGHT, b"(" + b"K\x01" * 40 + b"t"),
    "unknown order": of_bytes(EIGHT, b"K\x01\x85", text("Q")),
    "order K without axes": of_bytes(EIGHT, b"K\x01\x85", text("K")),
    "axes out of range": of_bytes(EIGHT, b"K\x01\x85", text("K") + b"K\x07\x85"),
    "no dtype": of_bytes(EIGHT, b"K\x01\x85", dtype=text("f8")),
    "dtype without order": of_bytes(EIGHT, b"K\x01\x85", dtype=DTYPE + text("f8") + b"\x85R"),
    "dtype code is a tuple": b"\x80\x04" + DTYPE + b")" + b"\x85" * 500_000 + b"\x85R.",  # hashing it would overflow the stack
    "key is a tuple": b"\x80\x04})" + b"\x85" * 500_000 + b"Ns.",
    "key is a list": b"}]Ns.",
    "array never filled": blank(b"")[:-2] + b".",
    "name alone": b"cnumpy\nndarray\n.",
    "dtype alone": b"\x80\x04" + F8 + b".",
    "text beyond latin-1": b"\x80\x04c_codecs\nencode\n" + text("ł") + text("latin1") + b"\x86R.",
    "wrong number of arguments": b"c_codecs\nencode\n)R.",
    "empty stack": b".",
    "mark never closed": b"(N.",
    "taken from below a mark": b"N(\x85.",
    "left over": b"NN.",
    "unknown memo": b"\x80\x02h\x05.",
    "appends to a tuple": b")Na.",
    "sets in a list": b"]NNs.",
    "odd dict": b"(NNNd.",
    "unknown instruction": b"\xff\xff.",
    "text": b"mu sigma 1 2 3\n",
    "a declared length of a terabyte": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x.",
    "bytes of a terabyte": b"\x80\x05\x8e" + struct.pack("<Q", 2**40) + b"x.",
    "a negative length": b"T\xff\xff\xff\xff.",
    "memo far away": b"\x80\x02Nr\xff\xff\xff\xff0.",
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_has_one_sentence(name):
    message = refusal(DAMAGES[name])
    assert "fetch it again" in message or "not opened" in message


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_shortened_file_is_refused(protocol):
    content = pickle.dumps({"num_images": 5, "fid": {"mu": np.arange(3.0), "sigma": np.eye(3)}}, protocol)
    for stop in range(1, len(content)):
        refusal(content[:stop])


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_random_damage_never_escapes(protocol):
    content = pickle.dumps({"num_images": 5, "fid": {"mu": np.arange(3.0), "sigma": np.eye(3)}, "l": [1.5, "x"]}, protocol)
    random, refused = np.random.default_rng(protocol), 0
    for _ in range(400):
        broken = bytearray(content)
        for place in random.integers(len(content), size=random.integers(1, 4)):
            broken[place] = random.integers(256)
        try:
            opened(bytes(broken))
        except DataError as error:
            refused += 1
            assert "\n" not in str(error)
    assert 40 < refused < 400  # what hits a number only is read


def test_a_small_file_cannot_become_large(monkeypatch):
    big = "a" * 100_000
    bomb = b"\x80\x04c_codecs\nencode\n\x94X" + struct.pack("<I", len(big)) + big.encode() + b"\x94" + text("latin1") + b"\x94("
    bomb += b"h\x00h\x01h\x02\x86R" * 50 + b"l."
    assert "far larger" in refusal(bomb)
    arrays = b"\x80\x05](" + BUFFER + b"\x94B" + struct.pack("<I", 80_000) + bytes(80_000) + b"\x94" + F8 + b"\x94"
    arrays += (b"h\x00(h\x01h\x02\x8a\x03\x10\x27\x00\x85" + text("C") + b"tR") * 50 + b"e."
    assert "far larger" in refusal(arrays)
    monkeypatch.setattr(safe_arrays, "_LONGEST", 1000)
    assert "a million parts" in refusal(b"]" + b"Na" * 1000 + b".")


def test_shared_parts_are_visited_once():
    value: list = []
    for _ in range(30):  # 2^30 lists if each were opened anew
        value = [value, value]
    got = opened(pickle.dumps(value))
    assert got[0] is got[1]


def test_a_file_that_is_too_large(monkeypatch, tmp_path):
    monkeypatch.setattr(safe_arrays, "_LARGEST", 1000)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(bytes(1000)))
    for source in (tmp_path / "a.pkl", io.BytesIO(pickle.dumps(bytes(1000)))):
        with pytest.raises(DataError, match="is larger than"):
            load_arrays(source)


@pytest.mark.parametrize(
    "content, part",
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 41963912\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html><body>404</body></html>", "web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "web page"),
        (b"PK\x03\x04\x14\x00\x00\x00", "npz"),
    ],
)
def test_what_a_failed_download_leaves(content, part):
    assert part in refusal(content)


def test_a_pickle_is_no_mistaken_download():
    assert mistaken_download(pickle.dumps({"mu": BLOCK})) is None and mistaken_download(b"PK\x03\x04") is None
