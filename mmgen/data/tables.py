"""Images in tables, by `datasets`: parquet files, .arrow files, and folders of save_to_disk.

Parquet is streamed, so that no second copy is written; the others are mapped into memory. Images stay encoded, for the one
decoder. What the columns are comes from the files' own schema, which is trusted with nothing but names and types.
"""

from __future__ import annotations

import bisect
import glob
import itertools
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DataError
from ..system.files import read_json
from .captions import captions_of
from .columns import Column, choose_caption, choose_image, choose_label, columns_of, label_notes
from .image_source import MISSING, CorruptImage, ImageSource, Reading, checked_labels, fingerprint, identity, summary
from .labels import Labels, NotClasses, classes_of
from .rows import readable
from .splits import canonical, no_split, parts_missing

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

_AHEAD = 256  # rows that a stream that is begun anew starts before the one asked for: threads ask for it and its neighbours
_AT_ONCE = 16  # rows that are read together
_MOST_RECENT, _MOST_ROWS = 1 << 27, 1 << 12  # bytes and number of encoded images that are kept, beyond the last _AHEAD


@dataclass(frozen=True)
class _Table:
    layout: str
    path: Path  # for messages
    folder: Path  # that paths in cells start from
    schema: pa.Schema
    length: int
    cells: Callable[[str], Callable[[int], Any]]  # of an image column: row -> cell; safe to call from threads
    column: Callable[[str], pa.ChunkedArray]  # all values of another column
    row_name: Callable[[int], str]
    files: list[Path]
    notes: list[str]


def open_parquet(folder: Path, names: list[str], source: Path, notes: list[str], reading: Reading) -> ImageSource:
    """Parquet files of one data set, in this order. Raises DataError."""
    import pyarrow.parquet as pq

    paths, metadata = [folder / name for name in names], []
    for path in paths:
        with readable(path):
            metadata.append(pq.read_metadata(path))
    schema = metadata[0].schema.to_arrow_schema()
    starts = np.cumsum([0, *(one.num_rows for one in metadata)]).tolist()

    def row_name(i: int) -> str:
        file = bisect.bisect_right(starts, i) - 1
        return f"row {i - starts[file]} of {names[file]}"

    def cells(name: str) -> Callable[[int], Any]:
        check(name)
        groups = [[one.row_group(g).num_rows for g in range(one.num_row_groups)] for one in metadata]
        return _Rows(lambda: _stream(paths, schema, name, image=True), paths, groups, name).cell

    def column(name: str) -> pa.ChunkedArray:
        import pyarrow as pa

        check(name)
        with readable(source):
            batches = _stream(paths, schema, name).with_format("arrow").iter(batch_size=1 << 16)
            return pa.chunked_array([chunk for batch in batches for chunk in batch.column(name).chunks])

    def check(name: str) -> None:
        wanted = next(column for column in columns_of(schema) if column.name == name)
        for path, one in zip(paths[1:], metadata[1:]):
            if wanted not in columns_of(one.schema.to_arrow_schema()):
                raise DataError(f"column {name!r} of {path} differs from {paths[0]}: not parts of one data set")

    if missing := parts_missing(names):
        notes = [*notes, f"{missing:,} of its {missing + len(names):,} files are not there"]
    table = _Table("parquet", source, folder, schema, starts[-1], cells, column, row_name, paths, notes)
    return _source(table, reading)


def _stream(paths: list[Path], schema: pa.Schema, name: str, image: bool = False) -> datasets.IterableDataset:
    """One column of parquet files, as a stream in which each file is a shard."""
    import datasets
    import pyarrow as pa

    feature = datasets.Image(decode=False) if image else None
    with readable(paths[0]), tempfile.TemporaryDirectory(prefix="mmgen-") as nothing:  # it leaves a lock file
        feature = feature or datasets.Features.from_arrow_schema(pa.schema([schema.field(name)]))[name]
        files = {"train": [glob.escape(str(path)) for path in paths]}
        return datasets.load_dataset(
            "parquet", data_files=files, split="train", streaming=True, columns=[name],
            features=datasets.Features({name: feature}), cache_dir=nothing,
        )  # fmt: skip


