"""The texts of images: from a column, from files beside them, or from a list such as COCO's. Each image may have several."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError, shortened
from ..system.files import at_home, read_json
from .columns import choose_caption, columns_of
from .files import MOST_LABELS
from .image_source import CorruptImage, ImageSource
from .labels import rows_of
from .rows import read_rows

if TYPE_CHECKING:
    import pyarrow as pa


def captions_of(values: Iterable[Any]) -> pa.ListArray:
    """A text, a list of texts, or None for each image -> list<string> [N], without what is empty. Raises DataError."""
    import pyarrow as pa

    found = []
    for value in values:
        texts = [value] if value is None or isinstance(value, str) else value
        if not isinstance(texts, list) or not all(text is None or isinstance(text, str) for text in texts):
            raise DataError(f"a caption is {shortened(value)}, not a text or a list of texts: see --caption-column")
        found.append([text.strip() for text in texts if text and text.strip()])
    return pa.array(found, pa.list_(pa.string()))


def with_captions(source: ImageSource, on_corrupt: str) -> tuple[ImageSource, pa.ListArray]:
    """The captions of a source, none of them empty, and the source without the images that have none.

    Raises DataError where there are no captions, or an image has none and `on_corrupt` does not say to leave it out.
    """
    import numpy as np
    import pyarrow.compute as pc

    if source.captions is None:
        raise DataError(
            f"{source.description}: it has no captions; name their column with --caption-column, or a file with --captions"
        )
    texts = source.captions()
    missing = np.flatnonzero(pc.equal(pc.list_value_length(texts), 0).to_numpy(zero_copy_only=False))
    if len(missing) and on_corrupt != "skip":
        raise DataError(
            f"{len(missing):,} of {source.length:,} images have no caption, or an empty one (the first is "
            f"{source.names(int(missing[0]))}): caption them, or leave such out with --on-corrupt skip"
        )
    without = set(missing.tolist())

    def read(i: int) -> Any:
        if i in without:
            raise CorruptImage("it has no caption")
        return source.read(i)

    return replace(source, read=read), texts


def captions_from(file: str, images: Sequence[str], column: str | None) -> Callable[[], pa.ListArray]:
    """Captions by name: COCO's JSON, or rows of file_name and text in .jsonl, .csv or .parquet. Read when called."""
    path = at_home(file)
    if path.suffix.lower() not in (".json", ".jsonl", ".csv", ".parquet"):
        raise DataError(f"--captions {file}: only COCO's .json, and .jsonl, .csv and .parquet with file_name are read")

    def read() -> pa.ListArray:
        if path.suffix.lower() == ".json":
            names, texts = _coco(path)
        else:
            table = read_rows(path.name, _content(path), str(path))
            chosen = choose_caption(columns_of(table.schema), column, str(path))
            if chosen is None or "file_name" not in table.column_names:
                raise DataError(f"{path} has no column file_name, or none of captions: it has {', '.join(table.column_names)}")
            names, texts = table.column("file_name").to_pylist(), table.column(chosen.name).to_pylist()
        return gathered(rows_of(images, [str(name) for name in names], str(path))[0], texts)

    return read


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def gathered(rows: list[list[int]], texts: Sequence[Any]) -> pa.ListArray:
    """The captions of all rows of each image."""
    return captions_of(
        [text for row in own for text in (texts[row] if isinstance(texts[row], list) else [texts[row]])] for own in rows
    )


def _coco(path: Path) -> tuple[list[str], list[str]]:
    """(file name, caption) of every annotation. Raises DataError."""
    try:
        content = read_json(path, MOST_LABELS)
        names = {image["id"]: image["file_name"] for image in content["images"]}
        pairs = [(names[one["image_id"]], one["caption"]) for one in content["annotations"]]
        return [name for name, _ in pairs], [caption for _, caption in pairs]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is not COCO's captions ({{'images': [...], 'annotations': [...]}}): {shortened(error)}"
        ) from error


def write_texts(path: Path, texts: pa.ListArray) -> None:
    """Captions into an Arrow file."""
    import pyarrow as pa

    table = pa.table({"captions": texts})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def read_texts(path: Path) -> pa.ListArray:
    """The same, mapped into memory. Raises OSError or ValueError."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).read_all().column("captions").combine_chunks()
