"""Training from Python: what `mmgen.train_imm`, `mmgen.train_teacher` and `mmgen.distill` share, and `mmgen.neon`."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState

from ..errors import ConfigError, MmgenError, in_python, shortened
from ..report.bars import bar
from ..sampling.loading import Denoiser, FlowModel, load
from ..system.devices import check_device
from ..system.schema import flatten, from_keywords
from ..training.task import Reporter
from . import run
from .choosing import choose
from .method import SHARED_SETTINGS, Method
from .neon import NeonSettings, neon, place
from .times import seconds_of


@dataclass(frozen=True)
class Run:
    """A run folder after a training."""

    folder: Path
    images: int  # trained on
    finished: bool  # all images of the recipe were seen; otherwise it was interrupted, or max_time was over
    signal: int | None  # the signal that ended it
    results: dict[str, Any]  # as in results.json: values by number of steps, seconds ...; empty where it was interrupted

    def load(self, **options: Any) -> FlowModel | Denoiser:
        """The trained model. Options: those of `mmgen.load`."""
        return load(self.folder, **options)


@dataclass(frozen=True)
class Options:
    """What every training function takes: see `mmgen.train_imm`."""

    preset: str | None = None
    settings: Mapping[str, Any] | None = None
    out: str | os.PathLike | None = None
    callback: Callable[[dict[str, Any]], None] | None = None
    progress: bool = True
    device: str = "auto"
    max_time: str | None = None


ARGUMENTS = {"data", "teacher", "steps", "preset", "out", "device", "max_time"}  # options that a function has as arguments
IN_PYTHON = {
    **{name: setting for name, setting in SHARED_SETTINGS.items() if name not in ARGUMENTS},
    **{"unconditional": "data.conditional=False", "no_text": "data.text=False", "set": "settings"},
}  # option -> setting


@in_python(IN_PYTHON)
def train(method: Method, changes: Mapping[str, Any], **options: Any) -> Run:
    """Trains a method. `changes`: settings by dotted key, None or a path among their values. options: the fields of `Options`."""
    asked = from_keywords(Options, options, "option")
    if not isinstance(asked.settings, Mapping | None):
        raise ConfigError(f'settings must be a dictionary, such as {{"loss.k": 12}}, not {shortened(asked.settings)}')
    check_device(asked.device, numbered=False)
    seconds = math.inf if asked.max_time is None else seconds_of(asked.max_time)
    given = {key: os.fspath(value) if isinstance(value, os.PathLike) else value for key, value in changes.items() if value is not None}
    out = None if asked.out is None else Path(asked.out)
    chosen = choose(method, dict(flatten(dict(asked.settings or {}))), given, preset=asked.preset, out=out, device=asked.device)
    training = method.training()
    watcher = Watcher(asked.callback, asked.progress, training.watch(chosen.config))
    for note in (chosen.note, *training.notes(chosen.config)):
        if note:
            watcher.note(note)
    _forget_precision()
    try:
        outcome = run.train(method, chosen.config, chosen.folder, watcher, device=asked.device, max_seconds=seconds)
    finally:
        watcher.close()
    return Run(chosen.folder, outcome.images, outcome.finished, outcome.signal, outcome.results or {})


@in_python()
def improve(
    model: str | os.PathLike, *, ema: str | None = None, out: str | os.PathLike | None = None, device: str = "auto", progress: bool = True, **options: Any
) -> Path:  # fmt: skip
    """`mmgen.neon`."""
    settings = from_keywords(NeonSettings, options, "option")
    check_device(device, numbered=False)
    file, folder = place(model, ema, None if out is None else Path(out))
    watcher = Watcher(None, progress, "loss")
    _forget_precision()
    try:
        written, outcome = neon(file, folder, settings, watcher, device)
    finally:
        watcher.close()
    if not outcome.finished:
        raise MmgenError("interrupted: the same call goes on")
    return written


def _forget_precision() -> None:
    """Accelerate keeps the precision of the first training in a process: the next one chooses its own."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        AcceleratorState._reset_state(reset_partial_state=True)


class Watcher(Reporter):
    """Tells a callback what is logged, and shows a bar."""

    def __init__(self, callback: Callable[[dict[str, Any]], None] | None, progress: bool, watch: str) -> None:
        self.callback, self.progress, self.watch, self.shown = callback, progress, watch, None

    def note(self, text: str) -> None:
        self._tell({"note": text})

    def log(self, line: dict[str, Any]) -> None:
        if self.shown is not None and isinstance(line.get(self.watch), float):
            self.shown.set_postfix({self.watch: f"{line[self.watch]:.3g}"})
        self._tell(line)

    def start(self, images: int, total: int) -> None:
        if self.progress:
            from tqdm.auto import tqdm

            self.shown = tqdm(total=total, initial=images, desc="training", unit=" images")

    def advance(self, images: int) -> None:
        if self.shown is not None:
            self.shown.update(images - self.shown.n)

    @contextlib.contextmanager
    def work(self, what: str, total: int, unit: str = "images") -> Iterator[Callable[..., None]]:
        with bar(what, total, f" {unit}") if self.progress else contextlib.nullcontext(lambda done: None) as update:
            yield lambda done, of=None: update(done)

    def close(self) -> None:
        if self.shown is not None:
            self.shown.close()

    def _tell(self, line: dict[str, Any]) -> None:
        if self.callback is not None:
            self.callback(line)
