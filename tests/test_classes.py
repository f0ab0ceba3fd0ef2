"""Classes: a word means a name or a number and not now one, now the other; one without images is never drawn or counted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from fid_tools import run, scores
from PIL import Image
from tiny_model import NAMES, make_model

import mmgen
from mmgen import data
from mmgen.cli.fid import fid
from mmgen.cli.sample import sample
from mmgen.errors import ConfigError
from mmgen.models.files import load_model, read_config
from mmgen.sampling.classes import class_numbers, random_labels, with_images
from mmgen.sampling.drawing import SampleSettings, draw, draw_condition, plan


@pytest.fixture
def config(digits_model):
    return read_config(digits_model)


def named(config, *names, counts=None):
    return replace(config, num_classes=len(names), class_names=list(names), class_counts=counts)


# ---- words


def test_a_word_is_a_name_where_all_names_are_numbers(config):
    years = named(config, "2", "0", "1", "11")
    assert class_numbers("2,0,11", years) == [0, 1, 3]
    with pytest.raises(ConfigError, match="unknown class '3': .*2, 0, 1, 11; also random, balanced"):
        class_numbers("3", years)  # the number of the last, and no name
    digits = named(config, *map(str, range(10)))
    assert class_numbers("3, 5", digits) == [3, 5]


def test_otherwise_a_number_is_a_number(config):
    words = named(config, "cat", "dog", "a, b")
    assert class_numbers("dog,0,CAT", words) == [1, 0, 0] and class_numbers("a, b", words) == [2]
    assert class_numbers("1", replace(config, class_names=None)) == [1]


def test_a_word_that_is_both_is_refused(config):
    mixed = named(config, "1", "cat", "2")
    with pytest.raises(ConfigError, match=r"'1' is the name of class 0 and the number of class 1 \(cat\)"):
        class_numbers("1", mixed)
    assert class_numbers("2,0", mixed) == [2, 0]  # the name of number 2
    with pytest.raises(ConfigError, match="'crane' is the name of the classes 0, 2: give the number of one"):
        class_numbers("crane", named(config, "crane", "dog", "crane"))


def test_the_command_and_python_understand_the_same(digits_model, tmp_path):
    model = mmgen.load(digits_model)
    expected = draw(model, SampleSettings(classes=[3, 7]), range(4))
    for classes in ("three,seven", "3,7", ["three", "seven"], ["3", 7], np.array([3, 7]), torch.tensor([3, 7])):
        images, labels = draw(model, SampleSettings(classes=classes), range(4))
        assert torch.equal(labels, expected[1]) and torch.equal(images, expected[0])
    run(sample, digits_model, "--num", 4, "--out", tmp_path / "a.npz", "--classes", "three,7")
    assert np.load(tmp_path / "a.npz")["arr_1"].tolist() == [3, 7, 3, 7]
    run(fid, digits_model, "--classes", "Three", "--num", 8, "--features", "pixels", "--out", tmp_path / "s.json")
    assert scores(tmp_path / "s.json")[0]["samples"]["classes"] == [3]


@pytest.mark.parametrize("classes", [[10], [-1], [True], [1.5], [], ["ten"], "ten", None])
def test_what_is_no_class_is_refused(config, classes):
    with pytest.raises((ConfigError, TypeError), match="class|iterable"):
        plan(config, SampleSettings(classes=classes))


# ---- classes without images


@pytest.fixture
def gappy(tmp_path):
    return load_model(make_model(tmp_path / "gaps.safetensors", channels=1, num_classes=5, class_counts=[0, 3, 0, 1, 0]))


def test_a_class_without_images_is_never_drawn(gappy):
    assert with_images(gappy.config) == [1, 3]
    for classes in ("random", "balanced"):
        labels = draw_condition(gappy.config, plan(gappy.config, SampleSettings(classes=classes)), torch.arange(500)).classes
        assert set(labels.tolist()) == {1, 3}
    balanced = draw_condition(gappy.config, plan(gappy.config, SampleSettings(classes="balanced")), torch.arange(4)).classes
    assert balanced.tolist() == [1, 3, 1, 3]
    last = torch.tensor([1 - 2**-53, 1.0], dtype=torch.float64)  # rounded up to the sum of the counts
    assert random_labels(gappy.config, last).tolist() == [3, 3]
    with pytest.raises(ConfigError, match="class 2 had no images in the training data"):
        plan(gappy.config, SampleSettings(classes=[1, 2]))


def test_a_grid_has_a_column_for_each_class_that_is_drawn(gappy, tmp_path):
    run(sample, tmp_path / "gaps.safetensors", "--num", 16, "--out", tmp_path / "g.png", "--classes", "balanced")
    width, height = Image.open(tmp_path / "g.png").size
    columns = round(width / (height / 4))
    assert columns % 2 == 0, (width, height)


def test_gaps_are_noted_when_data_are_read(own_cache, tmp_path):
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    images = [Image.fromarray(np.full((8, 8, 3), i, np.uint8)) for i in range(4)]
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=NAMES)})
    Dataset.from_dict({"image": images, "label": [0, 1, 3, 1]}, features=features).to_parquet(str(tmp_path / "a.parquet"))
    found = data.load(str(tmp_path / "a.parquet"))
    assert "10 classes (7 of them without images: 2, 4, 5, 6, 7, ...)" in found.description
    assert found.class_counts == [1, 2, 0, 1, 0, 0, 0, 0, 0, 0]
    assert "without images" not in data.load("digits").description
