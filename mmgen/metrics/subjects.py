"""What the words of `mmgen fid` mean: which sets of samples are scored, and against which images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import data
from ..errors import ConfigError, DataError
from ..system.files import at_home
from ..models.model import MODEL_FILE, AnyModel
from ..sampling.folder import RECORD
from ..sampling.record import Origin, make_record
from ..sampling.drawing import SampleSettings, plan
from .image_sets import ImageSet, dataset_images, drawn_images, image_set
from .references import TAKES, is_statistics

SCORES = "scores.json"
_DATA_OPTIONS = {"split", "image_column", "label_column", "on_corrupt", "resolution", "channels"}  # of a record


@dataclass(frozen=True)
class Subject:
    """One row of the table: a set of samples, or several draws of the same size from one model."""

    name: str
    draws: list[ImageSet]

    @property
    def record(self) -> dict[str, Any]:
        return self.draws[0].record or {}


def is_model(word: str) -> bool:
    """Whether a word means a model: a .safetensors file, a run folder, or hf://user/name."""
    path = at_home(word)
    if (path / "config.json").is_file() and (path / "checkpoints").is_dir():  # also before the run has saved a model:
        return True  # the pictures in it are no samples
    return word.startswith("hf://") or (path / MODEL_FILE).is_file() or (path.is_file() and path.suffix == ".safetensors")


def model_subjects(
    model: AnyModel, origin: Origin, settings: Sequence[SampleSettings], num: int, repeat: int = 1
) -> list[Subject]:
    """A row for each of `settings`. Draw r of `repeat` has images r num to (r + 1) num - 1, as EDM's seeds have it."""
    if num < 2:
        raise ConfigError(f"--num must be at least 2, not {num}")
    beside = None  # of a model of the hub: its cache is no place for it
    if Path(origin.model).exists():
        folder = origin.file.name == MODEL_FILE and Path(origin.model).is_dir()
        beside = Path(origin.model) / SCORES if folder else origin.file.with_name(origin.file.name + ".scores.json")
    subjects = []
    for one in settings:
        chosen = plan(model.config, one)
        record = make_record(model, origin, chosen, num)
        draws = [
            drawn_images(model, chosen, num, name=origin.model, first=r * num, record=record, beside=beside)
            for r in range(repeat)
        ]
        subjects.append(Subject(origin.model, draws))
    return subjects


def image_subjects(word: str, *, split: str, image_column: str | None, num: int | None) -> list[Subject]:
    """The images a word means: one row; or one for each folder of samples in a folder of such. Raises DataError."""
    path = at_home(word)
    words = [word]
    if path.is_dir() and not (path / RECORD).is_file():
        inner = [p for p in path.iterdir() if p.is_dir() and (p / RECORD).is_file()]
        words = [str(p) for p in sorted(inner, key=lambda p: (len(p.name), p.name))] or words
    return [Subject(one, [image_set(one, split=split, image_column=image_column).first(num)]) for one in words]


def reference_images(
    word: str | None,
    subjects: Sequence[Subject],
    *,
    split: str | None,
    resolution: int | None,
    channels: int | None,
    num: int | None,
    progress: Callable[[int, int], None] | None = None,
) -> ImageSet | Path:
    """The images to compare with, or the path of a statistics file. `word` None: what the samples' record names.

    With a resolution, images are resized and cropped as for training (and cached); without, they stay as they are.
    Raises ConfigError where nothing says what to compare with or an option does not apply, DataError where it cannot be read.
    """
    reading = {"--ref-split": split, "--resolution": resolution, "--channels": channels}
    if word is None:
        _refuse(reading, "is for --ref, and the training set is read as the model saw it: name it with --ref, or leave it out")
        name, options = own_reference(subjects)
        try:
            return dataset_images(data.load(name, progress=progress, **options)).first(num)
        except DataError as error:
            raise DataError(f"the samples' record names {name} as their training set: {error}; or give another --ref") from error
    path = at_home(word)
    if path.is_file() and is_statistics(path):
        _refuse({"--ref-num": num, **reading}, f"is for images, and {word} holds their statistics only: leave it out")
        return path
    split = split or "train"
    if resolution is None and channels is None:
        return image_set(word, split=split).first(num)
    return dataset_images(data.load(word, resolution=resolution, channels=channels, split=split, progress=progress)).first(num)


def _refuse(options: dict[str, Any], why: str) -> None:
    for option, value in options.items():
        if value is not None:
            raise ConfigError(f"{option} {why}")


def own_reference(subjects: Sequence[Subject]) -> tuple[str, dict[str, Any]]:
    """The training set that the samples' records name, as arguments of `data.load`. Raises ConfigError where none does."""
    named = []
    for subject in subjects:
        word, options = subject.record.get("data"), subject.record.get("data_options")
        if not word or not isinstance(options, dict):
            raise ConfigError(f"nothing says what to compare {subject.name} with: give --ref. {TAKES}")
        kinds = {"resolution": int, "channels": int}
        if not isinstance(word, str) or not all(isinstance(options[key], kinds.get(key, str)) for key in options):
            raise ConfigError(f"the record of {subject.name} has been changed: its data are not a name and options; give --ref")
        if unknown := set(options) - _DATA_OPTIONS:
            raise ConfigError(f"the record of {subject.name} has been changed: {min(unknown)!r} is unknown; give --ref")
        if (word, options) not in named:
            named.append((word, options))
    if len(named) > 1:
        read = [f"{word} ({', '.join(f'{key} {value}' for key, value in options.items())})" for word, options in named[:2]]
        raise ConfigError(f"the samples are of models trained on {read[0]} and on {read[1]}: give --ref. {TAKES}")
    return named[0]
