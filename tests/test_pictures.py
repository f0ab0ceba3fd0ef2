"""What is shown of a run: a column is a class, real images are of the same classes, scores stand in the captions, curves are told
apart."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import ImageColor
from tiny_model import NAMES

from mmgen import data
from mmgen.models.files import load_model
from mmgen.report.charts import COLOURS, ORDERED, Panel, line_chart
from mmgen.report.images import labelled_rows
from mmgen.training import evaluation


@pytest.fixture
def rows_of(monkeypatch):
    """What `labelled_rows` was last called with."""
    seen = {}
    original = evaluation.labelled_rows

    def spy(rows, **options):
        seen.update(rows=rows, **options)
        return original(rows, **options)

    monkeypatch.setattr(evaluation, "labelled_rows", spy)
    return seen


def test_a_column_is_a_class(digits_model, rows_of, monkeypatch):
    model, digits = load_model(digits_model), data.load("digits")
    asked = []
    original = evaluation.draw
    monkeypatch.setattr(evaluation, "draw", lambda m, settings, *more: asked.append(settings) or original(m, settings, *more))
    evaluation.picture(model, digits, [1, 2], 0, {"1": "FD-pixels 0.24"})
    assert rows_of["names"] == NAMES and rows_of["columns"] == 10
    captions = [caption for caption, _ in rows_of["rows"]]
    assert captions == ["1 step\nFD-pixels 0.24", "2 steps", "real"]
    assert [settings.classes for settings in asked] == [list(range(10))] * 2  # image i has class i % 10
    real = rows_of["rows"][-1][1]
    for i, image in enumerate(np.asarray(real)):
        same = (np.asarray(digits.images) == image).all((1, 2, 3))
        assert i % 10 in digits.labels[same]
    again, other = (evaluation.layout(model.config, digits, seed).real for seed in (0, 1))
    assert np.array_equal(again, evaluation.layout(model.config, digits, 0).real) and not np.array_equal(again, other)


def test_classes_without_images_and_many_classes(digits_model):
    config = load_model(digits_model).config
    digits = data.load("digits")
    some = np.flatnonzero(np.isin(digits.labels, [2, 5]))
    subset = data.Dataset("some", digits.images[some], digits.labels[some], digits.class_names, "some", "some")
    shown = evaluation.layout(config, subset, 0)
    assert shown.classes == [2, 5] and shown.names == [NAMES[2], NAMES[5]]
    assert [int(subset.labels[i]) for i in shown.real] == [2, 5] * 3
    few = data.Dataset("few", digits.images[:1], digits.labels[:1], digits.class_names, "few", "few")
    assert evaluation.layout(config, few, 0).real.tolist() == [0, 0, 0]  # one image, shown thrice


def test_scores_of_a_line():
    line = {"figure": "fid10k", "values": {"1": 3.2049, "2": 12.5}}
    assert evaluation.scores_of(line) == {"1": "fid10k 3.2", "2": "fid10k 12.5"} and evaluation.scores_of({}) == {}


def test_names_stand_above_their_columns():
    images = np.zeros((4, 3, 64, 64), np.uint8)
    plain = np.asarray(labelled_rows([("real", images)], columns=4))
    named = np.asarray(labelled_rows([("real", images)], columns=4, names=["cat", "", "", "a name too long for it, synonym"]))
    head = named[: named.shape[0] - plain.shape[0] + 14]
    edge = named.shape[1] - 16 - (4 * 66 + 2)
    written = [(head[:, edge + 66 * i : edge + 66 * (i + 1) + 2] < 128).any() for i in range(4)]
    assert written == [True, False, False, True] and not (head[:, :edge] < 250).any() and not (head[:, -16:] < 250).any()


def test_eight_levels_have_eight_colours_named_by_sigma():
    edges = np.exp(np.linspace(math.log(0.002), math.log(80), 9)).tolist()
    names = evaluation.level_names(edges, 8)
    assert names[0] == "sigma 0.002 - 0.0075" and names[-1] == "sigma 21 - 80" and len(set(names)) == 8
    assert evaluation.level_names((), 3) == ["level 1", "level 2", "level 3"]
    panel = Panel("by noise", "x", {name: ([0, 1], [i, i]) for i, name in enumerate(names)}, ordered=True)
    assert len(set(panel.colours().values())) == 8 and len(set(ORDERED)) == 8
    picture = np.asarray(line_chart([panel], 600, 400)).astype(int)
    for colour in panel.colours().values():
        assert (np.abs(picture - np.array(ImageColor.getrgb(colour))).sum(2) < 40).sum() > 300, colour
    distances = [
        np.abs(np.subtract(ImageColor.getrgb(a), ImageColor.getrgb(b))).sum() for i, a in enumerate(ORDERED) for b in ORDERED[:i]
    ]
    assert min(distances) > 45


@pytest.mark.parametrize("count, size", [(1, (560, 400)), (3, (1680, 400)), (4, (1680, 800)), (7, (1680, 1200))])
def test_at_most_three_panels_in_a_row(count, size):
    log = [{"images": i, "step": i, "seconds": i, "learning_rate": 1.0, "loss": 1.0 / i} for i in (1, 2, 3)]
    log += [{"images": i, "figure": f"figure {k}", "values": {"1": 1.0 / i}} for k in range(count - 1) for i in (1, 2)]
    picture = evaluation.curves(log)
    assert picture.size == size
    blue = (np.abs(np.asarray(picture).astype(int) - np.array(ImageColor.getrgb(COLOURS[0]))).sum(2) < 40)
    drawn = sum(blue[400 * (i // 3) : 400 * (i // 3 + 1), 560 * (i % 3) : 560 * (i % 3 + 1)].any() for i in range(3 * size[1] // 400))
    assert drawn == count
