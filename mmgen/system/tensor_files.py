"""Writing arrays so that a full disk is an OSError, as of any other file: the libraries raise errors of their own, or none."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

import numpy as np
from torch import Tensor


def save_array(path: str | os.PathLike, array: np.ndarray) -> None:
    """What numpy.save writes, byte for byte. That does not look whether the last 4 KiB reached the disk. Raises OSError."""
    array = np.ascontiguousarray(array)
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.reshape(-1).view(np.uint8))


def save_tensors(tensors: Mapping[str, Tensor], path: str | os.PathLike, metadata: dict[str, str] | None = None) -> None:
    """A .safetensors file. The tensors are contiguous and share no memory. Raises OSError where it cannot be written."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path, metadata=metadata)
    except SafetensorError as error:
        if "i/o error" not in str(error).lower() and "ioerror" not in str(error).lower():
            raise  # not the disk's fault
        raise _system_error(str(error)) from error


def save_torch(content: object, path: str | os.PathLike) -> None:
    """A file of torch.save. Raises OSError where it cannot be written."""
    import torch

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


def _system_error(text: str) -> OSError:
    """The OSError whose number a text of Rust's names: "No space left on device (os error 28)", "Os { code: 28, ...".

    >>> _system_error("Error while serializing: I/O error: File too large (os error 27)").strerror
    'File too large'
    """
    found = re.search(r"(?:os error|code:) (\d+)", text)
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else OSError(text)
