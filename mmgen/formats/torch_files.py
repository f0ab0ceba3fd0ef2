"""Files of torch.save and of pickle, by their content: opened without `torch.load` or `pickle`, through `safe_pickle` only."""

from __future__ import annotations

import contextlib
import io
import mmap
import os
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ModelError
from .safe_arrays import Damaged, mistaken_download
from .safe_pickle import Storage, TorchMachine, read_legacy

_LARGEST_PROGRAM = 256 * 1024**2  # bytes of the pickle within a zip, which holds no weights
_OTHER_FORMATS = [  # first bytes -> what it is
    (b"GGUF", "a GGUF file"),
    (b"\x89HDF", "an HDF5 file (Keras)"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x1f\x8b", "a gzip archive: unpack it first; otherwise it is"),
    (b"\x08\x00\x12", "an ONNX file"),
]


@dataclass(frozen=True)
class Opened:
    """What a file holds: dicts, lists, numbers, `StoredTensor` and `Holder`."""

    container: str  # "torch .pt (zip)", "torch .pt (legacy)" or "pickle"
    value: Any


def damaged(path: str | os.PathLike) -> ModelError:
    return ModelError(f"{path} is damaged or cut short, or no file of weights: fetch it again")


@contextlib.contextmanager
def opened(path: str | os.PathLike) -> Iterator[Opened]:
    """Opens a .pt, .pth, .bin, .ckpt or .pkl file. Its tensors can be read with `materialise` within the block.

    Raises ModelError, with one sentence, for anything that could run code, for other formats, and for damaged files.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(1024)
            refuse_other_formats(path, head)
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error
    with content:
        yield _parse(path, head, content)


def _parse(path: str | os.PathLike, head: bytes, content: mmap.mmap) -> Opened:
    try:
        if head.startswith(b"PK\x03\x04"):
            return Opened("torch .pt (zip)", _zip(str(path), content))
        if b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19" in head[:14]:
            return Opened("torch .pt (legacy)", read_legacy(TorchMachine(str(path), len(content)), content, content))
        return Opened("pickle", TorchMachine(str(path), len(content)).run(content))
    except (ValueError, TypeError, IndexError, KeyError, OverflowError, struct.error, UnicodeError, zipfile.BadZipFile) as error:
        raise damaged(path) from error
    except (NotImplementedError, RuntimeError, EOFError, OSError) as error:  # of zipfile: encrypted, odd versions and places
        raise damaged(path) from error


def refuse_other_formats(path: str | os.PathLike, head: bytes) -> None:
    """Raises ModelError where the first bytes are those of something that is no file of weights of this field."""
    if mistake := mistaken_download(head):
        raise ModelError(f"{path} {mistake}")
    onnx = len(head) > 4 and head[0] == 8 and head[1] < 32 and (head[2] == 0x12 or Path(path).suffix == ".onnx")
    for start, what in _OTHER_FORMATS:
        if head.startswith(start):
            raise ModelError(f"{path} is {what}, not a format of this field: give a .safetensors, .pt or .pkl file")
    if onnx:
        raise ModelError(f"{path} is an ONNX file, not a format of this field: give a .safetensors, .pt or .pkl file")


def _zip(path: str, content: mmap.mmap) -> Any:
    with zipfile.ZipFile(_View(content)) as archive:
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        if len(set(names)) != len(names):
            raise ModelError(f"{path} holds two entries of the same name: not opened")
        programs = [name for name in names if name.split("/")[1:] == ["data.pkl"]]
        if any(name.split("/")[1:2] == ["code"] or name.endswith("/constants.pkl") for name in names):
            raise ModelError(f"{path} is a TorchScript program, not weights: give the checkpoint that it was made from")
        if not programs and any(name.endswith(".npy") for name in names):
            raise ModelError(f"{path} is a NumPy .npz archive, which holds no network: give a .safetensors, .pt or .pkl file")
        if len(programs) != 1:
            raise ModelError(f"{path} is a zip archive, but none of torch.save: unpack it, and give the file of weights in it")
        if any(entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size for entry in entries):
            raise ModelError(f"{path} has compressed entries, which torch.save never writes: not opened")
        if sum(entry.file_size for entry in entries) > len(content):
            raise ModelError(f"{path} declares more bytes than it has: not opened")
        folder, by_name = programs[0].split("/")[0], {entry.filename: entry for entry in entries}
        if f"{folder}/byteorder" in by_name and archive.read(f"{folder}/byteorder") != b"little":
            raise ModelError(f"{path} was saved on a big-endian machine: not opened")
        if by_name[programs[0]].file_size > _LARGEST_PROGRAM:
            raise ModelError(f"{path} has a pickle larger than any that names weights: not opened")
        program = archive.read(programs[0])

        def find(key: str, storage: Storage) -> None:
            entry = by_name[f"{folder}/data/{key}"]
            if entry.file_size != storage.nbytes:
                raise Damaged("a storage and its entry differ in size")
            start = entry.header_offset
            magic, name_length, extra_length = struct.unpack("<4s22xHH", content[start : start + 30])
            if magic != b"PK\x03\x04":
                raise Damaged("no entry where one should be")
            storage.place(content, start + 30 + name_length + extra_length, len(content))
            storage.checksum = entry.CRC

        return TorchMachine(path, len(content), find).run(io.BytesIO(program))


class _View:
    """A mapped file as the file that zipfile wants, whose `close` leaves the mapping open."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content, self.position = content, 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = 0) -> int:
        position = offset + (0, self.position, len(self.content))[whence]
        if position < 0:
            raise OSError("before the start")
        self.position = position
        return position

    def read(self, size: int = -1) -> bytes:
        stop = len(self.content) if size is None or size < 0 else min(len(self.content), self.position + size)
        data = self.content[self.position : stop]
        self.position += len(data)
        return data
