"""Scores from Python: `mmgen.fid`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..errors import ConfigError, in_python, nearest, shortened
from ..report.bars import bar
from ..sampling.drawing import SampleSettings
from ..system.devices import find_device
from .evaluate import OPTIONS, FidSettings, evaluate
from .results import Report, append, entry

_PATHS = ("inception", "captions", "save_stats", "out")
_DRAWING = ("ema", *OPTIONS, *(field.name for field in fields(SampleSettings) if field.name != "batch_size"))


@in_python()
def fid(
    samples: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    metrics: str | Sequence[str] = "fid",
    device: str = "auto",
    progress: bool = False,
    **options: Any,
) -> Report:
    """Scores of one set of samples or several: folders, npz, zip and parquet files, hub datasets, or models, which are sampled.

    `Report.scores` are those of the first set, `Report.rows` all, with what they depend on.

    Args:
        metrics: fid, kid, is, pr, dc, clip, retrieval, several of them, or all.
        device: auto (a GPU if any), cpu, cuda or cuda:N.
        progress: show bars.
        options: the fields of `FidSettings` (ref, num, features, mode ...; out, a JSON file that the scores are added to) and,
            of a model, those of `SampleSettings`, ema, and of another project's checkpoint type, preset, heads, num_classes and
            guide_all. `steps` and `guidance` can be lists: a row each.

    Raises ConfigError, DataError and ModelError, each with one sentence.
    """
    paths = [samples] if isinstance(samples, str | os.PathLike) else samples
    if not isinstance(paths, Sequence) or not paths or not all(isinstance(path, str | os.PathLike) for path in paths):
        raise ConfigError(f"samples must be a folder, a file, a model's name or a list of them, not {shortened(samples)}")
    wanted = metrics.split(",") if isinstance(metrics, str) else list(metrics)
    drawing = {name: options.pop(name) for name in _DRAWING if name in options}
    for name in ("steps", "guidance"):
        if isinstance(drawing.get(name), int | float):
            drawing[name] = [drawing[name]]
    names = [field.name for field in fields(FidSettings) if field.name not in ("drawing", "metrics", "device")]
    for name in options:
        if name not in names:
            raise ConfigError(f"unknown option {name!r}: {nearest(name, [*names, *_DRAWING])}")
    options |= {name: Path(options[name]) for name in _PATHS if options.get(name) is not None}
    options |= {name: os.fspath(options[name]) for name in ("ref", "features", "clip") if options.get(name) is not None}
    settings = FidSettings(
        metrics=None if wanted == ["all"] else tuple(dict.fromkeys(name.strip() for name in wanted)), drawing=drawing,
        device=find_device(device), **options,
    )  # fmt: skip
    report = evaluate([os.fspath(path) for path in paths], settings, **({"bar": _bar} if progress else {}))
    if settings.out is not None:
        append(settings.out, [entry(row, report) for row in report.rows])
    return report


@contextlib.contextmanager
def _bar(what: str, images: int) -> Iterator[Callable[..., None]]:
    with bar(what, images) as update:
        yield lambda done, of=None: update(done)
