"""Settings as data classes: from plain dictionaries, with a named error for every unknown key and impossible value.

No dependency does this: the standard library's data classes check no types, and pydantic would be one more for these lines.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, TypeVar

from ..errors import ConfigError, nearest, shortened

T = TypeVar("T")
LARGEST = 10**18  # of whole numbers: what any tensor, file or seed can hold
MOST_ITEMS = 1_000_000  # of lists: the names of that many classes
_UNITS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
_COUNT = re.compile(r"([+-]?[0-9][0-9_]{0,30})(?:\.([0-9]{1,9}))?([kKMG]i?|)")


def parse_count(text: str) -> int | None:
    """A whole number, also with one of EDM's units (k, M, G are thousands, Ki, Mi, Gi powers of 1024); None for other text.

    >>> parse_count("64k"), parse_count("1.5M"), parse_count("64Ki"), parse_count("0.5"), parse_count("1Ki5")
    (64000, 1500000, 65536, None, None)
    """
    found = _COUNT.fullmatch(text.strip())
    if found is None or found[3] not in _UNITS:
        return None
    digits = found[2] or ""
    number, rest = divmod(int(found[1].replace("_", "") + digits) * _UNITS[found[3]], 10 ** len(digits))
    return None if rest or abs(number) > LARGEST else number


def from_dict(cls: type[T], content: dict[str, Any], prefix: str = "") -> T:
    """A data class from a dictionary such as TOML or JSON gives. Missing keys keep their defaults.

    Nested data classes, unions of data classes (told apart by `kind`), Literal, also beside another type, Optional,
    tuple[int, ...] and list[...] are understood, and "64k" or "1M" for a whole number. Raises ConfigError naming the key, dotted, and the nearest valid ones.
    """
    if not isinstance(content, dict):
        raise ConfigError(f"{prefix or 'the config'} must be a table, not {shortened(content)}")
    hints = _hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    values = {}
    for key, value in content.items():
        if key not in names:
            section = f"{prefix}." if prefix else ""
            raise ConfigError(f"unknown setting {shortened(section + str(key))}: {nearest(str(key)[:80], names, section)}")
        values[key] = convert(hints[key], value, _join(prefix, key))
    missing = [
        f.name for f in dataclasses.fields(cls)
        if f.name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]  # fmt: skip
    if missing:
        raise ConfigError(f"missing settings: {', '.join(_join(prefix, name) for name in missing)}")
    return cls(**values)


def from_keywords(cls: type[T], given: Mapping[str, Any], what: str) -> T:
    """A data class from the keyword arguments of a call. `what`: ends "unknown {what}" for a name that it does not have."""
    names = [field.name for field in dataclasses.fields(cls)]
    for name in given:
        if name not in names:
            raise ConfigError(f"unknown {what} {name!r}: {nearest(name, names)}")
    return cls(**given)


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def convert(hint: Any, value: Any, name: str) -> Any:
    """`value` as the type `hint`, or ConfigError naming the setting."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, name)
    if origin is typing.Literal:
        if value not in arguments:
            raise ConfigError(f"{name} = {shortened(value)} is not possible: {nearest(_word(value), map(str, arguments))}")
        return value
    if origin in (typing.Union, types.UnionType):
        return _convert_union([a for a in arguments if a is not type(None)], value, name, type(None) in arguments)
    if origin is dict and not isinstance(value, dict):
        raise ConfigError(f"{name} must be a table, not {shortened(value)}")
    if origin in (tuple, list):
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{name} must be a list, such as [1, 2], not {shortened(value)}")
        if len(value) > MOST_ITEMS:
            raise ConfigError(f"{name} is a list of {len(value):,} items: at most {MOST_ITEMS:,} make sense")
        return origin(convert(arguments[0], item, f"{name}[{i}]") for i, item in enumerate(value))
    if hint is bool and not isinstance(value, bool):
        raise ConfigError(f"{name} must be true or false, not {shortened(value)}")
    if hint is int:
        if isinstance(value, str) and not value.lstrip("+-").isdecimal() and (number := parse_count(value)) is not None:
            value = number
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or abs(value) > LARGEST:
            most = " of at most 18 digits" if type(value) is int else ""
            raise ConfigError(f"{name} must be a whole number{most}, not {shortened(value)}")
    if hint is float:
        if isinstance(value, int) and abs(value) > LARGEST:
            value = math.inf
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ConfigError(f"{name} must be a number, not {shortened(value)}")
        return float(value)
    if hint is str and not isinstance(value, str):
        raise ConfigError(f"{name} must be a text, not {shortened(value)}")
    if hint is str and "\0" in value:
        raise ConfigError(f"{name} must be a text without control characters, not {shortened(value)}")
    return value


def _convert_union(choices: list[Any], value: Any, name: str, optional: bool) -> Any:
    if value is None and optional:
        return None
    if len(choices) == 1:
        return convert(choices[0], value, name)
    if not any(dataclasses.is_dataclass(c) for c in choices):
        return _convert_to_word_or(choices, value, name)
    if isinstance(value, tuple(choices)):
        return value
    # Data classes that say what they are in `kind`
    kinds = {typing.get_args(_hints(c)["kind"])[0]: c for c in choices}
    kind = value.get("kind") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in kinds:
        raise ConfigError(
            f"{name}.kind = {shortened(kind)} is not possible: {nearest(kind[:80] if isinstance(kind, str) else '', kinds)}"
        )
    return from_dict(kinds[kind], value, name)


def _convert_to_word_or(choices: list[Any], value: Any, name: str) -> Any:
    """A Literal beside another plain type, such as int | Literal["auto"]."""
    words = [word for c in choices if typing.get_origin(c) is typing.Literal for word in typing.get_args(c)]
    (other,) = (c for c in choices if typing.get_origin(c) is not typing.Literal)
    if isinstance(value, str) and value in words:
        return value
    try:
        return convert(other, value, name)
    except ConfigError as error:
        raise ConfigError(f"{error}, or {' or '.join(map(repr, words))}") from error


def flatten(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf of nested dictionaries."""
    for key, value in content.items():
        if isinstance(value, dict):
            yield from flatten(value, _join(prefix, key))
        else:
            yield _join(prefix, key), value


def _word(value: Any) -> str:
    return value[:80] if isinstance(value, str) else ""


def _join(prefix: str, key: str) -> str:
    return f"{prefix}.{key}" if prefix else key