class _Rows:
    """An image column of a stream, row by row: read forward, and begun again at its row group where somebody goes elsewhere."""

    def __init__(
        self, open_stream: Callable[[], datasets.IterableDataset], paths: list[Path], groups: list[list[int]], column: str
    ):
        self.open_stream, self.paths, self.column = open_stream, paths, column
        self.groups = groups  # rows of each row group, of each file
        self.first = np.cumsum([0, *map(sum, groups)]).tolist()  # row of each file, and the end
        self.lock = threading.Lock()
        self.stream = self.file = None  # of all files; (its number, its stream, the first row of each part)
        self.part, self.next, self.rows = range(0), 0, iter(())  # where the stream stands
        self.recent: OrderedDict[int, Any] = OrderedDict()
        self.bytes = 0

    def cell(self, i: int) -> Any:
        with self.lock:
            if i not in self.recent:
                file = bisect.bisect_right(self.first, i) - 1
                with readable(self.paths[file]):
                    if i not in self.part or i < self.next:
                        self._begin(file, i)
                    self._read_to(i)
            return self.recent[i]

    def _begin(self, file: int, i: int) -> None:
        """Opens the row group of row i, or with a version of `datasets` that does not cut files, its file."""
        if self.stream is None:
            self.stream = self.open_stream()
        if self.file is None or self.file[0] != file:
            stream, sizes = self.stream.shard(num_shards=len(self.paths), index=file), self.groups[file]
            stream = stream.reshard() if hasattr(stream, "reshard") else stream
            sizes = sizes if stream.num_shards == len(sizes) else [sum(sizes)]
            self.file = file, stream, (self.first[file] + np.cumsum([0, *sizes])).tolist()
        _, stream, starts = self.file
        number = bisect.bisect_right(starts, i) - 1
        self.part = range(starts[number], starts[number + 1])
        begin = max(self.part.start, i - _AHEAD)
        if begin != self.next:
            self.recent.clear()
            self.bytes = 0
        self.next = begin
        self.rows = iter(stream.shard(num_shards=len(starts) - 1, index=number).skip(begin - self.part.start))

    def _read_to(self, i: int) -> None:
        """Row i and the few after it."""
        for row in itertools.islice(self.rows, min(i + _AT_ONCE, self.part.stop) - self.next):
            cell = self.recent[self.next] = row[self.column]
            self.next += 1
            self.bytes += _size(cell)
        while len(self.recent) > _AHEAD and (self.bytes > _MOST_RECENT or len(self.recent) > _MOST_ROWS):
            self.bytes -= _size(self.recent.popitem(last=False)[1])
        if self.next <= i:
            raise DataError(f"{self.paths[self.file[0]]} has fewer rows than it says (is the download complete?)")
        if self.next == self.part.stop:
            next(self.rows, None)  # so that it closes its file


def _size(cell: Any) -> int:
    return len(cell.get("bytes") or b"") if isinstance(cell, dict) else 0


def open_saved(folder: Path, reading: Reading) -> ImageSource:
    """A folder written by Dataset.save_to_disk or DatasetDict.save_to_disk. Raises DataError."""
    import datasets

    chosen, path, split = folder, str(folder), reading.split
    if (folder / "dataset_dict.json").is_file():
        with readable(folder / "dataset_dict.json"):
            names = read_json(folder / "dataset_dict.json")["splits"]
        by_split = {canonical(name): name for name in names}
        if canonical(split) not in by_split:
            raise no_split(path, split, names)
        chosen = folder / Path(by_split[canonical(split)]).name  # .name: the file must not lead elsewhere
    with readable(chosen):
        table = datasets.load_from_disk(str(chosen))
    if chosen == folder and canonical(split) not in ("train", canonical(str(table.split))):
        raise no_split(path, split, ["train" if table.split is None else str(table.split)])
    files = sorted(p for p in chosen.iterdir() if p.is_file())
    return _source(_mapped("save_to_disk folder", table, files, chosen), reading)


