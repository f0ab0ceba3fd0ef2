"""Which classes are drawn: from words to class numbers, and never one that training had no images of."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ConfigError, nearest, shortened
from ..models.config import ModelConfig

WORDS = ("random", "balanced")


def class_numbers(classes: str | Sequence[int | str], config: ModelConfig) -> str | list[int]:
    """`random`, `balanced`, or the numbers of the classes that a list means. Raises ConfigError.

    An int is a class number. A word is the name of a class; where not all names are numbers, a word such as "3" is a class number.
    A string is a list of words separated by commas.
    """
    if isinstance(classes, str):
        if classes in WORDS:
            return classes
        named = classes in (config.class_names or [])  # a name may have commas in it
        classes = [classes] if named else [word.strip() for word in classes.split(",")]
    if config.num_classes == 0:
        raise ConfigError("classes cannot be chosen: this model is unconditional")
    numbers, drawn = [_by_name(one, config) if isinstance(one, str) else _number(one) for one in classes], with_images(config)
    for one, number in zip(classes, numbers, strict=True):
        if number is None or not 0 <= number < config.num_classes:
            raise ConfigError(f"classes must be numbers from 0 to {config.num_classes - 1}, not {shortened(one)}")
        if number not in drawn:
            raise ConfigError(f"class {_shown(number, config)} had no images in the training data, so the model cannot draw it")
    if not numbers:
        raise ConfigError(f"classes must be at least one number from 0 to {config.num_classes - 1}")
    return numbers


def with_images(config: ModelConfig) -> list[int]:
    """The numbers of the classes that training had images of; all where nothing is known of them."""
    counts = config.class_counts
    return list(range(config.num_classes)) if counts is None else [number for number, count in enumerate(counts) if count]


def random_labels(config: ModelConfig, draw: Tensor) -> Tensor:
    """Classes int64 [N] for uniform float64 numbers [N] from [0, 1): as often as in the training data."""
    counts = torch.tensor(config.class_counts or [1] * config.num_classes, dtype=torch.float64, device=draw.device)
    found = torch.searchsorted(counts.cumsum(0), draw * counts.sum(), right=True)
    return found.clamp(max=with_images(config)[-1])  # where draw * sum is rounded up to the sum


def _number(value: object) -> int | None:
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def _by_name(word: str, config: ModelConfig) -> int:
    names = config.class_names or []
    found = [i for i, name in enumerate(names) if name == word] or [i for i, name in enumerate(names) if name.lower() == word.lower()]
    number = int(word) if word.isdecimal() and len(word) < 10 and int(word) < config.num_classes else None
    if names and all(name.isdecimal() for name in names):
        number = None  # every word is a name
    elif found and number not in (None, *found):
        raise ConfigError(
            f"{shortened(word)} is the name of class {found[0]} and the number of class {_shown(number, config)}: rename the class, "
            "or give numbers in Python"
        )
    if len(found) > 1 and number is None:
        raise ConfigError(f"{shortened(word)} is the name of the classes {', '.join(map(str, found))}: give the number of one")
    if not found and number is None:
        raise ConfigError(f"unknown class {shortened(word)}: {_valid(word, names, config.num_classes)}")
    return number if number is not None else found[0]


def _shown(number: int, config: ModelConfig) -> str:
    names = config.class_names or []
    return f"{number} ({names[number]})" if number < len(names) and names[number] != str(number) else str(number)


def _valid(word: str, names: list[str], count: int) -> str:
    if names and all(name.isdecimal() for name in names):
        return f"{nearest(word, names)}; also random, balanced"
    valid = f"random, balanced, or numbers from 0 to {count - 1}"
    if not names:
        return f"this model knows {valid}"
    if len(names) <= 20:
        return f"{nearest(word, names)}; also {valid}"
    close = nearest(word, names).split("? Valid:")
    return f"{close[0]}? " * (len(close) > 1) + f"it has {count} names; also {valid}"
