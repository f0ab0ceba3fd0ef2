"""Distance and agreement as pairs: a chart of a sweep over guidance, or of several models."""

from __future__ import annotations

from PIL import Image

from ..report.charts import Panel, line_chart
from .results import Report, Row

_DISTANCES = ("FID", "fid", "FD-")
_AGREEMENT = ("CLIP cosine", "CLIP score", "cosine")


def sweep_chart(report: Report) -> Image.Image | None:
    """A point for each row, labelled with its guidance; None where no two rows have both a distance and an agreement."""
    pairs = [(row, *_pair(row)) for row in report.rows if _pair(row) is not None]
    if len(pairs) < 2:
        return None
    series: dict[str, tuple[list[float], list[float]]] = {}
    labels: dict[str, list[str]] = {}
    for row, (agreement, x), (distance, y) in pairs:
        record = row.subject.record
        name = row.subject.name + (f", {record['steps']} steps" if "steps" in record else "")
        xs, ys = series.setdefault(name, ([], []))
        xs.append(x)
        ys.append(y)
        labels.setdefault(name, []).append(f"{record['guidance']:g}" if "guidance" in record else "")
    title = f"{distance} (lower is better); numbers: guidance"
    return line_chart([Panel(title, f"{agreement} (higher is better)", series, labels=labels)], width=640, height=480)


def _pair(row: Row) -> tuple[tuple[str, float], tuple[str, float]] | None:
    """(name, value) of the agreement and of the distance."""
    metrics = row.score.metrics
    agreement = next((name for name in _AGREEMENT if name in metrics), None)
    distance = next((name for name in metrics if name.startswith(_DISTANCES)), None)
    if agreement is None or distance is None:
        return None
    return (agreement, metrics[agreement]), (distance, metrics[distance])
