"""Captions of samples, and the CLIP score that `mmgen fid` makes of them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from tiny_clip import save_clip
from typer.testing import CliRunner

from mmgen.cli.fid import fid
from mmgen.errors import ConfigError, DataError
from mmgen.metrics.captions import read_captions
from mmgen.metrics.image_sets import image_set
from mmgen.metrics.pretrained import clip_towers

CAPTIONS = ["a red dot", "a blue square", "a blue, blue dot"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MMGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "images"
    place.mkdir()
    for i, size in enumerate([(20, 20), (20, 20), (33, 25)]):  # sizes may differ
        pixels = np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{i}.png")
    return place


def table(place, rows):
    if place.suffix == ".csv":
        place.write_text("file_name,text\n" + "".join(f'{name},"{text}"\n' for name, text in rows))
    else:
        key = "caption" if place.stem == "other" else "text"
        place.write_text("".join(json.dumps({"file_name": name, key: text}) + "\n" for name, text in rows))
    return place


def test_every_way_to_give_captions(folder, tmp_path):
    images = image_set("images")
    (tmp_path / "lines.txt").write_text("\n".join(CAPTIONS) + "\n")
    assert read_captions(images, tmp_path / "lines.txt") == CAPTIONS
    rows = [(f"{i}.png", text) for i, text in enumerate(CAPTIONS)]
    for name in ("captions.csv", "captions.jsonl", "other.jsonl"):
        assert read_captions(images, table(tmp_path / name, rows[::-1])) == CAPTIONS
    for i, text in enumerate(CAPTIONS):
        (folder / f"{i}.txt").write_text(text + "\n")
    assert read_captions(image_set("images")) == CAPTIONS  # beside the images
    table(folder / "metadata.jsonl", [(name, text.upper()) for name, text in rows])
    assert read_captions(image_set("images")) == [text.upper() for text in CAPTIONS]  # a table comes first


def test_captions_with_unicodes_line_separators_and_byte_order_marks(folder, tmp_path):
    images, odd = image_set("images"), ["one\u2028line", "form\x0cfeed", "next\x85"]
    (tmp_path / "a.txt").write_text("\n".join(odd) + "\n", "utf-8")
    lines = [json.dumps({"file_name": f"{i}.png", "text": text}, ensure_ascii=False) for i, text in enumerate(odd)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), "utf-8")
    assert read_captions(images, tmp_path / "a.txt") == read_captions(images, tmp_path / "a.jsonl") == odd
    rows = "file_name,text\n" + "".join(f"{i}.png,{text}\n" for i, text in enumerate(CAPTIONS[:2] + ["dot"]))
    (tmp_path / "a.csv").write_text(rows, "utf-8-sig")
    assert read_captions(images, tmp_path / "a.csv") == [*CAPTIONS[:2], "dot"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", "one\ntwo\n", "a.txt has 2 lines, and there are 3 images"),
        ("a.jsonl", '{"file_name": "0.png", "text": "x"}\n', "a.jsonl has no caption for .*1.png"),
        ("a.jsonl", '{"file_name": "0.png"}\n', "row 1 of .*a.jsonl has no file_name, or no text"),
        ("a.jsonl", "not json\n", "a.jsonl is not JSON lines"),
        ("a.jsonl", "[1]\n", "must hold an object on each line"),
        ("a.json", "{}", "only .txt, .jsonl and .csv are read"),
    ],
)
def test_bad_captions(folder, tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_captions(image_set("images"), tmp_path / name)


def test_images_without_captions_say_how_to_give_them(folder):
    with pytest.raises(DataError, match="images has no captions: give --captions FILE"):
        read_captions(image_set("images"))


def test_clip_score_from_the_command_line(folder, tmp_path):
    pytest.importorskip("transformers")
    place = save_clip(tmp_path / "tiny-clip")
    (tmp_path / "c.txt").write_text("\n".join(CAPTIONS))
    app = typer.Typer()
    app.command()(fid)
    arguments = ["images", "--metrics", "clip", "--clip", str(place), "--captions", "c.txt", "--device", "cpu"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    (entry,) = json.loads((folder / "scores.json").read_text())["scores"]
    towers = clip_towers(str(place), "cpu")
    images = image_set("images").read(0, 3, True)
    each = []
    for image, text in zip(images, CAPTIONS, strict=True):
        cosine = torch.cosine_similarity(towers.images(torch.from_numpy(image[None].copy())), towers.texts([text]))
        each.append(100 * max(0.0, float(cosine)))
    assert entry["figures"] == {"CLIP score": pytest.approx(sum(each) / len(each), rel=1e-5)}
    assert entry["clip"]["network"] == "tiny-clip" and len(entry["clip"]["sha256"]) == 64
    assert "CLIP score" in result.output and "tiny-clip" in result.output
    with pytest.raises(ConfigError, match="--captions are for the CLIP score"):
        CliRunner().invoke(app, ["images", "--captions", "c.txt"], catch_exceptions=False)
