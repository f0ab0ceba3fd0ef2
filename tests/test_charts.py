"""Charts: the ticks, the labels, and that lines are drawn where the values say."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from PIL import ImageColor

from mmgen.report.charts import COLOURS, Panel, line_chart, linear_ticks, log_ticks, tick_labels

NAN, INF = float("nan"), float("inf")


def where(picture, colour: str) -> np.ndarray:
    """The pixels (row, column) close to a colour."""
    distance = np.abs(np.asarray(picture).astype(int) - np.array(ImageColor.getrgb(colour))).sum(2)
    return np.argwhere(distance < 40)


@pytest.mark.parametrize(
    "low, high, about, expected",
    [(0, 10, 5, [0, 2, 4, 6, 8, 10]), (0, 1e6, 4, [0, 5e5, 1e6]), (-1.2, 3.1, 5, [-1, 0, 1, 2, 3])],
)
def test_linear_ticks(low, high, about, expected):
    assert linear_ticks(low, high, about) == pytest.approx(expected)


def test_linear_ticks_are_round_and_inside():
    source = random.Random(0)
    for _ in range(300):
        low = source.uniform(-1, 1) * 10 ** source.uniform(-6, 6)
        high = low + 10 ** source.uniform(-6, 6)
        if high - low < 1e-8 * abs(low):
            continue
        ticks = linear_ticks(low, high)
        assert 2 <= len(ticks) <= 6
        assert low - 1e-6 * (high - low) <= ticks[0] and ticks[-1] <= high + 1e-6 * (high - low)
        names = tick_labels(ticks)
        assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (0.5e-3, 2.0, [1e-3, 1e-2, 1e-1, 1]),  # powers of ten
        (0.015, 0.6, [0.02, 0.05, 0.1, 0.2, 0.5]),  # narrow: 2 and 5 too
        (1.05, 1.45, [1.1, 1.2, 1.3, 1.4]),  # very narrow: as on a linear axis
        (1e-9, 1e6, [1e-9, 1e-6, 1e-3, 1, 1e3, 1e6]),  # wide: every third
    ],
)
def test_log_ticks(low, high, expected):
    assert log_ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    "ticks, expected",
    [
        ([0, 5e5, 1e6, 1.5e6], ["0", "500k", "1M", "1.5M"]),
        ([0.02, 0.05, 0.1], ["0.02", "0.05", "0.1"]),
        ([0.1 * k for k in range(4)], ["0", "0.1", "0.2", "0.3"]),
        ([1e-6, 1e-3, 1], ["1e-6", "0.001", "1"]),
        ([-2e-5, 0, 2e-5], ["-2e-5", "0", "2e-5"]),
        ([1e6, 1.0001e6, 1.0002e6], ["1M", "1.0001M", "1.0002M"]),
        ([1e9, 2e9, 3e12], ["1G", "2G", "3T"]),
        ([200, 400], ["200", "400"]),
        ([7.0], ["7"]),
        ([], []),
    ],
)
def test_tick_labels(ticks, expected):
    assert tick_labels(ticks) == expected


def test_a_falling_line_falls():
    picture = line_chart([Panel("loss", "steps", {"loss": ([0, 50, 100], [100, 10, 1])}, log_y=True)], 400, 300)
    assert picture.size == (400, 300) and picture.mode == "RGB"
    pixels = where(picture, COLOURS[0])
    (y0, x0), (y1, x1) = pixels[pixels[:, 1].argmin()], pixels[pixels[:, 1].argmax()]
    assert x1 - x0 > 250 and y1 - y0 > 150
    middle = pixels[np.abs(pixels[:, 1] - (x0 + x1) / 2) < 1.5][:, 0].mean()
    assert middle == pytest.approx((y0 + y1) / 2, abs=4)  # straight on the logarithmic axis


def test_what_cannot_be_drawn_is_left_out():
    clean = Panel("p", "x", {"a": ([0, 2, 4], [1, 3, 2])}, log_y=True)
    broken = Panel("p", "x", {"a": ([0, 1, 2, 3, 3.5, NAN, 4, INF], [1, NAN, 3, 0, -1, 2, 2, 2])}, log_y=True)
    assert line_chart([clean]).tobytes() == line_chart([broken]).tobytes()
    infinite = Panel("p", "x", {"a": ([0, 1, 2, 4], [1, INF, 3, 2])}, log_y=True)
    assert line_chart([clean]).tobytes() == line_chart([infinite]).tobytes()


def test_a_logarithmic_horizontal_axis_has_decades_at_equal_distances():
    picture = line_chart([Panel("p", "x", {"p": ([1, 10, 100], [1, 2, 1])}, log_x=True)], 400, 300)
    columns = np.unique(where(picture, COLOURS[0])[:, 1])
    peak = where(picture, COLOURS[0])
    top = peak[peak[:, 0] == peak[:, 0].min()][:, 1].mean()
    assert abs(top - (columns.min() + columns.max()) / 2) < 3
    left_out = line_chart([Panel("p", "x", {"p": ([0, -1, 1, 10, 100], [3, 3, 1, 2, 1])}, log_x=True)], 400, 300)
    assert np.array_equal(np.asarray(left_out), np.asarray(picture))


@pytest.mark.parametrize("log_y", [False, True])
@pytest.mark.parametrize(
    "series",
    [
        {},
        {"empty": ([], [])},
        {"nothing finite": ([0, 1], [NAN, INF])},
        {"one": ([300], [2.5])},
        {"constant": ([0, 1, 2], [3, 3, 3])},
        {"zeros": ([0, 1], [0, 0])},
        {"negative": ([0, 1], [-1, -2])},
        {"one place": ([5, 5], [1, 2])},
        {"nearly constant": ([0, 1], [1, 1 + 1e-7])},
        {"huge": ([0, 1], [1e-310, 1e308]), "tiny": ([0, 1e-310], [1e-300, 1e-200])},
        {"far": ([0, 1e300], [-1e289, 1e289])},
        {f"a series of some name {i}": ([0, 1], [i, i + 1]) for i in range(12)},
    ],
)
def test_awkward_series_are_drawn(series, log_y):
    assert line_chart([Panel("title", "x", series, log_y)], 320, 200).size == (320, 200)


def test_panels_lie_beside_or_below_each_other():
    left = Panel("left", "x", {"a": ([0, 1], [0, 1])})
    right = Panel("right", "x", {"b": ([0, 1], [0, 1])})
    pixels = where(line_chart([left, right], 800, 300), COLOURS[0])
    assert pixels[:, 1].min() < 150 and pixels[:, 1].max() > 650
    first, second = pixels[pixels[:, 1] < 400], pixels[pixels[:, 1] >= 400]
    assert math.isclose(len(first), len(second), rel_tol=0.05)
    pixels = where(line_chart([left, right], 300, 500), COLOURS[0])
    assert pixels[:, 0].min() < 150 and pixels[:, 0].max() > 400


def test_every_series_has_its_colour():
    series = {f"{i} steps": ([0, 1], [i, i]) for i in range(len(COLOURS))}
    picture = line_chart([Panel("FD", "x", series)], 600, 400)
    assert all(len(where(picture, colour)) > 300 for colour in COLOURS)


def test_refusals():
    with pytest.raises(ValueError, match="at least one panel"):
        line_chart([])
    with pytest.raises(ValueError, match="more room"):
        line_chart([Panel("a", "x"), Panel("b", "x")], 200, 100)
    with pytest.raises(ValueError):
        line_chart([Panel("a", "x", {"a": ([1, 2], [1])})])
