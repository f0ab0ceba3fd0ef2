"""Pickles of arrays, for tests."""

from __future__ import annotations

import io
import pickle
import struct

import numpy as np
import pytest

from mmgen.errors import DataError
from mmgen.formats.safe_arrays import load_arrays

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
BLOCK = np.random.default_rng(0).normal(size=(3, 4, 5))


def opened(content: bytes):
    return load_arrays(io.BytesIO(content))


def refusal(content: bytes) -> str:
    with pytest.raises(DataError) as error:
        opened(content)
    message = str(error.value)
    assert "\n" not in message and message.startswith("the file ")
    return message


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value.encode())]) + value.encode()


DTYPE = b"cnumpy\ndtype\n"
F8 = DTYPE + b"(" + text("f8") + b"tR(K\x03" + text("<") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
BUFFER = b"cnumpy.core.numeric\n_frombuffer\n"


def of_bytes(data: bytes, shape: bytes, order: bytes = text("C"), dtype: bytes = F8) -> bytes:
    return b"\x80\x05" + BUFFER + b"(C" + bytes([len(data)]) + data + dtype + shape + order + b"tR."


def blank(state: bytes) -> bytes:
    return b"\x80\x04cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R" + state + b"b."


HUGE = b"\x8a\x08" + struct.pack("<q", 2**60)
