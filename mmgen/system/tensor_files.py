"""Writing arrays so that a full disk is an OSError, as of any other file: the libraries raise errors of their own, or none."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

_DTYPES = {  # in the format's order: tensors of the largest numbers come first in a file, so that all are aligned
    torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16",
    torch.float16: "F16", torch.int16: "I16", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def save_array(path: str | os.PathLike, array: np.ndarray) -> None:
    """What numpy.save writes, byte for byte. That does not look whether the last 4 KiB reached the disk. Raises OSError."""
    array = np.ascontiguousarray(array)
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.reshape(-1).view(np.uint8))


def save_tensors(tensors: Mapping[str, Tensor], path: str | os.PathLike, metadata: dict[str, str] | None = None) -> None:
    """A .safetensors file, written into the file at `path` where there is one. Raises OSError where it cannot be written.

    safetensors.torch.save_file, which writes the same bytes, renames a file of its own: mode 0600, and whoever holds the lock of
    the file at `path` loses it. Its other function needs the memory for all tensors once more.
    """
    rank = {dtype: number for number, dtype in enumerate(_DTYPES)}
    order = sorted(tensors, key=lambda name: (rank[tensors[name].dtype], name))
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].nbytes
        header[name] = {"dtype": _DTYPES[tensors[name].dtype], "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def save_torch(content: object, path: str | os.PathLike) -> None:
    """A file of torch.save. Raises OSError where it cannot be written."""
    with open(path, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # the OSError is what it stumbled over on its way out
            cause = error.__cause__ or error.__context__
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            if cause is None:
                raise
            raise OSError(cause.errno, cause.strerror) from error
