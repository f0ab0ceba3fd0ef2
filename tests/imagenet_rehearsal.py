"""ImageNet's 1,281,167 rows rehearsed: parquet with as many rows and row groups as the hub's, of tiny images, through the cache.

    python -m tests.imagenet_rehearsal [ROWS] [FOLDER]

Prints rows, seconds, and how much memory the process has taken while the stream went on: it must not grow with the rows.
"""

from __future__ import annotations

import io
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

ROWS, FILES, GROUP = 1_281_167, 294, 100


def write_rows(folder: Path, rows: int, files: int) -> None:
    """Parquet as the hub has ImageNet: `image` with bytes and path, `label`, row groups of 100. Image i has the colour of i."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    each = -(-rows // files)
    for number in range(files):
        images = []
        for i in range(number * each, min((number + 1) * each, rows)):
            file = io.BytesIO()
            Image.new("RGB", (4, 4), (i % 256, i // 256 % 256, i // 65536)).save(file, "BMP")
            images.append({"bytes": file.getvalue(), "path": f"{i}.bmp"})
        labels = np.arange(number * each, number * each + len(images)) % 1000
        table = pa.table({"image": images, "label": labels})
        pq.write_table(table, folder / f"train-{number:05d}-of-{files:05d}.parquet", row_group_size=GROUP)


def rehearse(folder: Path, cache: Path) -> tuple[int, float, list[int]]:
    """(rows, seconds, memory in bytes after each tenth of the images) of decoding all of them. Raises AssertionError."""
    from mmgen import data

    memory, process = [], psutil.Process()

    def progress(done: int, total: int) -> None:
        if done * 10 // total > len(memory) - 1:
            memory.append(process.memory_info().rss - shared(process))
            print(f"{done:,} of {total:,} rows: {memory[-1] >> 20:,} MB, {time.monotonic() - start:,.0f} s", flush=True)

    start = time.monotonic()
    found = data.load(str(folder), cache_dir=cache, progress=progress)
    seconds = time.monotonic() - start
    rows = np.unique(np.linspace(0, len(found) - 1, 1000).astype(int))
    assert (found.images[rows][:, :, 0, 0] == np.stack([rows % 256, rows // 256 % 256, rows // 65536], 1)).all()
    assert (found.labels == np.arange(len(found)) % 1000).all()
    return len(found), seconds, memory


def shared(process: psutil.Process) -> int:
    """Bytes of mapped files, which the system takes back when it needs them."""
    return getattr(process.memory_info(), "shared", 0)


def main() -> None:
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else ROWS
    with tempfile.TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else None) as place:
        folder = Path(place) / "data"
        folder.mkdir()
        write_rows(folder, rows, max(1, rows * FILES // ROWS))
        length, seconds, memory = rehearse(folder, Path(place) / "cache")
    print(f"{length:,} rows in {seconds:,.0f} s; memory in MB after each tenth: {[m >> 20 for m in memory]}")
    print(f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10:,} MB, {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
