"""The field's file of samples: an npz whose `arr_0` is uint8 [N, H, W, C], read a block at a time."""

from __future__ import annotations

import threading
import zipfile
import zlib
from pathlib import Path
from typing import IO

import numpy as np

from ..data.decode import MAX_PIXELS
from ..errors import DataError, shortened

MEMBER = "arr_0.npy"
_DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError, OSError)  # RuntimeError: encrypted


class NpzImages:
    """`arr_0` of an npz file, compressed or not: `read(start, stop)` gives uint8 [n, C, H, W].

    Only the block asked for is in memory. Reading forwards is fast; to read backwards, the file is opened anew.

    Attributes:
        length: N.
        shape: (C, H, W), C 1 or 3.
    """

    def __init__(self, path: Path) -> None:
        """Raises DataError where the file is damaged, or its `arr_0` is not images."""
        self.path = path
        self._lock = threading.Lock()
        self._stream: IO[bytes] | None = None
        self._position = 0
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
                if MEMBER not in names:
                    found = ", ".join(n.removesuffix(".npy") for n in names[:6]) or "nothing"
                    raise DataError(f"{path} holds {found}, but no arr_0: save the images as arr_0, uint8 [N, H, W, C]")
                held = archive.getinfo(MEMBER).file_size
            shape = self._open()
        except _DAMAGED as error:
            raise self._damaged(error) from error
        self.length, height, width, channels = shape
        if min(shape) < 1:
            raise DataError(f"{path} holds no images: its arr_0 is empty, of shape {shortened(list(shape))}")
        if height * width > MAX_PIXELS:
            raise DataError(
                f"{path} holds images of {width} x {height} pixels, more than the {MAX_PIXELS:,} that are safe to open"
            )
        self.shape = (channels, height, width)
        self._size = height * width * channels
        if self.length * self._size > held:  # before anyone plans for so many
            raise self._damaged(EOFError(f"its arr_0 is of shape {shortened(list(shape))}, and holds {held:,} bytes"))

    def read(self, start: int, stop: int) -> np.ndarray:
        """Images start to stop - 1, uint8 [n, C, H, W]. Raises DataError where the file is damaged."""
        channels, height, width = self.shape
        with self._lock:
            try:
                if self._stream is None or start < self._position:
                    self._open()
                while self._position < start:  # read and thrown away: a seek would do the same
                    self._take(min(start, self._position + 1024))
                data = self._take(stop)
            except _DAMAGED as error:
                raise self._damaged(error) from error
        return np.frombuffer(data, np.uint8).reshape(-1, height, width, channels).transpose(0, 3, 1, 2)

    def _take(self, stop: int) -> bytes:
        count = (stop - self._position) * self._size
        data = self._stream.read(count)
        if len(data) != count:
            raise EOFError("it ends early")
        self._position = stop
        return data

    def _open(self) -> tuple[int, int, int, int]:
        """Puts the stream at the first pixel; returns (N, H, W, C)."""
        if self._stream is not None:
            self._stream.close()
        self._stream = zipfile.ZipFile(self.path).open(MEMBER)
        self._position = 0
        version = np.lib.format.read_magic(self._stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(self._stream)
        if dtype.hasobject or dtype != np.uint8 or fortran:
            raise DataError(f"arr_0 of {self.path} is {dtype}{', in Fortran order' * fortran}: save uint8 0..255, [N, H, W, C]")
        if len(shape) == 3:
            shape = (*shape, 1)
        if len(shape) != 4 or shape[3] not in (1, 3):
            raise DataError(f"arr_0 of {self.path} has the shape {shortened(list(shape))}, not [N, H, W, 3] or [N, H, W, 1]")
        return shape

    def _damaged(self, error: Exception) -> DataError:
        return DataError(f"{self.path} is damaged or no npz file ({shortened(error, 200)}): make or fetch it again")
