"""What `datasets` reads, with its errors as one sentence; and small tables of it read as a whole."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

_BUILDERS = {".csv": ("csv", {"keep_default_na": False}), ".jsonl": ("json", {}), ".parquet": ("parquet", {})}


@contextlib.contextmanager
def readable(path: str | os.PathLike) -> Iterator[None]:
    """Turns what Arrow and `datasets` raise about a damaged file into one sentence, and keeps them from logging it."""
    import datasets

    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # ArrowInvalid, ArrowTypeError, OSError, ValueError, KeyError: their lists are long
        # a folder, or a file that cannot be opened, is no pointer: the first error says what is wrong
        with contextlib.suppress(OSError), open(path, "rb") as file:
            if file.read(23) == b"version https://git-lfs":
                raise DataError(f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull`") from error
        reason = str(error).strip().split("\n")[0]
        raise DataError(f"cannot read {path} (is the download complete?): {reason}") from error
    finally:
        datasets.logging.set_verbosity(verbosity)


def read_rows(name: str, content: bytes, called: str) -> pa.Table:
    """All rows of a .jsonl, .csv or .parquet file. Raises DataError."""
    import datasets
    import pyarrow as pa

    suffix = Path(name).suffix.lower()
    builder, options = _BUILDERS[suffix]
    with readable(called), tempfile.TemporaryDirectory(prefix="mmgen-") as folder:
        file = Path(folder) / f"rows{suffix}"
        file.write_bytes(content)
        stream = datasets.load_dataset(
            builder, data_files={"train": str(file)}, split="train", streaming=True, cache_dir=folder, **options
        )
        tables = list(stream.with_format("arrow").iter(batch_size=1 << 16))
        if not tables:
            raise DataError(f"{called} has no rows")
        return pa.concat_tables(tables, promote_options="default")
