"""A small line chart drawn with Pillow: the loss and the distance over training, without a plotting library."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from PIL import Image, ImageDraw, ImageFont

# Okabe and Ito's colours, told apart by people who see colours differently, the darker ones first.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# For series in an order, such as noise levels: viridis without its palest end, dark to light.
ORDERED = ("#440154", "#46327E", "#365C8D", "#277F8E", "#1FA187", "#4AC16D", "#A0DA39", "#E3B505")
_INK, _SOFT, _LINES, _AXIS = "#222222", "#666666", "#E6E6E6", "#999999"
_DRAWN = 2  # drawn at twice the size and reduced: smooth lines
_DOTTED = 24  # series of at most so many points show each
_TINY, _HUGE = 1e-290, 1e290  # beyond these the arithmetic of an axis would overflow

_SUFFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title: written above.
        xlabel: written below.
        series: name -> (x, y). Points that are not finite (or beyond 1e290), and on a logarithmic axis those not above
            zero, are left out.
        log_y, log_x: a logarithmic vertical, or horizontal, axis.
        ordered: the series are in an order, which their colours show.
        labels: name of a series -> a word beside each of its points.
    """

    title: str
    xlabel: str
    series: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict)
    log_y: bool = False
    ordered: bool = False
    labels: dict[str, list[str]] = field(default_factory=dict)
    log_x: bool = False

    def colours(self) -> dict[str, str]:
        palette = ORDERED if self.ordered else COLOURS
        spread = (len(ORDERED) - 1) / max(len(self.series) - 1, 1) if self.ordered and len(self.series) < len(ORDERED) else 1
        return {name: palette[round(i * spread) % len(palette)] for i, name in enumerate(self.series)}


@dataclass(frozen=True)
class _Axis:
    """From values to pixels: `low` lies at pixel `start`, `high` at pixel `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        if self.log:
            part = (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        else:
            part = (value - self.low) / (self.high - self.low)
        return self.start + part * (self.end - self.start)


def line_chart(panels: list[Panel], width: int = 1000, height: int = 360, across: int | None = None) -> Image.Image:
    """Draws the panels, `across` in a row: RGB, width x height.

    across: None draws all side by side, or one above the other where the picture is higher than wide.

    Raises ValueError for no panels, less than 160 x 120 pixels for one of them, or an x and y of different lengths.
    """
    if not panels:
        raise ValueError("a chart needs at least one panel")
    if across is None:
        across = len(panels) if width >= height else 1
    down = -(-len(panels) // across)
    if width < 160 * across or height < 120 * down:
        raise ValueError(f"{len(panels)} panels need more room than {width} x {height} pixels")
    canvas = Image.new("RGB", (width * _DRAWN, height * _DRAWN), "white")
    draw = ImageDraw.Draw(canvas)
    font = _font(12)
    legends = [_legend(panel, font, (width / across - 44) * _DRAWN) for panel in panels]
    for i, (panel, legend) in enumerate(zip(panels, legends, strict=True)):
        column, row = i % across, i // across
        left, right = (width * _DRAWN * c // across for c in (column, column + 1))
        top, bottom = (height * _DRAWN * r // down for r in (row, row + 1))
        lines = max(map(len, legends[row * across : (row + 1) * across]))  # axes side by side begin at the same height
        head = (34 + 18 * lines) * _DRAWN
        _draw_panel(draw, panel, legend, head, (left, top, right, bottom))
    return canvas.reduce(_DRAWN)


def linear_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) within [low, high], about `about` of them; low < high."""
    step = _nice_step((high - low) / about)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def log_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Powers of ten within [low, high]; also 2 and 5 times these in a narrow range, round numbers in a narrower."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    every = max(1, math.ceil((last - first + 1) / (about + 1)))
    powers = [k for k in range(first, last + 1) if k % every == 0]
    if len(powers) >= 3:
        return [10.0**k for k in powers]
    finer = [m * 10.0**k for k in range(first - 1, last + 1) for m in (1, 2, 5)]
    finer = [tick for tick in finer if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
    return finer if len(finer) >= 3 else [tick for tick in linear_ticks(low, high, about) if tick > 0]


def tick_labels(ticks: list[float]) -> list[str]:
    """Short names of ticks, with as many digits as tell neighbours apart: 0, 500k, 1M; 0.02, 0.05, 0.1; 1e-6."""
    steps = [b - a for a, b in zip(ticks, ticks[1:])]
    digits = 3
    if steps:
        digits = min(max(digits, math.ceil(math.log10(max(map(abs, ticks)) / min(steps))) + 2), 12)
    return [_short(tick, digits) for tick in ticks]


def _short(value: float, digits: int) -> str:
    size = abs(value)
    if size == 0:
        return "0"
    if size < 1e-4 or size >= 1e15:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{float(mantissa):.{digits}g}e{int(exponent)}"
    for unit, suffix in _SUFFIXES:
        if size >= unit * (1 - 1e-12):
            return f"{value / unit:.{digits}g}{suffix}"
    return f"{value:.{digits}g}"


def _nice_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= step * (1 - 1e-9))


