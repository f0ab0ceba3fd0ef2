"""From features to scores: each under the name that it may carry, with the warnings that belong to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from ..errors import ConfigError
from ..system.processes import ProcessGroup
from .agreement import Agreement
from .collect import Collected, Progress, Wanted, collect
from .comparisons import COMPARISONS, Pair, named
from .features import Extractor
from .frechet import GaussianStatistics, frechet_distance
from .image_sets import ImageSet
from .reference_sets import ReferenceSet
from .towers import Towers

FULL = 50_000  # samples behind a published FID


@dataclass(frozen=True)
class ScoreSettings:
    metrics: tuple[str, ...] = ("fid",)
    splits: int = 10  # of the Inception Score
    bootstrap: int = 0  # resampled sets for a spread of the Fréchet distance
    batch_size: int = 64  # images at a time; no influence on the scores
    bias: bool = True  # estimate how much too high the distance is for want of samples
    full: int = FULL  # samples behind the published scores that these are to be compared with
    towers: Towers | None = None  # for clip and retrieval
    captions: Sequence[str] | None = None  # one an image
    prefix: str | None = None  # of a protocol: CLIP sees it before each caption, and its mean cosine is shown, 0 to 1


@dataclass
class Score:
    """The scores of one set of samples."""

    num: int
    image: tuple[int, ...]  # (C, H, W) of the first
    metrics: dict[str, float]  # by name, in the order of display
    spreads: dict[str, float] = field(default_factory=dict)  # standard error or deviation, under the metric's name
    excess: float | None = None  # how much higher the distance is than with `ScoreSettings.full` samples, about; None: not estimated
    warnings: list[str] = field(default_factory=list)
    statistics: GaussianStatistics | None = None  # of the features


def check_metrics(metrics: Sequence[str], extractor: Extractor, reference: ReferenceSet | None) -> None:
    """Raises ConfigError where a metric is impossible under these features or with this reference."""
    for metric in metrics:
        if metric == "is" and extractor.probabilities is None:
            raise ConfigError(
                f"the Inception Score needs Inception's classes, which {extractor.title} has not: --mode tf has them"
            )
        if metric in COMPARISONS and reference is not None and reference.kept is None:
            raise ConfigError(
                f"{COMPARISONS[metric].title} compare single images, and the reference is a file of mean and covariance: "
                "give --ref a data set or a folder of images, or leave the metric out"
            )


def metric_name(title: str, num: int) -> str:
    """FID for 50,000 samples and more, fid10k for fewer; FD-pixels, or FD-pixels-1797 for fewer.

    >>> metric_name("FID", 10_000), metric_name("FD-pixels", 1797), metric_name("FID", 50_000)
    ('fid10k', 'FD-pixels-1797', 'FID')
    """
    if num >= FULL:
        return title
    number = f"{num // 1000}k" if num % 1000 == 0 else str(num)
    return f"fid{number}" if title == "FID" else f"{title}-{number}"


def score(
    samples: ImageSet,
    reference: ReferenceSet | None,
    extractor: Extractor,
    settings: ScoreSettings = ScoreSettings(),
    *,
    device: torch.device | str = "cpu",
    process_group: ProcessGroup = ProcessGroup(),
    progress: Progress | None = None,
) -> Score:
    """One pass over the samples, then all metrics asked for. Without a reference: only those that need none.

    Raises ConfigError where samples and reference do not fit together, and as `collect.collect`.
    """
    check_metrics(settings.metrics, extractor, reference)
    image = samples.shape(extractor.colour)
    warnings = _check_images(image, reference, extractor)
    single = any(metric in COMPARISONS for metric in settings.metrics)
    distance = reference is not None and "fid" in settings.metrics
    wanted = Wanted(
        keep=single,
        splits=settings.splits if "is" in settings.metrics else 0,
        halves=distance and settings.bias and 4 <= samples.length < settings.full,
        bootstrap=settings.bootstrap if distance else 0,
        towers=settings.towers,
        captions=None if settings.captions is None else [(settings.prefix or "") + text for text in settings.captions],
    )
    collected = collect(samples, extractor, wanted, batch_size=settings.batch_size, device=device, process_group=process_group, progress=progress)
    result = Score(samples.length, image, {}, warnings=warnings, statistics=collected.statistics)
    if distance:
        _add_distance(result, collected, reference, extractor, settings.full)
    if reference is not None and single:
        pair = Pair(reference.kept, collected.kept, extractor.title)
        for metric in (metric for metric in COMPARISONS if metric in settings.metrics):
            for name, (value, error) in COMPARISONS[metric].scores(pair).items():
                result.metrics[name] = value
                if error is not None:
                    result.spreads[name] = error
    if collected.inception is not None:
        mean, deviation = collected.inception.result()
        name = named("Inception Score", "IS", extractor.title)
        result.metrics[name], result.spreads[name] = mean, deviation
    if collected.agreement is not None:
        _add_agreement(result, collected.agreement, settings)
    return result


def _add_agreement(result: Score, agreement: Agreement, settings: ScoreSettings) -> None:
    if "clip" in settings.metrics and settings.prefix is not None:
        result.metrics["CLIP cosine"] = float(agreement.cosines().mean())
    elif "clip" in settings.metrics:
        result.metrics["CLIP score"] = agreement.clip_score()
    if "retrieval" in settings.metrics:
        result.metrics |= agreement.retrieval()
        captions = len(agreement.captions)
        result.warnings.append(f"R@k: among {captions:,} different captions, where chance is k / {captions:,}")


def _add_distance(result: Score, collected: Collected, reference: ReferenceSet, extractor: Extractor, full: int) -> None:
    name = metric_name(extractor.title, collected.num)
    value = frechet_distance(reference.gaussian, collected.statistics)
    result.metrics[name] = value
    if collected.replicates:
        draws = [frechet_distance(reference.gaussian, replicate) for replicate in collected.replicates]
        result.spreads[name] = _deviation(draws)
    if collected.statistics.is_singular:  # the rank is at most N - 1
        result.warnings.append(
            f"with only {collected.num:,} images {name} is not meaningful: the covariance of {len(collected.statistics.mean):,} "
            "features is singular"
        )
    elif collected.num < full:
        result.excess = _excess(collected, reference, value, full)
        known = "" if result.excess is None else "; the excess in the table is estimated from random halves of them"
        result.warnings.append(f"{name} is biased: fewer samples than {full:,} raise it{known}")
    dim = len(collected.statistics.mean)
    if reference.num is not None and reference.num <= dim:
        result.warnings.append(f"the reference has {reference.num:,} images for {dim:,} features: its covariance is singular")


def _excess(collected: Collected, reference: ReferenceSet, value: float, full: int) -> float | None:
    """How much higher the distance is than with `full` samples: it falls as c / N (Chong and Forsyth, 2020, section 3).

    c comes from two random halves of the samples; None where those are too few, or it comes out negative.
    """
    if collected.halves is None or any(half.is_singular for half in collected.halves):
        return None
    slopes = [
        (frechet_distance(reference.gaussian, half) - value) / (1 / half.count - 1 / collected.num) for half in collected.halves
    ]
    excess = sum(slopes) / len(slopes) * (1 / collected.num - 1 / full)
    return excess if excess > 0 else None


def _check_images(image: tuple[int, ...], reference: ReferenceSet | None, extractor: Extractor) -> list[str]:
    """Raises ConfigError, or warns, where samples and reference are images of different sizes."""
    if reference is None or reference.image is None or reference.image == image:
        return list(extractor.warnings) + list(reference.warnings if reference else ())
    mine, theirs = (f"{shape[2]}x{shape[1]}, {shape[0]} channel{'s' * (shape[0] > 1)}" for shape in (image, reference.image))
    text = f"the samples are {mine}, the images of {reference.name} {theirs}"
    if extractor.same_size:
        raise ConfigError(f"{text}: {_remedy(image, reference.image)}")
    return [*extractor.warnings, *reference.warnings, f"{text}: the score compares the resizing as well"]


def _remedy(mine: tuple[int, ...], theirs: tuple[int, ...]) -> str:
    """What brings a reference's images to the samples' (C, H, W)."""
    if mine[1] != mine[2] and mine[1:] != theirs[1:]:
        return "give a --ref of that size"
    options = [f"--channels {mine[0]}"] if mine[0] != theirs[0] else []
    options += [f"--resolution {mine[1]}"] if mine[1:] != theirs[1:] else []
    return f"{' '.join(options)} reads the reference so, as training does"


def summary(draws: Sequence[Score]) -> Score:
    """Several draws of one model as one score: the least distance, as the papers report it, else the mean; and the spread."""
    if len(draws) == 1:
        return draws[0]
    first = draws[0]
    values = {name: [draw.metrics[name] for draw in draws] for name in first.metrics}
    metrics = {
        name: min(found) if name.startswith(("FID", "fid", "FD-")) else sum(found) / len(found) for name, found in values.items()
    }
    spreads = {name: _deviation(found) for name, found in values.items()}
    warnings = list(dict.fromkeys(w for draw in draws for w in draw.warnings))
    estimates = [draw.excess for draw in draws if draw.excess is not None]
    excess = sum(estimates) / len(estimates) if estimates else None
    return replace(first, metrics=metrics, spreads=spreads, excess=excess, warnings=warnings)


def _deviation(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1))
