"""Types of settings that come from a notebook: numbers of NumPy, tensors and lists are taken, anything else is named."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..errors import ConfigError, shortened

_WHOLE, _NUMBERS = ("steps", "seed", "batch_size"), ("guidance", "churn", "s_tmin", "s_tmax", "s_noise", "stochasticity")
_WORDS = ("sampler", "grid", "precision", "negative")
_REQUIRED = ("seed", "batch_size", "etas", "classes", "prompts", "negative")  # all others can be None, for the model's own


def check_types(settings: Any) -> None:
    """Raises ConfigError for a value of `SampleSettings` of a wrong type. One class or prompt stands for a list of it."""
    for names, kind, what in (
        (_WHOLE, operator.index, "a whole number"),
        (_NUMBERS, float, "a number"),
        (_WORDS, _word, "a word"),
        (("etas", "guidance_interval"), lambda values: tuple(map(float, values)), "a list of numbers"),
        (("classes",), _classes, "names or numbers of classes"),
        (("prompts",), _texts, "a text or a list of texts"),
        (("guide",), _place, "the name of a model"),
    ):
        for name in names:
            _check(settings, name, kind, what)
    if not isinstance(settings.compile, bool):
        raise ConfigError(f"compile must be True or False, not {shortened(settings.compile)}")


def _check(settings: Any, name: str, kind: Callable[[Any], Any], what: str) -> None:
    value = getattr(settings, name)
    if value is None and name not in _REQUIRED:
        return
    try:
        if isinstance(value, bool) or (isinstance(value, str) and name not in ("classes", "prompts", "guide", *_WORDS)):
            raise TypeError
        object.__setattr__(settings, name, kind(value))  # the data class is frozen
    except (TypeError, ValueError, RuntimeError):
        raise ConfigError(f"{name} must be {what}, not {shortened(value)}") from None


def _word(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _place(value: Any) -> Any:
    """A name or path, or what was made of one."""
    return value if hasattr(value, "model") else os.fspath(value)


def _classes(value: Any) -> str | list:
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, str):
        return value
    return [value] if isinstance(value, int) else list(value)


def _texts(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(map(_word, value))