def _points(panel: Panel) -> dict[str, list[tuple[float, float]]]:
    """The points of each series that can be drawn, in the order given."""
    kept = {}
    for name, (xs, ys) in panel.series.items():
        pairs = ((float(x), float(y)) for x, y in zip(xs, ys, strict=True))
        least_x, lowest = (_TINY if log else -_HUGE for log in (panel.log_x, panel.log_y))
        kept[name] = [(x, y) for x, y in pairs if least_x <= x <= _HUGE and lowest <= y <= _HUGE]  # false for NaN
    return kept


def _range(values: list[float], log: bool, margin: float) -> tuple[float, float]:
    """What an axis spans: the values with a margin on both sides; a single value lies in the middle."""
    if not values:
        return (0.1, 10.0) if log else (0.0, 1.0)
    low, high = min(values), max(values)
    if log:
        low, high = math.log10(low), math.log10(high)
        if high - low < 1e-6:
            low, high = low - 0.5, high + 0.5
        spare = margin * (high - low)
        return 10 ** max(low - spare, -305), 10 ** min(high + spare, 305)
    if high - low <= max(1e-9 * max(abs(low), abs(high)), _TINY):
        reach = abs(low) / 2 if abs(low) > _TINY else 1.0
        return low - reach, high + reach
    spare = margin * (high - low)
    lowest = low - spare
    return (0.0 if low >= 0 > lowest else lowest), high + spare


def _font(size: float) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size * _DRAWN)


def _draw_panel(
    draw: ImageDraw.ImageDraw,
    panel: Panel,
    legend: list[list[str]],
    head: float,  # drawn pixels above the axes, for the title and the legend
    box: tuple[int, int, int, int],
) -> None:
    left, top, right, bottom = box
    u = _DRAWN
    small, normal, large = _font(11), _font(12), _font(14)
    points = _points(panel)
    everything = [point for series in points.values() for point in series]
    x_low, x_high = _range([x for x, _ in everything], panel.log_x, 0.06 if panel.labels else 0.0)
    y_low, y_high = _range([y for _, y in everything], panel.log_y, 0.06)

    head += top
    foot = max(bottom - 46 * u, head + u)
    y_ticks = (log_ticks if panel.log_y else linear_ticks)(y_low, y_high, max(2, round((foot - head) / (40 * u))))
    if not everything:
        y_ticks = []
    y_names = tick_labels(y_ticks)
    inner = left + 22 * u + max((math.ceil(small.getlength(name)) for name in y_names), default=0)
    outer = right - 22 * u
    x_ticks = (log_ticks if panel.log_x else linear_ticks)(x_low, x_high, max(2, round((outer - inner) / (70 * u)))) if everything else []
    x_axis = _Axis(x_low, x_high, inner + 6 * u, outer - 6 * u, panel.log_x)
    y_axis = _Axis(y_low, y_high, foot, head, panel.log_y)

    for tick, name in zip(y_ticks, y_names, strict=True):
        y = y_axis(tick)
        draw.line([(inner, y), (outer, y)], fill=_LINES, width=u)
        draw.text((inner - 6 * u, y), name, fill=_SOFT, font=small, anchor="rm")
    for tick, name in zip(x_ticks, tick_labels(x_ticks), strict=True):
        x = x_axis(tick)
        draw.line([(x, foot), (x, foot + 4 * u)], fill=_AXIS, width=u)
        draw.text((x, foot + 7 * u), name, fill=_SOFT, font=small, anchor="ma")
    draw.line([(inner, foot), (outer, foot)], fill=_AXIS, width=u)
    draw.text((inner, top + 10 * u), panel.title, fill=_INK, font=large, anchor="la")
    draw.text(((inner + outer) / 2, bottom - 8 * u), panel.xlabel, fill=_SOFT, font=normal, anchor="md")

    colour = panel.colours()
    for row, names in enumerate(legend):
        x, y = inner, top + (40 + 18 * row) * u
        for name in names:
            draw.line([(x, y), (x + 16 * u, y)], fill=colour[name], width=3 * u)
            draw.text((x + 22 * u, y), name, fill=_INK, font=normal, anchor="lm")
            x += 40 * u + normal.getlength(name)
    for name, series in points.items():
        _draw_series(draw, [(x_axis(x), y_axis(y)) for x, y in series], colour[name])
        for (x, y), word in zip(series, panel.labels.get(name, ()), strict=False):
            draw.text((x_axis(x) + 7 * u, y_axis(y) - 7 * u), word, fill=colour[name], font=small, anchor="ls")
    if not everything:
        draw.text(((inner + outer) / 2, (head + foot) / 2), "no data yet", fill=_SOFT, font=normal, anchor="mm")


def _draw_series(draw: ImageDraw.ImageDraw, points: list[tuple[float, float]], colour: str) -> None:
    if len(points) > 1:
        draw.line(points, fill=colour, width=2 * _DRAWN if len(points) <= _DOTTED else 3 * _DRAWN // 2, joint="curve")
    radius = 3 * _DRAWN
    for x, y in points if len(points) <= _DOTTED else ():
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour)


def _legend(panel: Panel, font: ImageFont.FreeTypeFont, room: float) -> list[list[str]]:
    """The names of the series in as many lines as they need; none where the title names the only line."""
    lines: list[list[str]] = []
    used = 0.0
    for name in panel.series if list(panel.series) != [panel.title] else ():
        width = 40 * _DRAWN + font.getlength(name)
        if not lines or used + width > room:
            lines.append([])
            used = 0.0
        lines[-1].append(name)
        used += width
    return lines
