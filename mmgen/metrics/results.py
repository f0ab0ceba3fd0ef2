"""How a figure was obtained, as JSON beside the samples: whoever compares it later finds every choice."""

from __future__ import annotations

import contextlib
import json
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import __version__
from ..errors import DataError
from ..files import write_json

if TYPE_CHECKING:
    from .evaluate import Report, Row

FORMAT = 1
_MADE = ("model", "model_sha256", "ema", "data", "steps", "nfe", "sampler", "grid", "times", "guidance", "classes", "seed")


def entry(row: Row, report: Report) -> dict[str, Any]:
    """One row of the table with all that it depends on."""
    score, record, reference = row.score, row.subject.record, report.reference
    result = {
        "scored": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "figures": score.figures,
        "spreads": score.spreads,
        "excess_over_50k": score.excess,
        "samples": {
            "name": row.subject.name,
            "description": row.subject.draws[0].description,
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
        result["draws"] = [draw.figures for draw in row.draws]
    if reference is not None:
        result["reference"] = {"name": reference.name, "source": reference.source, "num": reference.num}
    return result


def explanation(report: Report) -> list[str]:
    """How the figures were obtained, a line for each choice."""
    protocol, lines = dict(report.extractor.protocol), []
    if report.reference is not None:
        num = "an unknown number of" if report.reference.num is None else f"{report.reference.num:,}"
        lines.append(f"reference: {report.reference.name}, {num} images ({report.reference.source})")
    if "sha256" in protocol:
        protocol["sha256"] = protocol["sha256"][:12]
    lines.append("features: " + ", ".join(f"{key} {value}" if key != "features" else value for key, value in protocol.items()))
    if report.clip is not None:
        lines.append(f"CLIP: {report.clip['network']}, sha256 {report.clip['sha256'][:12]}")
    made = []
    for row in report.rows:
        record = row.subject.record
        if "model" in record:
            labels = record["classes"] if record.get("classes") is not None else "none"
            draws = f", {len(row.draws)} draws" if len(row.draws) > 1 else ""
            made.append(
                f"samples: {record['model']} (SHA-256 {record['model_sha256'][:12]}), sampler {record['sampler']}, grid "
                f"{record['grid']}, seed {record['seed']}{draws}, labels {labels}"
            )
        else:
            made.append(f"samples: {row.subject.draws[0].description}")
    lines += dict.fromkeys(made)
    lines.append("versions: " + ", ".join(f"{name} {version}" for name, version in versions().items()))
    return lines


def versions() -> dict[str, str]:
    """Of the packages that a figure depends on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"mmgen": __version__, "torch": torch.__version__}
    for package in ("numpy", "pillow", "clean-fid"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def append(file: Path, entries: list[dict[str, Any]]) -> None:
    """Adds entries to a file of scores, the newest last. Raises DataError where the file holds something else."""
    before: list[dict[str, Any]] = []
    if file.exists():
        try:
            content = json.loads(file.read_text())
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']}")
            before = list(content["scores"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{file} holds no scores of this mmgen ({error}): move it away, or give another --out") from error
    write_json(file, {"format": FORMAT, "scores": before + entries})
