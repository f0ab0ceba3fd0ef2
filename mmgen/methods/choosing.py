"""From what a user says to the settings of a run: the preset that suits the data, what differs from it, the folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config.sections import (
    READING, DataSettings, merge, nest, preset_for, preset_names, presets_by_size, read_preset, read_toml,
)  # fmt: skip
from ..data.resolve import find_latents
from ..data.survey import survey
from ..errors import ConfigError, shortened
from ..system.schema import flatten, from_dict
from .method import Method

_PATHS = {"data.name", "data.captions", "text.encoder", "teacher.name", "teacher.guide", "train.init"}  # settings that can be a path


@dataclass(frozen=True)
class Chosen:
    """What a command line, or a call from Python, means."""

    preset: str
    config: Any  # all settings
    base: Any  # the preset's own
    folder: Path  # of the run
    note: str = ""  # why this preset was chosen


def choose(
    method: Method,
    *changes: Mapping[str, Any],
    preset: str | None = None,
    file: Path | None = None,
    out: Path | None = None,
    device: str = "cpu",
) -> Chosen:
    """The settings and the folder. Raises ConfigError.

    Without a preset it is the one for the data that are named, by the settings or, where these name none, by
    `Training.data_name`; else the one for the size of their images. A method without presets has its own defaults.

    Args:
        changes: settings by dotted key, each over those before it.
        file: a TOML file of settings, over the preset's.
        device: auto, cpu or cuda. On a GPU batch_per_device is auto, unless a number is asked for.
    """
    training = method.training()
    over = read_toml(file, method.name) if file else {}
    for some in changes:
        over = merge(over, nest(dict(some), training.config))
    note = ""
    if preset is None and preset_names(method.name):
        preset, over, note = _preset_by_data(method, over)
    table = {} if preset is None else read_preset(preset, method.name)
    if device != "cpu" and torch.cuda.is_available():
        table = merge(table, {"run": {"batch_per_device": "auto"}})
    config, base = training.resolve(table, over), training.resolve(table)
    return Chosen(preset or method.name, config, base, out or Path("runs") / default_name(preset or method.name, config, base), note)


def _preset_by_data(method: Method, over: dict[str, Any]) -> tuple[str, dict[str, Any], str]:
    """The preset, the settings with what else follows from the data, and a note."""
    name, size = over.get("data", {}).get("name"), None
    from_source = method.training().data_name
    if from_source is not None:
        found, size = from_source(over)
        name = name or found
    elif name is None:
        name = "digits"
    if isinstance(name, str) and (preset := preset_for(method.name, name)) is not None:
        return preset, over, ""
    sizes = presets_by_size(method.name)
    if from_source is not None and sizes:
        return sizes[_nearest(sizes, size)], over, ""
    if isinstance(name, str) and sizes and find_latents(name) is None:
        return _for_own_images(over, sizes)
    names = ", ".join(preset_names(method.name))
    raise ConfigError(f"no preset belongs to the data {shortened(name)}: choose one with --preset, of {names}")


def _nearest(sizes: Mapping[int, str], size: int | None) -> int:
    """The size of the presets that is nearest; where nothing is known, the smallest."""
    return min(sizes, key=lambda one: (abs(one - (size or 0)), -one))


def _for_own_images(over: dict[str, Any], sizes: Mapping[int, str]) -> tuple[str, dict[str, Any], str]:
    """The preset for images that have none of their own, the settings with class labels where there are some, and a note."""
    data = from_dict(DataSettings, over["data"], "data")
    found = survey(data.name, **{key: getattr(data, key) for key in READING if key != "on_corrupt"})
    size = _nearest(sizes, data.resolution or found.side)
    labels = found.classes > 1 and over["data"].get("conditional", not data.text)
    over = merge({"data": {"conditional": labels}}, over)
    classes = f"{found.classes:,} classes" if found.classes > 1 else "no classes"
    note = (
        f"{data.name}: {found.images:,} images, {classes}, about {found.side:,} pixels: preset {sizes[size]}, for "
        f"{data.resolution or size}x{data.resolution or size} pixels{' and with class labels' if labels else ''}; another with --preset"
    )
    return sizes[size], over, note


def default_name(preset: str, config: Any, base: Any) -> str:
    """PRESET, or PRESET-XXXXXX where settings that matter to the weights differ from the preset's."""
    free = ("run.",) if config.optimizer.decay != "none" else ("run.", "train.max_images")
    different = {key: value for key, value in differences(config, base).items() if not key.startswith(free)}
    if not different:
        return preset
    for key in _PATHS & different.keys():
        different[key] = _one_spelling(different[key])
    return f"{preset}-{hashlib.sha256(json.dumps(different, sort_keys=True).encode()).hexdigest()[:6]}"


def _one_spelling(name: str) -> str:
    """The same for `data/x`, `data/x/` and their absolute path, so that a run is found again however its files are named."""
    if not os.path.exists(os.path.expanduser(name)):
        return name  # a name
    path = os.path.abspath(os.path.expanduser(name))
    inside = os.path.relpath(path)
    return path if inside.startswith(os.pardir) else inside


def differences(config: Any, base: Any) -> dict[str, Any]:
    """The settings of `config` that are not those of `base`, by dotted key."""
    old = dict(flatten(base.to_dict()))
    return {key: value for key, value in flatten(config.to_dict()) if key not in old or old[key] != value}
