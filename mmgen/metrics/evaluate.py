"""`mmgen fid` as a library call: words and settings in, rows of scores out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, ModelError, nearest
from ..formats.family import ConvertOptions
from ..models.post_hoc import make_average
from ..models.power_function import post_hoc_name
from ..system.files import at_home
from ..system.processes import ProcessGroup
from .captions import read_captions
from .choosing_towers import build_towers
from .comparisons import COMPARISONS
from .features import SMALLEST_FOR_INCEPTION, Extractor, auto_extractor, build_extractor, features_in
from .image_sets import ImageSet
from .protocols import PROTOCOLS, Protocol, check_protocol, cropped
from .reference_sets import ReferenceSet, collect_reference, file_reference
from .references import is_statistics, write_statistics
from .results import Report, Row, earlier
from .score import FULL, ScoreSettings, check_metrics, score, summary
from .subjects import Subject, image_subjects, is_model, model_subjects, own_reference, reference_images
from .towers import Towers

NUM = 50_000  # samples drawn from a model, as behind every published FID
MODES = ("tf", "clean", "torch")
BY_TOWERS = ("clip", "retrieval")  # metrics of images and their captions

# Of `drawing`: what is said of a checkpoint of another project
OPTIONS = ("type", "preset", "heads", "num_classes", "guide_all")

# Where captions alone are scored: images of any size, and no network for them.
_NO_FEATURES = Extractor(
    "none", "none", {"features": "none"}, False, True, lambda image: np.zeros((1, 1, 3), np.float32), lambda x: x.flatten(1), None
)

Bar = Callable[[str, int], AbstractContextManager]  # (what is done, images) -> update(done, images)


def known_metrics() -> tuple[str, ...]:
    """The names that --metrics takes, in the order of `all`."""
    return ("fid", *COMPARISONS, "is", *BY_TOWERS)


def _only_towers(metrics: Sequence[str]) -> bool:
    return all(metric in BY_TOWERS for metric in metrics)


def _compares(metric: str) -> bool:
    """Whether a metric needs a reference."""
    return metric == "fid" or metric in COMPARISONS


@dataclass(frozen=True)
class FidSettings:
    """What `mmgen fid` is asked for; the command's options of the same names say what each does."""

    protocol: str | None = None  # of published tables: see `protocols`
    ref: str | None = None
    ref_num: int | None = None
    ref_split: str | None = None  # None: train
    ref_mode: str | None = None
    resolution: int | None = None  # of the reference's images
    channels: int | None = None  # of the reference's images
    mode: str | None = None  # None: tf
    features: str = "auto"  # as while training: see `features.auto_extractor`
    inception: Path | None = None
    metrics: tuple[str, ...] | None = ("fid",)  # None: all that are possible
    num: int | None = None
    repeat: int = 1
    split: str | None = None  # of samples that are a data set; None: train
    image_column: str | None = None
    follow_links: bool = False  # of samples and reference: also links that lead out of their folder
    drawing: dict[str, Any] = field(default_factory=dict)  # of a model's samples: those of SampleSettings, `steps` and `guidance` lists; ema, OPTIONS
    clip: str | None = None
    captions: Path | None = None
    save_stats: Path | None = None
    out: Path | None = None  # where scores are added; None: beside the samples
    batch_size: int = 64
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Raises ConfigError for what is impossible whatever the samples are."""
        if self.mode is not None and self.mode not in MODES:
            raise ConfigError(f"unknown mode {self.mode!r}: {nearest(self.mode, MODES)}")
        if self.protocol is not None and self.protocol not in PROTOCOLS:
            raise ConfigError(f"unknown protocol {self.protocol!r}: {nearest(self.protocol, PROTOCOLS)}")
        for metric in self.metrics or ():
            if metric not in known_metrics():
                raise ConfigError(f"unknown metric {metric!r}: {nearest(metric, known_metrics())}; or all")
        for option, value in (("--mode", self.mode), ("--inception", self.inception)):
            if value is not None and self.features not in ("auto", "inception"):
                raise ConfigError(f"{option} is for Inception, and --features is {self.features}: leave one of them out")
        for option, value in (("--repeat", self.repeat), ("--batch-size", self.batch_size), ("--num", self.num)):
            if value is not None and value < 1:
                raise ConfigError(f"{option} must be at least 1, not {value}")
        if self.protocol is not None:
            check_protocol(self)
        elif self.metrics is not None and any(metric in self.metrics for metric in BY_TOWERS) != (self.clip is not None):
            raise ConfigError("the CLIP score and retrieval need both --metrics clip or retrieval and --clip PLACE, a CLIP model")
        if self.captions is not None and self.clip is None:
            raise ConfigError("--captions are for the CLIP score and retrieval: give --clip too")
        if self.save_stats is not None and self.save_stats.suffix not in (".safetensors", ".npz"):
            raise ConfigError(
                f"statistics are written as .safetensors or .npz, by the end of the name: {self.save_stats} has neither"
            )
        for path in (self.out, self.save_stats):
            if path is not None and path.is_dir():
                raise ConfigError(f"{path} is a folder: name a file in it")
        self._refuse_ignored()

    def _refuse_ignored(self) -> None:
        """Raises ConfigError for options that nothing would look at."""
        if self.metrics is None:
            return
        compared = [metric for metric in self.metrics if _compares(metric) or self.protocol is not None]
        given = {"--ref": self.ref, "--ref-num": self.ref_num, "--ref-split": self.ref_split, "--ref-mode": self.ref_mode}
        for option, value in {**given, "--resolution": self.resolution, "--channels": self.channels}.items():
            if value is not None and not compared:
                raise ConfigError(f"{option} is for comparisons, and --metrics {','.join(self.metrics)} has none: leave it out")
        if _only_towers(self.metrics) and self.save_stats is None and self.protocol is None:
            for option, value in (("--mode", self.mode), ("--inception", self.inception)):
                if value is not None:
                    raise ConfigError(f"{option} is for scores by Inception, and --metrics {','.join(self.metrics)} has none: leave it out")
        if self.save_stats is not None and self.ref is None:
            if single := [metric for metric in self.metrics if metric in COMPARISONS]:
                raise ConfigError(f"{COMPARISONS[single[0]].title} with --save-stats need something to compare with: give --ref")
            if self.repeat > 1:
                raise ConfigError("--repeat is for a spread of scores, and --save-stats without --ref gives none: leave it out")


def evaluate(
    samples: Sequence[str],
    settings: FidSettings,
    *,
    process_group: ProcessGroup = ProcessGroup(),
    bar: Bar = lambda what, images: nullcontext(lambda done, of=None: None),
) -> Report:
    """Scores every set of samples that is named; writes statistics where they are asked for.

    Raises ConfigError, DataError, ModelError and MmgenError, each with one sentence.
    """
    protocol = PROTOCOLS.get(settings.protocol)
    if protocol is not None:
        settings = _under(protocol, settings)
    models = [is_model(name) for name in samples]
    _check_options(samples, models, settings)
    subjects: list[Subject] = []
    for name, model in zip(samples, models, strict=True):
        if model:
            for one in _with_averages(name, settings, process_group):
                subjects += _drawn(name, one, protocol)
        else:
            subjects += image_subjects(
                name, split=settings.split or "train", image_column=settings.image_column, num=settings.num,
                follow_links=settings.follow_links,
            )
    if settings.save_stats is not None and len(subjects) > 1:
        raise ConfigError(f"--save-stats writes the statistics of one set of samples, and there are {len(subjects)}: give one")
    for subject in subjects:  # a file that cannot be added to is found before hours of work
        if file := settings.out or subject.draws[0].beside:
            earlier(file)
    metrics = settings.metrics if settings.metrics is not None else known_metrics()
    compared = any(_compares(metric) for metric in metrics)
    if compared and settings.ref is None and settings.save_stats is None:
        own_reference(subjects)  # nothing is downloaded if it is missing
    extractor, why = _NO_FEATURES, None
    if not _only_towers(metrics) or settings.save_stats is not None:
        extractor, why = _extractor(subjects, settings, bar)
    if protocol is not None:
        extractor = replace(extractor, protocol={**extractor.protocol, "images": protocol.crop})
        subjects = [Subject(subject.name, [cropped(images, protocol) for images in subject.draws]) for subject in subjects]
    reference = None
    if compared and (settings.ref is not None or settings.save_stats is None):
        reference = _reference(subjects, settings, extractor, any(metric in COMPARISONS for metric in metrics), protocol, process_group, bar)
    elif compared:
        metrics = tuple(metric for metric in metrics if not _compares(metric))  # only statistics are wanted
    metrics, notes = _possible(metrics, settings, extractor, reference)
    towers = _towers(settings.clip, metrics, settings.device)
    rows = [_score(subject, settings, extractor, metrics, reference, towers, protocol, process_group, bar) for subject in subjects]
    if settings.save_stats is not None and process_group.is_main:
        _save(settings.save_stats, rows[0], extractor)
    notes += [] if why is None else [why]
    clip = None if towers is None else {"network": towers.name, "sha256": towers.sha256}
    if protocol is not None and towers is not None:
        clip |= {"captions": f"{protocol.prefix!r} before each", "score": "mean cosine, 0 to 1"}
        if not towers.name.startswith(protocol.clip):
            notes.append(f"published scores of {protocol.name} take {protocol.clip} laion2b_s12b_b42k, and --clip is {towers.name}: do not compare")
    return Report(rows, reference, extractor, notes, clip, protocol)


def _under(protocol: Protocol, settings: FidSettings) -> FidSettings:
    """The settings that a protocol stands for: its distance and agreement, and whatever else is asked for."""
    pair = ("fid",) if settings.ref is None else ("fid", "clip")
    metrics = None if settings.metrics is None else tuple(dict.fromkeys([*pair, *settings.metrics]))
    return replace(settings, protocol=None, mode=protocol.mode, metrics=metrics)


def _towers(path: str | None, metrics: Sequence[str], device: str) -> Towers | None:
    if not any(metric in BY_TOWERS for metric in metrics):
        return None
    towers = build_towers(path, device)
    if "clip" in metrics and not towers.is_clip:
        raise ConfigError(f"{path} holds towers of one's own and no CLIP: take --metrics retrieval, which has their cosine too")
    return towers


def _check_options(samples: Sequence[str], models: Sequence[bool], settings: FidSettings) -> None:
    """Raises ConfigError for an option that would be ignored."""
    drawing = {key: value for key, value in settings.drawing.items() if value is not None}
    reading = {"split": settings.split, "image-column": settings.image_column}
    for options, there, what in ((drawing, any(models), "a model"), (reading, not all(models), "images")):
        for option, value in options.items():
            if value is not None and not there:
                raise ConfigError(f"--{option.replace('_', '-')} is for {what}, and {samples[0]} is none: leave it out")
    if settings.follow_links and all(models) and settings.ref is None:
        raise ConfigError("--follow-links is for folders, and neither samples nor reference is one: leave it out")
    if settings.repeat > 1 and not any(models) and settings.metrics is not None and "fid" not in settings.metrics:
        raise ConfigError("--repeat of given images is a bootstrap of the Fréchet distance: add fid to --metrics")


def _with_averages(name: str, settings: FidSettings, process_group: ProcessGroup) -> list[FidSettings]:
    """One for each average of --ema-lengths, which the main process makes."""
    drawing = dict(settings.drawing)
    lengths = drawing.pop("ema_lengths", None)
    if lengths is None:
        return [settings]
    if drawing.get("ema") is not None:
        raise ConfigError("--ema and --ema-lengths: give one of them")
    if process_group.is_main:
        for length in lengths:
            make_average(at_home(name), length)
    process_group.wait()
    return [replace(settings, drawing=drawing | {"ema": post_hoc_name(length)}) for length in lengths]


def _drawn(name: str, settings: FidSettings, protocol: Protocol | None) -> list[Subject]:
    from ..sampling.drawing import SampleSettings, plan
    from ..sampling.guidance import Guide
    from ..sampling.prompts import read_prompts
    from ..sampling.record import Origin

    given = {key: value for key, value in settings.drawing.items() if value is not None}
    options = ConvertOptions(**{key: given.pop(key) for key in OPTIONS if key in given})
    origin = Origin.of(name, given.pop("ema", None), options)
    steps, weights, config = given.pop("steps", [None]), given.pop("guidance", [None]), origin.config
    if config.text is not None and settings.captions is not None:
        if settings.captions.suffix.lower() != ".txt":
            raise ConfigError(f"--captions {settings.captions}: what a model is to draw is a .txt file, one prompt a line")
        given["prompts"] = read_prompts(settings.captions)
    num = settings.num or NUM
    if protocol is not None:
        num = _number_of_captions(name, settings.num, given.get("prompts", ()), protocol)
        given["prompts"] = given["prompts"][:num]
    if "guide" in given:
        given["guide"] = Guide.of(given["guide"])
    # In a sweep, the row without guidance has no interval and no guide
    plain = {**given, "guidance_interval": None, "guide": None} if len(weights) > 1 else given
    each = [
        SampleSettings(steps=count, guidance=w, batch_size=settings.batch_size, **(plain if w == 1 else given))
        for count in steps for w in weights
    ]  # fmt: skip
    for one in each:  # before anything is loaded
        plan(config, one)
    return model_subjects(origin.load(settings.device), origin, each, num, settings.repeat)


def _number_of_captions(name: str, num: int | None, captions: Sequence[str], protocol: Protocol) -> int:
    """How many images a protocol draws, one for each of the first captions. Raises ConfigError."""
    if not captions:
        raise ConfigError(f"the protocol {protocol.name} draws an image for each caption: give --captions FILE.txt, and {name} a model of text")
    if num is not None and num > len(captions):
        raise ConfigError(f"--num {num:,}: there are {len(captions):,} captions, and {protocol.name} draws one image for each")
    return num or min(protocol.num, len(captions))


def _extractor(subjects: Sequence[Subject], settings: FidSettings, bar: Bar) -> tuple[Extractor, str | None]:
    """The network that is asked for, or that suits the images, and a note where it is not the usual one."""
    options = {"inception": settings.inception, "device": settings.device}
    name = settings.features
    if name == "auto" and (settings.mode is not None or settings.inception is not None or "is" in (settings.metrics or ())):
        name = "inception"
    if name == "auto" and settings.ref is not None and is_statistics(at_home(settings.ref)):
        name = features_in(at_home(settings.ref))
    images = subjects[0].draws[0]  # if a model draws them, their shape is known without
    shape = subjects[0].record["image"] if images.fingerprint is None else images.shape(False)
    try:
        with bar("downloading Inception", 0) as update:
            if name == "auto":
                return auto_extractor(shape, **options, progress=update)
            return build_extractor(name, settings.mode or "tf", **options, progress=update), None
    except ModelError as error:
        if name == "inception" and max(shape[1:]) < SMALLEST_FOR_INCEPTION:
            raise ModelError(f"{error}; or take --features pixels, which suits images as small as these") from error
        raise


def _reference(
    subjects: Sequence[Subject], settings: FidSettings, extractor: Extractor, single: bool, protocol: Protocol | None,
    process_group: ProcessGroup, bar: Bar,
) -> ReferenceSet:  # fmt: skip
    with bar("decoding the reference", 0) as update:
        found, warning = reference_images(
            settings.ref, subjects, split=settings.ref_split, resolution=settings.resolution, channels=settings.channels,
            num=settings.ref_num, follow_links=settings.follow_links, progress=update,
        )  # fmt: skip
    if isinstance(found, ImageSet):
        if settings.ref_mode is not None:
            raise ConfigError(f"--ref-mode is for a statistics file, and {found.name} holds images: leave it out")
        found = found if protocol is None else cropped(found, protocol)
        with bar(f"reference {found.name}", found.length) as update:
            collected = collect_reference(
                found, extractor, keep=single, batch_size=settings.batch_size, device=settings.device, process_group=process_group, progress=update
            )
            return collected if warning is None else replace(collected, warnings=(*collected.warnings, warning))
    with bar(f"reference {found.name}", 0) as update:
        return file_reference(
            found,
            extractor,
            keep=single,
            ref_mode=settings.ref_mode,
            batch_size=settings.batch_size,
            device=settings.device,
            process_group=process_group,
            progress=update,
        )


def _possible(
    metrics: Sequence[str], settings: FidSettings, extractor: Extractor, reference: ReferenceSet | None
) -> tuple[tuple[str, ...], list[str]]:
    """The metrics that can be had, and a note for each that `all` leaves out. One that was asked for by name is an error."""
    kept, notes = [], []
    for metric in metrics:
        try:
            if metric in BY_TOWERS and settings.clip is None:
                raise ConfigError(f"{'the CLIP score needs' if metric == 'clip' else 'retrieval needs'} --clip PLACE, and captions")
            check_metrics([metric], extractor, reference)
            kept.append(metric)
        except ConfigError as error:
            if settings.metrics is not None:
                raise
            notes.append(str(error))
    return tuple(kept), notes


def _score(
    subject: Subject,
    settings: FidSettings,
    extractor: Extractor,
    metrics: tuple[str, ...],
    reference: ReferenceSet | None,
    towers: Towers | None,
    protocol: Protocol | None,
    process_group: ProcessGroup,
    bar: Bar,
) -> Row:
    drawn = "seed" in subject.record and len(subject.draws) > 1
    chosen = ScoreSettings(
        metrics,
        bootstrap=0 if drawn or settings.repeat == 1 else settings.repeat,
        batch_size=settings.batch_size,
        full=FULL if protocol is None else protocol.num,
        towers=towers,
        captions=None if towers is None else read_captions(subject.draws[0], settings.captions),
        prefix=None if protocol is None else protocol.prefix,
    )
    scores = []
    for number, images in enumerate(subject.draws, 1):
        steps = subject.record.get("steps")
        what = subject.name + (f", {steps} step{'s' * (steps > 1)}" if steps else "")
        what += f", draw {number} of {len(subject.draws)}" if len(subject.draws) > 1 else ""
        with bar(what, images.length) as update:
            progress = update
            if images.telling is not None:  # drawing takes the time
                images, progress = images.telling(update), None
            scores.append(score(images, reference, extractor, chosen, device=settings.device, process_group=process_group, progress=progress))
    return Row(subject, summary(scores), scores)


def _save(file: Path, row: Row, extractor: Extractor) -> None:
    images, score = row.subject.draws[0], row.score
    write_statistics(
        file,
        score.statistics,
        {**extractor.protocol, "image": "x".join(map(str, score.image))},
        source=images.description,
        fingerprint=images.fingerprint() if images.fingerprint is not None else None,
    )
