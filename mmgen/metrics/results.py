"""How a score was computed, as JSON beside the samples, with every choice that it depends on."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..data.cache import cache_root
from ..errors import DataError
from ..system.files import read_json, write_json
from ..system.lock import one_at_a_time
from .features import Extractor
from .protocols import Protocol
from .reference_sets import ReferenceSet
from .score import Score
from .subjects import Subject

FORMAT = 1
_MADE = (
    "model", "model_file", "model_sha256", "ema", "data", "data_place", "data_fingerprint", "data_content", "vae", "steps",
    "nfe", "sampler", "grid", "times", "churn", "s_tmin", "s_tmax", "s_noise", "stochasticity", "guidance", "guidance_interval", "guide", "guide_sha256",
    "classes", "prompts", "prompts_sha256", "seed", "precision",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One set of samples, scored."""

    subject: Subject
    score: Score  # of several draws: their summary
    draws: list[Score]


@dataclass(frozen=True)
class Report:
    rows: list[Row]
    reference: ReferenceSet | None
    extractor: Extractor
    notes: list[str]  # which metrics were left out, and why
    clip: dict[str, str] | None = None  # the network of the CLIP score and of retrieval, and how it is asked
    protocol: Protocol | None = None

    @property
    def scores(self) -> dict[str, float]:
        """Those of the first set of samples, by name."""
        return self.rows[0].score.metrics


def entry(row: Row, report: Report) -> dict[str, Any]:
    """One row of the table with all that it depends on."""
    score, record, reference, images = row.score, row.subject.record, report.reference, row.subject.draws[0]
    result = {
        "scored": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "figures": score.metrics,
        "spreads": score.spreads,
        "excess_over_50k": score.excess,
        "samples": {
            "name": row.subject.name,
            "place": images.path,
            "fingerprint": images.fingerprint() if images.fingerprint is not None else None,
            "description": images.description,
            "num": score.num,
            "image": list(score.image),
            **{key: record[key] for key in _MADE if key in record},
        },
        "protocol": report.extractor.protocol,
        "clip": report.clip,
        "reference": None,
        "warnings": score.warnings,
        "versions": versions(),
    }
    if len(row.draws) > 1:  # draw r has images number r N to (r + 1) N - 1: image i has the randomness of (seed, i)
        result["draws"] = [draw.metrics for draw in row.draws]
    if reference is not None:
        result["reference"] = {
            "name": reference.name, "source": reference.source, "num": reference.num, "place": reference.path,
            "fingerprint": reference.fingerprint,
        }  # fmt: skip
    return result


def explanation(report: Report) -> list[str]:
    """How the scores were computed, a line for each choice."""
    protocol, lines = dict(report.extractor.protocol), []
    if report.protocol is not None:
        lines.append(f"protocol: {report.protocol.name}, as {report.protocol.where}")
    if report.reference is not None:
        num = "an unknown number of" if report.reference.num is None else f"{report.reference.num:,}"
        lines.append(f"reference: {report.reference.name}, {num} images ({report.reference.source}){_at(report.reference)}")
    if "sha256" in protocol:
        protocol["sha256"] = protocol["sha256"][:12]
    lines.append("features: " + ", ".join(f"{key} {value}" if key != "features" else value for key, value in protocol.items()))
    if report.clip is not None:
        more = "".join(f", {key} {value}" for key, value in report.clip.items() if key not in ("network", "sha256"))
        lines.append(f"towers: {report.clip['network']}, sha256 {report.clip['sha256'][:12]}{more}")
    made = []
    for row in report.rows:
        record = row.subject.record
        if "model" in record:
            made.append(f"samples: {record['model']}{_making(record, len(row.draws))}")
        else:
            made.append(f"samples: {row.subject.draws[0].description}")
    lines += dict.fromkeys(made)
    lines.append("versions: " + ", ".join(f"{name} {version}" for name, version in versions().items()))
    return lines


def _at(reference: ReferenceSet) -> str:
    """Where it lies, unless its name says so already."""
    return f", in {reference.path}" if reference.path and not reference.path.endswith(reference.name.rstrip("/")) else ""


def _making(record: dict[str, Any], draws: int) -> str:
    """How a model's samples were drawn, as far as their record says."""
    shown = ("sampler", *(key for key in ("churn", "stochasticity", "guide") if record.get(key) is not None), "grid", "seed")
    parts = [f", {key} {record[key]}" for key in shown if key in record]
    if "model_sha256" in record:
        parts.insert(0, f" (SHA-256 {record['model_sha256'][:12]})")
    if draws > 1:
        parts.append(f", {draws} draws")
    if record.get("prompts"):
        parts.append(f", {record['prompts']:,} prompts (SHA-256 {str(record.get('prompts_sha256'))[:12]})")
    if "classes" in record:
        parts.append(f", labels {record['classes'] if record['classes'] is not None else 'none'}")
    return "".join(parts)


def versions() -> dict[str, str]:
    """The versions of the packages that a score depends on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"mmgen": __version__, "torch": torch.__version__}
    for package in ("numpy", "pillow", "clean-fid"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def append(file: Path, entries: list[dict[str, Any]]) -> None:
    """Adds entries to a file of scores, the newest last. Raises DataError where the file holds something else."""
    with _locked(file):  # several may score into one file at once
        write_json(file, {"format": FORMAT, "scores": earlier(file) + entries})


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Holds the lock of a file of scores, which lies in the cache: beside the samples it would be litter.

    Where the cache has no locks or cannot be written, goes on without.
    """
    name = hashlib.sha256(str(file.absolute()).encode()).hexdigest()
    with contextlib.ExitStack() as held:
        with contextlib.suppress(DataError):
            held.enter_context(one_at_a_time(cache_root() / "locks" / f"{name}.lock"))
        yield


def earlier(file: Path) -> list[dict[str, Any]]:
    """The entries of a file of scores; none where there is no file. Raises DataError where it holds something else."""
    if not file.exists():
        return []
    try:
        content = read_json(file)
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}")
        return list(content["scores"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} holds no scores of this mmgen ({error}): move it away, or give another --out") from error
