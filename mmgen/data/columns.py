"""Which column of a table holds the images, which the labels, and which the captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import DataError, nearest
from ..system.files import parse_json

if TYPE_CHECKING:
    import pyarrow

IMAGE_NAMES = ("image", "img", "jpg", "png", "pixel_values")
LABEL_NAMES = ("label", "labels", "fine_label", "cls", "class")
CAPTION_NAMES = ("text", "caption", "captions", "prompt", "sentence", "sentences", "TEXT", "blip_caption")
_SHOWN = 5  # columns
_LABELS = ("class", "integer", "text", "list", "number")
_KINDS = {"images": ("image", "bytes"), "labels": _LABELS, "captions": ("text", "list")}


@dataclass(frozen=True)
class Column:
    name: str
    kind: str  # image: an Image feature; bytes: may hold encoded images; class: a ClassLabel; integer; number; text; list; other
    type: str  # for messages
    class_names: list[str] | None = None


def columns_of(schema: pyarrow.Schema) -> list[Column]:
    """Columns of an Arrow schema; `datasets` keeps its feature types as JSON in the schema's metadata."""
    features = {}
    if b"huggingface" in (schema.metadata or {}):
        try:
            features = parse_json(schema.metadata[b"huggingface"])["info"]["features"]
            features = features if isinstance(features, dict) else {}
        except (ValueError, KeyError, TypeError):
            features = {}  # another version's metadata: the Arrow types still say enough
    return [_column(field, features.get(field.name)) for field in schema]


def _column(field: pyarrow.Field, feature: object) -> Column:
    import pyarrow.types as types

    kind = feature.get("_type") if isinstance(feature, dict) else None
    if kind == "Image":
        return Column(field.name, "image", "Image")
    if types.is_integer(field.type) or types.is_boolean(field.type):
        if kind == "ClassLabel":
            names = feature.get("names")
            known = isinstance(names, list) and names and all(isinstance(name, str) for name in names)
            return Column(field.name, "class", "ClassLabel", names if known else None)
        return Column(field.name, "integer", str(field.type))
    if _holds_bytes(field.type):
        return Column(field.name, "bytes", str(field.type))
    value = field.type.value_type if types.is_dictionary(field.type) else field.type  # pandas' categories
    if types.is_string(value) or types.is_large_string(value):
        return Column(field.name, "text", "string")
    is_list = types.is_list(value) or types.is_large_list(value) or types.is_fixed_size_list(value)
    kind = "list" if is_list else "number" if types.is_floating(value) else "other"
    return Column(field.name, kind, str(field.type))


def _holds_bytes(kind: pyarrow.DataType) -> bool:
    import pyarrow.types as types

    if types.is_struct(kind):
        return any(child.name == "bytes" and _holds_bytes(child.type) for child in kind)
    return types.is_binary(kind) or types.is_large_binary(kind)


def choose_image(columns: list[Column], wanted: str | None, path: str) -> Column:
    """The column of images: the one wanted, else the only Image feature, else one that holds bytes under a usual name.

    Among several Image features (an image and its mask) the one with a usual name is taken. Raises DataError if that leaves none
    or several.
    """
    possible = [c for c in columns if c.kind in _KINDS["images"]]
    if wanted is not None:
        return _wanted(columns, wanted, path, "images", "--image-column")
    candidates = [c for c in columns if c.kind == "image"]
    if len(candidates) != 1:
        usual = [c for c in candidates or possible if c.name in IMAGE_NAMES]
        candidates = usual if len(usual) == 1 or not candidates else candidates
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        names = ", ".join(c.name for c in candidates)
        raise DataError(f"{path} has several columns of images ({names}): choose one with --image-column")
    listing = ", ".join(f"{c.name} ({c.type})" for c in columns)
    hint = ": choose one with --image-column" if possible else ""
    raise DataError(f"{path} has no column that is known to hold images; it has {listing or 'no columns'}{hint}")


def choose_label(columns: list[Column], wanted: str | None, path: str) -> Column | None:
    """The column of labels: the one wanted, else the first ClassLabel, else one under a usual name, else None."""
    if wanted is not None:
        return _wanted(columns, wanted, path, "labels", "--label-column")
    first = next((c for c in columns if c.kind == "class"), None)
    return first or _usual(columns, LABEL_NAMES, "labels")


def label_notes(columns: Sequence[Column], caption: Column | None) -> list[str]:
    """What a table without labels has that might be some: a column of a usual name that holds no classes, and what --label-column
    could name (where there are captions, other texts are rather addresses)."""
    unfit = [c for c in columns if c.name in LABEL_NAMES and c.kind not in _LABELS]
    notes = [f"column {c.name} not taken as classes: its type is {c.type}" for c in unfit]
    possible = [f"{c.name} ({c.type})" for c in columns if c.kind in (("integer",) if caption else ("integer", "text"))]
    shown = ", ".join(possible[:_SHOWN]) + ", ..." * (len(possible) > _SHOWN)
    return notes + ([f"columns that --label-column could name: {shown}"] if possible else [])


def choose_caption(columns: list[Column], wanted: str | None, path: str) -> Column | None:
    """The column of captions: the one wanted, else one of texts under a usual name, else None."""
    if wanted is not None:
        return _wanted(columns, wanted, path, "captions", "--caption-column")
    return _usual(columns, CAPTION_NAMES, "captions")


def _usual(columns: list[Column], names: tuple[str, ...], what: str) -> Column | None:
    by_name = {c.name: c for c in columns if c.kind in _KINDS[what]}
    return next((by_name[name] for name in names if name in by_name), None)


def _wanted(columns: list[Column], wanted: str, path: str, what: str, option: str) -> Column:
    possible = [c.name for c in columns if c.kind in _KINDS[what]]
    valid = nearest(wanted, possible) if possible else f"none of its columns holds {what}"
    for column in columns:
        if column.name == wanted and wanted in possible:
            return column
        if column.name == wanted:
            raise DataError(f"{option}: column {wanted!r} of {path} is {column.type}, not {what}: {valid}")
    raise DataError(f"{option}: {path} has no column {wanted!r}: {valid}")
