"""`mmgen fid` with bad input, odd records and full disks: one sentence, and nothing lost."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from fid_tools import run, scores, write_images
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from mmgen.cli.fid import fid
from mmgen.cli.sample import sample
from mmgen.errors import ConfigError, DataError, MmgenError, ModelError
from mmgen.metrics import evaluate as evaluation
from mmgen.metrics import reference_sets

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (["a"], ConfigError, "nothing says what to compare a with: give --ref"),
        (["a", "--ref", "b", "--mode", "tff"], ConfigError, "unknown mode 'tff': did you mean 'tf'"),
        (["a", "--ref", "b", "--metrics", "fid,kdi"], ConfigError, "unknown metric 'kdi': did you mean 'kid'"),
        (["a", "--ref", "b", "--metrics", "fid,is", "--features", "pixels"], ConfigError, "Inception Score needs"),
        (["a", "--ref", "b", "--mode", "tf", "--features", "pixels"], ConfigError, "--mode is for Inception"),
        (["a", "--ref", "b", "--steps", "2"], ConfigError, "--steps is for a model, and a is none"),
        (["a", "--ref", "b", "--num", "50"], DataError, "a has 5 images, fewer than the 50 asked for"),
        (["a", "--ref", "b", "--num", "0"], ConfigError, "--num must be at least 1"),
        (["a", "--ref", "b", "--metrics", "clip"], ConfigError, "need both --metrics clip or retrieval and --clip"),
        (["a", "--ref", "c", "--features", "pixels"], ConfigError, "samples are 12x12, 3 channels, the images of c 9x9, 3"),
        (["a", "--ref", "mixed", "--features", "pixels"], DataError, "1.png is 9x9 colour, but the first image is 12x12 colour"),
        (["a", "--ref", "b", "--ref-mode", "tf", "--features", "pixels"], ConfigError, "--ref-mode is for a statistics file"),
        (["empty", "--ref", "b"], DataError, "empty is empty"),
        (["nothing", "--ref", "b"], DataError, "nothing"),
        (["one", "--ref", "b", "--features", "pixels"], MmgenError, "at least 2 samples, not 1"),
        (["a", "--ref", "b", "--features", "model.pt"], ModelError, "model.pt does not exist"),
        (["a", "--ref", "bad.npz", "--features", "pixels"], DataError, "bad.npz"),
        (["a", "--save-stats", "x.pkl", "--features", "pixels"], ConfigError, "written as .safetensors or .npz"),
        (["a", "b", "--save-stats", "x.npz", "--features", "pixels"], ConfigError, "there are 2: give one"),
        (["a", "--save-stats", "b", "--features", "pixels"], ConfigError, "written as"),
        (["a", "--ref", "b", "--out", "c", "--features", "pixels"], ConfigError, "c is a folder: name a file in it"),
        # options that nothing would look at
        (["a", "--ref", "b", "--metrics", "is"], ConfigError, "--ref is for comparisons, and --metrics is has none"),
        (["a", "--metrics", "is", "--ref-num", "3"], ConfigError, "--ref-num is for comparisons"),
        (["a", "--ref", "b", "--metrics", "kid", "--repeat", "5"], ConfigError, "--repeat of given images is a bootstrap"),
        (["a", "--metrics", "fid,kid", "--save-stats", "x.npz"], ConfigError, "KID with --save-stats need .*give --ref"),
        (["a", "--repeat", "3", "--save-stats", "x.npz"], ConfigError, "--save-stats without --ref gives none"),
        (["a", "--metrics", "clip", "--clip", "x", "--mode", "tf"], ConfigError, "--mode is for scores by Inception"),
        (["a", "--ref", "a.npz", "--ref-split", "test", "--features", "pixels"], DataError, "is an npz.*not the split test"),
        (["a.npz", "--ref", "b", "--image-column", "x", "--features", "pixels"], DataError, "a.npz is an npz.*not the column x"),
        (["a", "--ref", "s.npz", "--channels", "3", "--features", "pixels"], ConfigError, "--channels is for images"),
        (["a", "--ref", "s.npz", "--ref-split", "test", "--features", "pixels"], ConfigError, "--ref-split is for images"),
        # what brings a reference to the samples
        (["a", "--ref", "c", "--features", "pixels"], ConfigError, r": --resolution 12 reads the reference so"),
        (["a", "--ref", "grey", "--features", "pixels"], ConfigError, r"a?.*: --channels 3 reads the reference so"),
        (["a", "--ref", "digits", "--features", "pixels"], ConfigError, r": --channels 3 --resolution 12 reads"),
        (["wide", "--ref", "c", "--features", "pixels"], ConfigError, r": give a --ref of that size"),
        # a run that has not saved a model holds pictures that are no samples
        (["run", "--ref", "b", "--features", "pixels"], ModelError, "its run has not saved yet"),
    ],
)  # fmt: skip
def test_bad_input(tmp_path, arguments, error, message):
    for name, count, size in (("a", 5, 12), ("b", 6, 12), ("c", 5, 9), ("one", 1, 12)):
        write_images(tmp_path / name, count, size=size)
    shutil.copytree("a", "mixed")
    shutil.copy("c/00001.png", "mixed/00001.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.npz").write_bytes(b"<html>")
    np.savez("a.npz", np.zeros((5, 12, 12, 3), np.uint8))
    np.savez("s.npz", mu=np.zeros(432), sigma=np.eye(432))
    shutil.copytree("a", "run/previews")
    (tmp_path / "run" / "config.json").write_text("{}")
    (tmp_path / "run" / "checkpoints").mkdir()
    for name, picture in (("grey", Image.new("L", (12, 12))), ("wide", Image.new("RGB", (20, 12)))):
        (tmp_path / name).mkdir()
        for i in range(3):
            picture.save(tmp_path / name / f"{i}.png")
    with pytest.raises(error, match=message):
        run(fid, *arguments)
    assert not list(tmp_path.glob("*/scores.json"))


def test_a_training_set_named_by_the_record_is_read_as_the_record_says(digits_model):
    for option, value in (("--resolution", 16), ("--channels", 3), ("--ref-split", "test")):
        with pytest.raises(ConfigError, match=f"{option} is for --ref, and the training set is read as the model saw it"):
            run(fid, digits_model, option, value, "--features", "pixels", "--num", 4)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"num": 21}, DataError, "samples holds 20 images, and its record samples.json says 21"),
        ({"steps": "two"}, DataError, "samples.json has been changed: steps is 'two'"),
        ({"data": 5}, DataError, "samples.json has been changed: data is 5"),
        ({"data_options": {"foo": "x"}}, ConfigError, "the record of samples has been changed: 'foo' is unknown; give --ref"),
        (
            {"data_options": {"foo": 1}},
            ConfigError,
            "the record of samples has been changed: its data are not a name and options; give --ref",
        ),
    ],
)
def test_record_that_was_changed(digits_model, change, error, message):
    run(sample, digits_model, "--num", 20, "--out", "samples")
    record = json.loads(Path("samples/samples.json").read_text())
    Path("samples/samples.json").write_text(json.dumps(record | change))
    with pytest.raises(error, match=message):
        run(fid, "samples", "--features", "pixels")


def test_record_that_says_little_is_enough(tmp_path):
    write_images(tmp_path / "a", 5)
    (tmp_path / "a" / "samples.json").write_text(json.dumps({"format": 1, "num": 5, "complete": True, "model": "m", "seed": 3}))
    assert "samples: m, seed 3" in run(fid, "a", "--ref", "a", "--features", "pixels")


def test_figures_are_shown_where_they_cannot_be_kept(tmp_path, monkeypatch, capsys):
    from mmgen.metrics import results

    def full(*arguments, **options):
        raise MmgenError("cannot write it: No space left on device")

    write_images(tmp_path / "a", 5)
    monkeypatch.setattr(results, "write_json", full)
    app = typer.Typer()
    app.command()(fid)
    result = CliRunner().invoke(app, ["a", "--ref", "a", "--features", "pixels"])
    assert "No space left" in str(result.exception) and "FD-pixels-5" in result.output


def test_file_of_scores_that_cannot_be_added_to_is_found_before_the_work(tmp_path, monkeypatch):
    write_images(tmp_path / "a", 5)
    (tmp_path / "other.json").write_text("[]")
    monkeypatch.setattr(evaluation, "build_extractor", None)
    with pytest.raises(DataError, match="other.json holds no scores of this mmgen"):
        run(fid, "a", "--ref", "a", "--features", "pixels", "--out", "other.json")


def test_full_cache_costs_no_figure(published, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    write_images(tmp_path / "a", 5)
    monkeypatch.setattr(reference_sets, "save_tensors", full)
    assert "KID" in run(fid, "a", "--ref", "a", "--inception", published, "--metrics", "kid")
    assert not list((tmp_path / "cache").glob("features/*"))


@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_figure_is_cut_off_on_a_narrow_terminal(width):
    from io import StringIO

    from rich.console import Console

    from mmgen.cli.fid import _print_table
    from mmgen.metrics.results import Row
    from mmgen.metrics.image_sets import ImageSet
    from mmgen.metrics.score import Score
    from mmgen.metrics.subjects import Subject

    figures = {"fid10k": 12.34, "KID": 0.001234, "precision": 0.7125, "recall": 0.6125, "density": 0.9125, "coverage": 0.8125}
    images = ImageSet("a/folder/whose/name/is/long", "", 10_000, lambda *a: None, str)
    text = StringIO()
    rows = [Row(Subject(images.name, [images]), Score(10_000, (3, 8, 8), figures, {"KID": 0.00056}), [])]
    _print_table(Console(file=text, width=width), rows)
    for word in (*figures, "12.34", "0.001234 ± 0.00056", "0.7125", "0.6125", "0.9125", "0.8125", "10,000"):
        assert word in text.getvalue()
    assert max(map(len, text.getvalue().splitlines())) <= width


def test_home_folder_in_options(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    write_images(tmp_path / "home" / "a", 5)
    run(fid, "~/a", "--ref", "~/a", "--features", "pixels", "--out", "~/s.json", "--save-stats", "~/s.npz")
    assert (tmp_path / "home" / "s.json").is_file() and (tmp_path / "home" / "s.npz").is_file()
    assert not (tmp_path / "~").exists()


def test_figures_of_other_features_are_not_named_after_inception(tmp_path, tiny_network):
    write_images(tmp_path / "a", 20, size=4)
    run(fid, "a", "--ref", "a", "--features", "pixels", "--metrics", "fid,kid")
    run(fid, "a", "--ref", "a", "--inception", tiny_network[0], "--metrics", "kid,is")
    first, second = (list(entry["figures"]) for entry in scores(tmp_path / "a" / "scores.json"))
    assert first == ["FD-pixels-20", "KD-pixels"] and second == ["KD-inception-2015-12-05", "IS-inception-2015-12-05"]


def test_adm_images_of_another_size_are_refused_and_their_features_cached(published, tmp_path, monkeypatch):
    write_images(tmp_path / "a", 10)
    pixels = write_images(tmp_path / "b", 12, size=9)
    run(fid, "b", "--save-stats", "b.npz", "--inception", published)
    with np.load("b.npz") as stored:
        np.savez("adm.npz", pixels.transpose(0, 2, 3, 1), mu=stored["mu"], sigma=stored["sigma"])
        np.savez("latents.npz", np.zeros((3, 4, 4, 4), np.float32), mu=stored["mu"], sigma=stored["sigma"])
    with pytest.raises(ConfigError, match="samples are 12x12, 3 channels, the images of adm.npz 9x9"):
        run(fid, "a", "--ref", "adm.npz", "--inception", published)
    run(fid, "b", "--ref", "adm.npz", "--inception", published, "--metrics", "pr")
    monkeypatch.setattr(reference_sets, "collect", None)
    run(fid, "b", "--ref", "adm.npz", "--inception", published, "--metrics", "pr")
    run(fid, "b", "--ref", "latents.npz", "--inception", published)  # its arr_0 is not looked at
    first, second, third = (entry["figures"] for entry in scores(tmp_path / "b" / "scores.json"))
    assert first == second == {"precision": 1.0, "recall": 1.0} and third["fid12"] == pytest.approx(0, abs=1e-6)


def test_model_of_the_hub_leaves_nothing_in_the_hubs_cache(digits_model, monkeypatch, tmp_path):
    from mmgen.models import files as models

    shutil.copy(digits_model, tmp_path / "model.safetensors")
    monkeypatch.setattr(models, "_download", lambda repository, name: tmp_path / "model.safetensors")
    text = run(fid, "hf://user/name", "--features", "pixels", "--num", 10)
    assert "note: samples of the hub have no place beside them" in text and "kept in" not in text
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_an_option_for_images_is_refused_for_a_model(digits_model):
    with pytest.raises(ConfigError, match="--split is for images"):
        run(fid, digits_model, "--split", "test", "--features", "pixels")


def test_features_that_are_not_finite_are_named(published, tmp_path, monkeypatch):
    write_images(tmp_path / "a", 5)
    real = evaluation.build_extractor

    def broken(*arguments, **options):
        extractor = real(*arguments, **options)
        extract = extractor.extract
        object.__setattr__(extractor, "extract", lambda batch: extract(batch).index_fill(0, torch.tensor([2]), float("nan")))
        return extractor

    monkeypatch.setattr(evaluation, "build_extractor", broken)
    with pytest.raises(MmgenError, match="1 images have features that are not finite, the first .*00002.png"):
        run(fid, "a", "--ref", "a", "--inception", published)


def test_model_without_a_training_set_asks_for_a_reference(tmp_path, digits_model):
    from mmgen.models.files import load_model, save_model

    loaded = load_model(digits_model)
    config = type(loaded.config)(**{**vars(loaded.config), "data": ""})
    save_model("m.safetensors", config, loaded.network.state_dict())
    with pytest.raises(ConfigError, match="nothing says what to compare m.safetensors with: give --ref"):
        run(fid, "m.safetensors", "--features", "pixels", "--num", 4)
    save_file({"x": torch.zeros(1)}, "other.safetensors")
    with pytest.raises(ModelError, match="no family that mmgen knows"):
        run(fid, "other.safetensors", "--features", "pixels", "--num", 4)
