"""Images in the tables of `datasets`: parquet files, .arrow files, and folders written by save_to_disk.

Parquet is read directly, a row group at a time: `datasets` would first copy all of it into its own cache.
"""

from __future__ import annotations

import bisect
import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DataError
from ..system.files import read_json
from .columns import Column, choose_image, choose_label, columns_of
from .image_source import MISSING, CorruptImage, ImageSource, checked_labels, fingerprint, summary
from .splits import canonical, no_split, parts_missing, select_split
from .walk import Found, Listing

if TYPE_CHECKING:
    import datasets
    import pyarrow


def open_parquet(
    listing: Listing, files: list[Found], split: str | None, image_column: str | None, label_column: str | None
) -> ImageSource:
    """Parquet files of one data set. `split` None takes all the files. Raises DataError."""
    import pyarrow.parquet as pq

    place = str(listing.folder / files[0].name if split is None else listing.folder)
    if split is not None:
        chosen = set(select_split([f.name for f in files], split, place))
        files = [f for f in files if f.name in chosen]
    paths = [listing.folder / f.name for f in files]
    metadata = []
    for path in paths:
        with _readable(path):
            metadata.append(pq.read_metadata(path))
    columns = columns_of(metadata[0].schema.to_arrow_schema())
    image = choose_image(columns, image_column, place)
    label = choose_label(columns, label_column, place)
    for path, other in zip(paths, metadata):
        _check_same_columns(path, columns_of(other.schema.to_arrow_schema()), paths[0], image, label)
    rows = _RowGroups(paths, metadata, image.name)

    def name(i: int) -> str:
        file, row = rows.locate(i)
        return f"row {row} of {files[file].name}"

    def read(i: int) -> bytes:
        file, _ = rows.locate(i)
        return _encoded(rows.value(i), paths[file].parent)

    labels = [_label_column(path, label.name) for path in paths] if label else None
    notes = [] if split is None else [f"split {canonical(split)}"]
    if missing := parts_missing(f.name for f in files):
        notes.append(f"{missing:,} of its {missing + len(files):,} files are not there")
    chosen_columns = {"image": image.name, "label": label and label.name}
    identity = fingerprint("parquet", listing.identity(files), split=split, **chosen_columns)
    return _table_source("parquet", rows.length, name, read, image, label, labels, notes, identity, place)


def open_saved(folder: Path, split: str, image_column: str | None, label_column: str | None) -> ImageSource:
    """A folder written by Dataset.save_to_disk or DatasetDict.save_to_disk. Raises DataError."""
    import datasets

    chosen, place = folder, str(folder)
    if (folder / "dataset_dict.json").is_file():
        with _readable(folder / "dataset_dict.json"):
            names = read_json(folder / "dataset_dict.json")["splits"]
        by_split = {canonical(name): name for name in names}
        if canonical(split) not in by_split:
            raise no_split(place, split, names)
        chosen = folder / Path(by_split[canonical(split)]).name  # .name: the file must not lead elsewhere
    with _readable(chosen):
        table = datasets.load_from_disk(str(chosen))
    if chosen == folder and canonical(split) not in ("train", canonical(str(table.split))):
        raise no_split(place, split, ["train" if table.split is None else str(table.split)])
    files = sorted(p for p in chosen.iterdir() if p.is_file())
    return _open_table("save_to_disk folder", table, files, chosen, split, image_column, label_column)


def open_arrow(
    listing: Listing, files: list[Found], split: str | None, image_column: str | None, label_column: str | None
) -> ImageSource:
    """.arrow files such as `datasets` keeps in its cache. `split` None takes all the files. Raises DataError."""
    import datasets

    place = listing.folder / files[0].name if split is None else listing.folder
    if split is not None:
        chosen = set(select_split([f.name for f in files], split, str(place)))
        files = [f for f in files if f.name in chosen]
    tables = []
    for file in files:
        with _readable(listing.folder / file.name):
            tables.append(datasets.Dataset.from_file(str(listing.folder / file.name)))
    with _readable(place):
        table = datasets.concatenate_datasets(tables)
    paths = [listing.folder / f.name for f in files]
    return _open_table("arrow", table, paths, place, split, image_column, label_column)


def _open_table(
    layout: str,
    table: datasets.Dataset,
    files: list[Path],
    place: Path,
    split: str | None,
    image_column: str | None,
    label_column: str | None,
) -> ImageSource:
    import datasets

    table = table.with_format(None)
    columns = columns_of(table.features.arrow_schema)
    image = choose_image(columns, image_column, str(place))
    label = choose_label(columns, label_column, str(place))
    images = table.select_columns([image.name])
    if image.kind == "image":  # decoded here, not there, so that a corrupt image can be named
        images = images.cast_column(image.name, datasets.Image(decode=False))

    def read(i: int) -> bytes:
        return _encoded(images[i][image.name], place if place.is_dir() else place.parent)

    labels = None
    if label:
        values = table.select_columns([label.name]).with_format("arrow")[:]
        labels = [_integers(values.column(label.name))]
    identity = fingerprint(
        layout,
        [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files],
        image=image.name,
        label=label and label.name,
        split=split,
    )
    notes = [] if table.split is None else [f"split {table.split}"]
    name = f"row {{}} of {place.name}".format
    return _table_source(layout, len(table), name, read, image, label, labels, notes, identity, str(place))


