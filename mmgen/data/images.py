"""Images as files, in a folder, a zip or tars: which they are, and their labels and captions from what lies beside them.

Labels, from the first that is there: EDM's dataset.json; a column of metadata.jsonl, .csv or .parquet; NAME.cls beside NAME.jpg,
or a key of NAME.json that is asked for; the folders. Captions likewise: --captions FILE; a column of metadata; NAME.txt or
NAME.caption; a key of NAME.json.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from ..errors import DataError, shortened
from ..system.files import at_home, parse_json
from .captions import captions_from, captions_of, gathered
from .columns import CAPTION_NAMES, Column, choose_caption, choose_label, columns_of, label_notes
from .decode import image_suffixes
from .files import Files
from .image_source import ImageSource, Reading, checked_labels, fingerprint, identity, summary
from .labels import Labels, NotClasses, classes_of, edm_labels, folder_classes, one_label, rows_of
from .rows import read_rows
from .splits import ALIASES, canonical, no_split
from .walk import by_suffix

if TYPE_CHECKING:
    import pyarrow as pa

EDM_LABELS = "dataset.json"
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_TEXTS = ("txt", "caption", "text")  # endings of files beside images that hold their captions
_LABELS = re.compile(r"(label|class|categor|annot|attr|train|meta)[^/]*\.(csv|tsv|json|jsonl|txt|mat)$", re.IGNORECASE)  # a list that others write
_FEW = 5  # such lists


def open_images(files: Files, reading: Reading, split_chosen: bool = False) -> ImageSource:
    """Images and what is known of them. `split_chosen`: the files are those of the split. Raises DataError."""
    path = str(files.path)
    images = [name for name in files.names if name.lower().endswith(image_suffixes())]
    if not images:
        latents = any(name.endswith(".npy") for name in files.names)
        what = "latents (.npy), not images" if latents else "no images: unpack it and give the folder"
        raise DataError(f"{path} holds {what}")
    prefix, notes = "", []
    if not split_chosen:
        images, prefix, notes = _of_split(images, reading.split, path)
    beside = _Beside(files, images, reading, path)
    images = beside.images
    lists = [name for name in files.names if name.rpartition("/")[2] in (EDM_LABELS, *METADATA) and _lies_by(name, prefix)]
    edm, labels = _edm(files, lists, images, notes)
    metadata = _Metadata(files, [name for name in lists if PurePosixPath(name).name in METADATA], images, reading)
    class_names, layout = None, f"EDM {files.layout}" if edm else files.layout
    if not edm:
        labels, class_names = metadata.labels(notes) or beside.labels() or (None, None)
    if labels is None and not edm:
        labels, class_names, more = folder_classes([files.inner(name[len(prefix) :]) for name in images], path)
        layout, notes = "class folders" if labels is not None else layout, notes + more
    if labels is not None:
        labels, class_names = checked_labels(labels, class_names, lambda i: files.called(images[i]))
    captions = metadata.captions() or beside.captions()
    texts = [] if reading.captions is None else [at_home(reading.captions)]
    if reading.captions is not None:
        captions = captions_from(reading.captions, images, reading.caption_column)
    _refuse_columns(reading, metadata.label or beside.label, metadata.caption or beside.caption or reading.captions, path)
    used = [*lists, *beside.used]
    notes += ["with captions"] * (captions is not None) + _left_out(files, prefix, {*images, *used}, labels is None)
    choices = {key: getattr(reading, key) for key in ("split", "image_column", "label_column", "caption_column", "captions")}
    layout = "image folder" if layout == "folder" else layout
    return ImageSource(
        description=summary(layout, len(images), labels, class_names, *files.notes, *notes),
        names=lambda i: files.called(images[i]),
        length=len(images),
        read=lambda i: files.read(images[i]),
        labels=labels,
        class_names=class_names,
        fingerprint=fingerprint(files.layout, [*files.identity([*images, *used]), *identity(texts)], **choices),
        captions=captions,
    )


def _of_split(images: list[str], split: str, path: str) -> tuple[list[str], str, list[str]]:
    """The images below the folder of a split, that folder's name with a slash, and notes; all, and "", where there are none.

    Folders are splits if one is called train, or all are called like splits: a class may be called test. They may lie in
    another folder that holds everything.
    """
    prefix = ""
    while True:
        inside = [name[len(prefix) :].split("/", 1) for name in images]
        folders = sorted({parts[0] for parts in inside if len(parts) > 1})
        splits = {canonical(folder): folder for folder in folders if canonical(folder) in ALIASES}
        if splits and ("train" in splits or len(splits) == len(folders)):
            break
        if len(folders) != 1 or any(len(parts) == 1 for parts in inside):
            if canonical(split) != "train":
                raise no_split(path, split, ["train"])
            return images, "", []
        prefix += folders[0] + "/"
    if canonical(split) not in splits:
        raise no_split(path, split, splits)
    prefix += splits[canonical(split)] + "/"
    chosen = [image for image in images if image.startswith(prefix)]
    loose = sum(len(parts) == 1 or parts[0] not in splits.values() for parts in inside)
    notes = [f"{loose:,} image{'s' * (loose > 1)} outside the folders of splits left out"] if loose else []
    return chosen, prefix, [f"split {canonical(split)}", *notes]


def _lies_by(name: str, prefix: str) -> bool:
    """Whether a list lies in the folder of the split, or in one around it."""
    folder = name.rpartition("/")[0]
    return name.startswith(prefix) or not folder or prefix.startswith(folder + "/")


def _edm(files: Files, lists: list[str], images: list[str], notes: list[str]) -> tuple[bool, Any]:
    """(whether EDM's dataset.json is there, labels). Other programs use the name too: of a folder, theirs is passed over."""
    found = sorted((name for name in lists if PurePosixPath(name).name == EDM_LABELS), key=lambda name: name.count("/"))
    for name in found:
        if sum(other.count("/") == name.count("/") for other in found) > 1:
            raise DataError(f"{files.path} holds several lists of labels ({', '.join(found[:3])}): give the folder of one")
        try:
            pairs = edm_labels(files.read(name), files.called(name))
        except KeyError:
            if files.layout == "zip":
                raise DataError(f'{files.called(name)} is not {{"labels": [[name, class], ...]}}') from None
            notes.append(f"{name} is not EDM's, and left out")
            continue
        if pairs is None:
            return True, None
        folder = name.removesuffix(EDM_LABELS)
        rows, more = rows_of(images, [folder + one for one, _ in pairs], name)
        notes += more
        values = one_label(rows, [label for _, label in pairs], lambda i: files.called(images[i]), name)
        return True, classes_of(values)[0]
    return False, None


def _left_out(files: Files, prefix: str, used: set[str], unlabelled: bool) -> list[str]:
    names = [name for name in files.names if name.startswith(prefix) and name not in used]
    lists = [name for name in names if _LABELS.search(name)]
    if not unlabelled or len(lists) > _FEW:  # one beside each image is no list of them
        lists = []
    notes = [f"{len(names):,} other file{'s' * (len(names) > 1)} left out ({by_suffix(names)})"] if names else []
    return notes + [f"no labels are read from {', '.join(lists)}, but from {', '.join(METADATA)} with columns file_name and label"] * bool(lists)


def _refuse_columns(reading: Reading, label: Any, caption: Any, path: str) -> None:
    for option, wanted, found in (
        ("--label-column", reading.label_column, label), ("--caption-column", reading.caption_column, caption),
    ):  # fmt: skip
        if wanted is not None and not found:
            raise DataError(f"{option} {wanted}: {path} holds image files, which have no columns: leave it out")


class _Metadata:
    """metadata.jsonl, .csv or .parquet: a row for each image, found by its column file_name."""

    label: Column | None = None
    caption: Column | None = None
    columns: Sequence[Column] = ()

    def __init__(self, files: Files, names: list[str], images: list[str], reading: Reading):
        import pyarrow as pa

        self.files, self.images, self.sure = files, images, reading.label_column is not None
        if not names:
            return
        self.path = files.called(names[0])
        tables, self.listed = [], []
        for name in names:
            table = read_rows(name, files.read(name), files.called(name))
            if "file_name" not in table.column_names:
                raise DataError(f"{files.called(name)} has no column file_name: it has {', '.join(table.column_names)}")
            folder = name.rpartition("/")[0]
            self.listed += [f"{folder}/{one}".lstrip("/") for one in table.column("file_name").to_pylist()]
            tables.append(table)
        try:
            self.table = pa.concat_tables(tables, promote_options="default")
        except pa.ArrowException as error:
            raise DataError(f"{self.path} and the others beside it differ in their columns: {shortened(error)}") from error
        columns = [column for column in columns_of(self.table.schema) if column.name != "file_name"]
        self.columns, self.label = columns, choose_label(columns, reading.label_column, self.path)
        self.caption = choose_caption(columns, reading.caption_column, self.path) if not reading.captions else None
        self.rows, self.notes = rows_of(images, self.listed, self.path)

    def labels(self, notes: list[str]) -> Labels | None:
        if self.label is None:
            notes += label_notes(self.columns, self.caption)
            return None
        values = self.table.column(self.label.name).to_pylist()
        values = one_label(self.rows, values, lambda i: self.files.called(self.images[i]), self.path)
        try:
            labels = classes_of(values, self.sure)
        except NotClasses as error:
            if self.sure:
                raise DataError(f"--label-column {self.label.name} of {self.path} holds no classes but {error}") from error
            notes.append(f"column {self.label.name} not taken as classes: {error}")
            return None
        notes += [f"labels from column {self.label.name} of {self.path}", *self.notes]
        return labels

    def captions(self) -> Callable[[], pa.ListArray] | None:
        if self.caption is None:
            return None
        return lambda: gathered(self.rows, self.table.column(self.caption.name).to_pylist())


class _Beside:
    """Files that are called as an image is, with another ending; in tars all that comes after the first dot is the ending."""

    def __init__(self, files: Files, images: list[str], reading: Reading, path: str):
        self.files, self.names, self.in_tars = files, set(files.names), files.layout == "tars"
        self.images = self._of_field(images, reading.image_column, path)
        self.stems = [self._split(image)[0] for image in self.images]
        self.label = self._find(reading.label_column, ("cls",))
        self.caption = self._find(reading.caption_column, _TEXTS) if not reading.captions else None
        if self.caption is None and reading.caption_column is None and not reading.captions and self._has("json"):
            keys = self._json(next(stem for stem in self.stems if f"{stem}.json" in self.names))
            self.caption = next((("json", name) for name in CAPTION_NAMES if isinstance(keys, dict) and name in keys), None)
        endings = {column[0] for column in (self.label, self.caption) if column}
        self.used = sorted({f"{stem}.{ending}" for ending in endings for stem in self.stems} & self.names)

    def labels(self) -> Labels | None:
        if self.label is None:
            return None
        values = self._values(*self.label)
        if all(isinstance(value, str) and value.isdecimal() and len(value) < 8 for value in values):
            values = [int(value) for value in values]  # the number of the class, not its name
        try:
            return classes_of(values, sure=True)
        except NotClasses as error:
            raise DataError(f"{'.'.join(filter(None, self.label))} beside the images of {self.files.path}: {error}") from error

    def captions(self) -> Callable[[], pa.ListArray] | None:
        return None if self.caption is None else lambda: captions_of(self._values(*self.caption))

    def _split(self, name: str) -> tuple[str, str]:
        folder, slash, base = name.rpartition("/")
        stem, _, ending = base.partition(".") if self.in_tars else base.rpartition(".")
        return folder + slash + stem, ending

    def _of_field(self, images: list[str], wanted: str | None, path: str) -> list[str]:
        """The images of one ending, where a sample of a tar has several: a picture and its mask."""
        if wanted is not None and not self.in_tars:
            raise DataError(f"--image-column {wanted}: {path} holds image files, which have no columns: leave it out")
        if not self.in_tars:
            return images
        fields = Counter(self._split(name)[1] for name in images)
        several = len({self._split(name)[0] for name in images}) < len(images)
        plain = [field for field in fields if "." not in field]
        if wanted is None and several and len(plain) == 1:
            wanted = plain[0]
        if wanted is not None and wanted not in fields or wanted is None and several:
            raise DataError(f"{path} holds images called {', '.join(sorted(fields))}: choose with --image-column")
        return images if wanted is None else [name for name in images if self._split(name)[1] == wanted]

    def _has(self, ending: str) -> bool:
        return any(f"{stem}.{ending}" in self.names for stem in self.stems)

    def _find(self, wanted: str | None, usual: tuple[str, ...]) -> tuple[str, str | None] | None:
        """(ending, key of the JSON) of the column that was asked for, or of the first usual one."""
        for ending in usual if wanted is None else (wanted,):
            if self._has(ending):
                return ending, None
        return ("json", wanted) if wanted is not None and self._has("json") else None

    def _values(self, ending: str, key: str | None) -> list[Any]:
        if key is not None:
            return [found.get(key) if isinstance(found := self._json(stem), dict) else None for stem in self.stems]
        return [self._text(f"{stem}.{ending}") for stem in self.stems]

    def _text(self, name: str) -> str | None:
        if name not in self.names:
            return None
        try:
            return self.files.read(name).decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise DataError(f"{self.files.called(name)} is no text in UTF-8: {error}") from error

    def _json(self, stem: str) -> Any:
        text = self._text(f"{stem}.json")
        try:
            return None if text is None else parse_json(text)
        except ValueError as error:
            raise DataError(f"{self.files.called(stem + '.json')} is no JSON: {shortened(error)}") from error