def open_arrow(folder: Path, names: list[str], source: Path, reading: Reading) -> ImageSource:
    """.arrow files such as `datasets` keeps in its cache. Raises DataError."""
    import datasets

    paths, tables = [folder / name for name in names], []
    for path in paths:
        with readable(path):
            tables.append(datasets.Dataset.from_file(str(path)))
    with readable(source):
        return _source(_mapped("arrow", datasets.concatenate_datasets(tables), paths, source), reading)


def _mapped(layout: str, table: datasets.Dataset, files: list[Path], path: Path) -> _Table:
    import datasets

    table = table.with_format(None)

    def cells(name: str) -> Callable[[int], Any]:
        images = table.select_columns([name])
        if isinstance(table.features[name], datasets.Image):  # decoded by mmgen, so that a corrupt image can be named
            images = images.cast_column(name, datasets.Image(decode=False))
        return lambda i: images[i][name]

    return _Table(
        layout, path, path if path.is_dir() else path.parent, table.features.arrow_schema, len(table), cells,
        lambda name: table.select_columns([name]).with_format("arrow")[:].column(name), f"row {{}} of {path.name}".format, files,
        [] if table.split is None else [f"split {table.split}"],
    )  # fmt: skip


def _source(table: _Table, reading: Reading) -> ImageSource:
    path, columns = str(table.path), columns_of(table.schema)
    if table.length == 0:
        raise DataError(f"{path} has no rows")
    if reading.captions is not None:
        raise DataError(f"--captions {reading.captions}: {path} is a table, whose captions are a column: --caption-column")
    image = choose_image(columns, reading.image_column, path)
    label = choose_label(columns, reading.label_column, path)
    caption = choose_caption(columns, reading.caption_column, path)
    cell = table.cells(image.name)
    notes = [f"images from column {image.name}"]
    labels, class_names = _labels(table, label, reading.label_column is not None, notes)
    if label is None:
        notes += label_notes(columns, caption)
    notes += [f"captions in column {caption.name}"] if caption else []
    chosen = {"image": image.name, "label": label and label.name, "caption": caption and caption.name, "split": reading.split}
    return ImageSource(
        description=summary(table.layout, table.length, labels, class_names, *notes, *table.notes),
        names=table.row_name,
        length=table.length,
        read=lambda i: _encoded(cell(i), table.folder),
        labels=labels,
        class_names=class_names,
        fingerprint=fingerprint(table.layout, identity(table.files), **chosen),
        captions=None if caption is None else lambda: captions_of(table.column(caption.name).to_pylist()),
    )


def _labels(table: _Table, label: Column | None, sure: bool, notes: list[str]) -> Labels | tuple[None, None]:
    """Labels and class names of a column; that it is no column of classes is noted, unless it was asked for."""
    if label is None:
        return None, None
    values, class_names = table.column(label.name), label.class_names
    try:
        if label.kind in ("class", "integer"):
            with readable(table.path):
                labels = _integers(values)
        else:
            labels, class_names = classes_of(values.to_pylist(), sure)
    except NotClasses as error:
        if sure:
            raise DataError(f"--label-column: column {label.name!r} of {table.path} holds no classes but {error}") from error
        notes.append(f"column {label.name} not taken as classes: {error}")
        return None, None
    notes.append(f"labels from column {label.name}")
    try:
        return checked_labels(labels, class_names, table.row_name)
    except DataError as error:
        raise DataError(f"{table.path}, column {label.name}: {error}") from error


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


def _integers(column: pa.ChunkedArray) -> np.ndarray:
    """An Arrow column of integers -> int64 [N]; null becomes MISSING."""
    import pyarrow.compute as pc

    return pc.fill_null(column.cast("int64"), MISSING).to_numpy().astype(np.int64)
