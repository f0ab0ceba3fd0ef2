"""The options that say how a data set is read, from the command line to the data and to a later score."""

from __future__ import annotations

import json
import os

import pytest
from hostile import command, refused
from pictures import folder_of, parquet_of, png

from mmgen.config.sections import READING, DataSettings
from mmgen.data.image_source import Reading

pytestmark = pytest.mark.usefixtures("own_cache")
FEW = ("--preset", "digits-imm", "--max-images", "64", "--batch-size", "32", "--eval-num", "0", "--device", "cpu")


def test_settings_have_the_fields_of_reading():
    """But those of captions, which training on labels has no use for."""
    fields = set(Reading.__dataclass_fields__)
    assert set(READING) - {"on_corrupt"} == fields - {"caption_column", "captions"}
    assert {name: getattr(DataSettings(), name) for name in READING if name in fields} == {
        name: getattr(Reading(), name) for name in READING if name in fields
    }


def test_links_and_subsets_reach_the_data(tmp_path):
    """`mmgen train-imm` sees what the options say, and `mmgen fid` reads the training set in the same way."""
    for i in range(40):
        folder_of(tmp_path / "outside", {f"{i:02d}.png": png((6 * i, 0, 0), size=8)})
    folder_of(tmp_path / "data", {"a/0.png": png(0, size=8)})
    os.symlink(tmp_path / "outside", tmp_path / "data" / "b")
    run = tmp_path / "run"
    status, _, err = command("train-imm", "--data", tmp_path / "data", *FEW, "--follow-links", "--set", "data.conditional=true",
                             "--set", "data.channels=3", "--out", run)  # fmt: skip
    assert status == 0, err[-2000:]
    assert json.loads((run / "config.json").read_text())["config"]["data"]["follow_links"] is True
    status, out, err = command("fid", run, "--features", "pixels", "--num", "4", "--device", "cpu")
    assert status == 0 and "41" in out + err, err[-2000:]  # images of the reference


def test_subset_of_a_folder(tmp_path):
    for i, name in enumerate(("small", "large")):
        parquet_of(tmp_path / "d" / name / "train.parquet", label=[i] * 6)
    sentence = refused("train-imm", "--data", tmp_path / "d", *FEW, "--out", tmp_path / "r", status=3)
    assert "side by side (large, small)" in sentence and "--subset" in sentence
    sentence = refused("train-imm", "--data", tmp_path / "d", *FEW, "--subset", "lrage", "--out", tmp_path / "r", status=3)
    assert "did you mean 'large'" in sentence


def test_follow_links_without_a_folder_is_refused(tmp_path):
    sentence = refused("fid", "hf://user/name", "--follow-links", status=2)
    assert "--follow-links is for folders" in sentence


def test_labels_that_match_nothing_are_told_where_they_are_needed(tmp_path):
    lists = {"dataset.json": {"labels": [["x/9.png", 1]]}}
    folder_of(tmp_path / "d", {"0.png": png(0), "1.png": png(1), **lists})
    sentence = refused("train-imm", "--data", tmp_path / "d", *FEW, "--conditional", "--out", tmp_path / "r", status=2)
    assert "dataset.json lists 1 names, and 0 of 2 images are among them" in sentence and "leave labels out with --unconditional" in sentence


def test_labels_that_are_missing_are_told_before_anything_is_decoded(tmp_path):
    folder_of(tmp_path / "d", {"0.png": png(0), "1.png": b"no image"})
    sentence = refused("train-imm", "--data", tmp_path / "d", *FEW, "--conditional", "--out", tmp_path / "r", status=2)
    assert "data.conditional needs class labels" in sentence
    assert "saved in" not in command("train-imm", "--data", tmp_path / "d", *FEW, "--conditional", "--out", tmp_path / "r")[2]
