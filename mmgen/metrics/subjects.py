"""What is given to `mmgen fid`: which sets of samples are scored, and against which images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import data
from ..config.sections import CAPTIONS, READING
from ..data.content import content_hash
from ..data.resolve import DIGITS, locate, resolve
from ..errors import ConfigError, DataError
from ..system.files import at_home
from ..formats.model_folders import holds_weights
from ..models.build import AnyModel
from ..models.files import MODEL_FILE
from ..sampling.folder import RECORD
from ..sampling.record import Origin, make_record
from ..sampling.drawing import SampleSettings, plan
from .image_sets import ImageSet, dataset_images, drawn_images, image_set
from .references import TAKES, is_statistics

SCORES = "scores.json"
_DATA_OPTIONS = {*READING, *CAPTIONS, "with_captions", "resolution", "channels"}  # of a record


@dataclass(frozen=True)
class Subject:
    """One row of the table: a set of samples, or several draws of the same size from one model."""

    name: str
    draws: list[ImageSet]

    @property
    def record(self) -> dict[str, Any]:
        return self.draws[0].record or {}


def is_model(name: str) -> bool:
    """Whether a name means a model: a run folder, a checkpoint of any project, or hf://user/name."""
    path = at_home(name)
    if (path / "config.json").is_file() and (path / "checkpoints").is_dir():  # also before the run has saved a model:
        return True  # the pictures in it are no samples
    return name.startswith("hf://") or holds_weights(path)


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
        subjects.append(Subject(origin.model if origin.ema is None else f"{origin.model}, {origin.ema}", draws))
    return subjects


def image_subjects(
    name: str, *, split: str, image_column: str | None, num: int | None, follow_links: bool = False
) -> list[Subject]:
    """The images a name means: one row; or one for each folder of samples in a folder of such. Raises DataError."""
    path = at_home(name)
    names = [name]
    if path.is_dir() and not (path / RECORD).is_file():
        inner = [p for p in path.iterdir() if p.is_dir() and (p / RECORD).is_file()]
        names = [str(p) for p in sorted(inner, key=lambda p: (len(p.name), p.name))] or names
    return [Subject(one, [image_set(one, split=split, image_column=image_column, follow_links=follow_links).first(num)]) for one in names]


def reference_images(
    name: str | None,
    subjects: Sequence[Subject],
    *,
    split: str | None,
    resolution: int | None,
    channels: int | None,
    num: int | None,
    follow_links: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[ImageSet | Path, str | None]:
    """The images to compare with, or the path of a statistics file, and a warning. `name` None: what the samples' record names.

    With a resolution, images are resized and cropped as for training (and cached); without, they stay as they are.
    Raises ConfigError where nothing says what to compare with or an option does not apply, DataError where it cannot be read.
    """
    reading = {"--ref-split": split, "--resolution": resolution, "--channels": channels}
    if name is None:
        _refuse(reading, "is for --ref, and the training set is read as the model saw it: name it with --ref, or leave it out")
        images, warning = training_images(own_reference(subjects), progress)
        return images.first(num), warning
    path = at_home(name)
    if path.is_file() and is_statistics(path):
        _refuse({"--ref-num": num, **reading}, f"is for images, and {name} holds their statistics only: leave it out")
        return path, None
    split = split or "train"
    if resolution is None and channels is None:
        return image_set(name, split=split, follow_links=follow_links).first(num), None
    options = {"split": split, "follow_links": follow_links}
    found = data.load(name, resolution=resolution, channels=channels, progress=progress, **options)
    return dataset_images(found).first(num), None


def _refuse(options: dict[str, Any], why: str) -> None:
    for option, value in options.items():
        if value is not None:
            raise ConfigError(f"{option} {why}")


@dataclass(frozen=True)
class TrainingSet:
    """The images that the samples' records name."""

    name: str
    options: dict[str, Any]  # arguments of `data.load`
    path: str = ""  # see `data.resolve.locate`; "" where the record is of version 0.1, as with what follows
    fingerprint: str = ""  # of the pixels that training saw, and labels
    content: str = ""  # of the encoded images, where training saw latents of them

    @property
    def identity(self) -> tuple:
        """Equal for the same images, whatever they are called and wherever they lie."""
        content = self.fingerprint or self.content
        return (content or self.path or self.name, *([] if self.fingerprint else sorted(self.options.items())))

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(f'{key} {value}' for key, value in self.options.items())})"


def own_reference(subjects: Sequence[Subject]) -> TrainingSet:
    """The training set that the samples' records name. Raises ConfigError where one names none, or two differ."""
    named = [_named(subject) for subject in subjects]
    other = next((one for one in named if one.identity != named[0].identity), None)
    if other is not None:
        both = f"{named[0]} and on {other}"
        if str(named[0]) == str(other):
            both = f"{named[0]} in {named[0].path or 'an unknown place'} and on others of that name in {other.path or 'another'}"
        raise ConfigError(f"the samples are of models trained on {both}: give --ref. {TAKES}")
    return named[0]


def _named(subject: Subject) -> TrainingSet:
    record = subject.record
    name, options = record.get("data"), record.get("data_options")
    if not name or not isinstance(options, dict):
        raise ConfigError(f"nothing says what to compare {subject.name} with: give --ref. {TAKES}")
    kinds = {"resolution": int, "channels": int, "follow_links": bool, "with_captions": bool}
    if not isinstance(name, str) or not all(isinstance(options[key], kinds.get(key, str)) for key in options):
        raise ConfigError(f"the record of {subject.name} has been changed: its data are not a name and options; give --ref")
    if unknown := set(options) - _DATA_OPTIONS:
        raise ConfigError(f"the record of {subject.name} has been changed: {min(unknown)!r} is unknown; give --ref")
    return TrainingSet(name, options, *(record.get(key, "") for key in ("data_place", "data_fingerprint", "data_content")))


def training_images(own: TrainingSet, progress: Callable[[int, int], None] | None = None) -> tuple[ImageSet, str | None]:
    """The images of a training set, read as training read them, and a warning where nothing says what they were.

    They are looked for where they lay, then by their name in this folder. Raises DataError where they are not there, or not
    the same any more.
    """
    others, missing = [], None
    for name in dict.fromkeys(locate(name) for name in (own.path, own.name) if name):
        try:
            found = data.load(name, progress=progress, **own.options)
            if own.fingerprint and found.fingerprint != own.fingerprint or own.content and own.content != _content(name, own):
                others.append(found.path)
                continue
        except DataError as error:
            missing = missing or error
            continue
        if own.fingerprint or own.content:
            return dataset_images(found), None
        what = f"nothing says which images {own.name} held when the model was trained: those in {found.path} are taken"
        return dataset_images(found), None if found.path == DIGITS else what
    if others:
        where = f" in {own.path}" if own.path not in ("", own.name) else ""
        raise DataError(
            f"the model was trained on {own.name}{where}, and {' and '.join(others)} now hold{'s' * (len(others) == 1)} other "
            "images or labels: bring back those of the training, or say with --ref what to compare with"
        )
    raise DataError(f"the samples' record names {own.name} as their training set: {missing}; or give another --ref")


def _content(name: str, own: TrainingSet) -> str:
    columns = {key: own.options[key] for key in READING if key in own.options and key != "on_corrupt"}
    return content_hash(resolve(name, **columns))