def _table_source(
    layout: str,
    length: int,
    name: Callable[[int], str],
    read: Callable[[int], bytes],
    image: Column,
    label: Column | None,
    labels: list[np.ndarray] | None,
    notes: list[str],
    identity: str,
    place: str,
) -> ImageSource:
    if length == 0:
        raise DataError(f"{place} has no rows")
    values, class_names = None, None
    if label is not None and labels is not None:
        try:
            values, class_names = checked_labels(np.concatenate(labels), label.class_names, name)
        except DataError as error:
            raise DataError(f"{place}, column {label.name}: {error}") from error
        notes = [f"labels from column {label.name}", *notes]
    notes = [f"images from column {image.name}", *notes]
    return ImageSource(
        description=summary(layout, length, values, class_names, *notes),
        names=name,
        length=length,
        read=read,
        labels=values,
        class_names=class_names,
        fingerprint=identity,
    )


class _RowGroups:
    """One column of many parquet files, row by row, with the last two row groups in memory. Threads may share it."""

    def __init__(self, paths: list[Path], metadata: list[Any], column: str):
        self.paths, self.metadata, self.column = paths, metadata, column
        self.groups = [(f, g) for f, m in enumerate(metadata) for g in range(m.num_row_groups)]
        sizes = [metadata[f].row_group(g).num_rows for f, g in self.groups]
        self.starts = np.cumsum([0, *sizes]).tolist()  # first row of each group, and the end
        self.first_of_file = np.cumsum([0, *(m.num_rows for m in metadata)]).tolist()
        self.length = self.starts[-1]
        self.recent: OrderedDict[int, pyarrow.ChunkedArray] = OrderedDict()
        self.lock = threading.Lock()

    def locate(self, i: int) -> tuple[int, int]:
        """(which file, which row in it)"""
        file = bisect.bisect_right(self.first_of_file, i) - 1
        return file, i - self.first_of_file[file]

    def value(self, i: int) -> Any:
        group = bisect.bisect_right(self.starts, i) - 1
        with self.lock:
            if group not in self.recent:
                while len(self.recent) > 1:
                    self.recent.popitem(last=False)
                self.recent[group] = self._load(group)
            rows = self.recent[group]
        return rows[i - self.starts[group]].as_py()

    def _load(self, group: int) -> pyarrow.ChunkedArray:
        import pyarrow.parquet as pq

        file, index = self.groups[group]
        with _readable(self.paths[file]), pq.ParquetFile(self.paths[file], metadata=self.metadata[file]) as parquet:
            return parquet.read_row_group(index, columns=[self.column], use_threads=False).column(self.column)


def _encoded(value: Any, folder: Path) -> bytes:
    """The bytes of a cell: bytes, or {"bytes", "path"} as the Image feature keeps them. Raises CorruptImage."""
    if isinstance(value, dict):
        if value.get("bytes") is None and value.get("path"):
            return _read_path(value["path"], folder)
        value = value.get("bytes")
    if value is None:
        raise CorruptImage("the cell is empty")
    if not isinstance(value, bytes):
        raise CorruptImage(f"the cell holds {type(value).__name__}, not an encoded image")
    return value


def _read_path(path: str, folder: Path) -> bytes:
    if "://" in path:
        raise CorruptImage(f"the cell holds only an address, {path}, which mmgen does not fetch")
    try:
        return (folder / path).read_bytes()  # an absolute path stays itself
    except OSError as error:
        raise CorruptImage(f"the cell holds only the path {path}: {error.strerror or error}") from error


def _label_column(path: Path, column: str) -> np.ndarray:
    import pyarrow.parquet as pq

    with _readable(path), pq.ParquetFile(path) as parquet:
        return _integers(parquet.read(columns=[column]).column(column))


def _integers(column: pyarrow.ChunkedArray) -> np.ndarray:
    """An Arrow column of integers -> int64 [N]; null becomes MISSING."""
    import pyarrow.compute as pc

    return pc.fill_null(column.cast("int64"), MISSING).to_numpy().astype(np.int64)


def _check_same_columns(path: Path, columns: list[Column], first: Path, image: Column, label: Column | None) -> None:
    for wanted in filter(None, (image, label)):
        if not any((c.name, c.kind, c.class_names) == (wanted.name, wanted.kind, wanted.class_names) for c in columns):
            raise DataError(f"column {wanted.name!r} of {path} differs from {first}: not parts of one data set")


@contextlib.contextmanager
def _readable(path: str | os.PathLike) -> Iterator[None]:
    """Turns what Arrow and `datasets` raise about a damaged file into one sentence."""
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
