"""`mmgen fid`: what a person types, what it answers, what it leaves beside the samples."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import save_file
from tiny_inception import write_inception
from tiny_model import NAMES, make_model
from typer.testing import CliRunner

import mmgen
from mmgen.cli.fid import fid
from mmgen.cli.sample import sample
from mmgen.errors import ConfigError, DataError, MmgenError, ModelError
from mmgen.metrics import evaluate as evaluation
from mmgen.metrics import inception, reference_sets
from mmgen.metrics.frechet import fd_pixels

INCEPTION = "inception-2015-12-05.pt"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MMGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MMGEN_INCEPTION", "")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    return make_model(folder / "model.safetensors", channels=1, num_classes=10, class_names=NAMES, class_counts=[5] * 10)


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> tuple[Path, str]:
    path = tmp_path_factory.mktemp("inception") / INCEPTION
    return path, write_inception(path)


@pytest.fixture
def published(network, monkeypatch) -> Path:
    """The stand-in, taken for the published network."""
    path, digest = network
    monkeypatch.setitem(inception.PUBLISHED, INCEPTION, digest)
    return path


def run(command, *arguments) -> str:
    """The command's output; raises what it raises."""
    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=True)
    if result.exception is not None:
        raise result.exception
    return result.output


def scores(place: Path) -> list[dict]:
    return json.loads(place.read_text())["scores"]


def write_images(folder: Path, count: int, size: int = 12, seed: int = 0, mean: float = 128) -> np.ndarray:
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    pixels = random.normal(mean, 40, (count, size, size, 3)).clip(0, 255).astype(np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i:05d}.png")
    return pixels.transpose(0, 3, 1, 2)


# ---- models and their samples


def test_model_is_scored_in_memory_against_its_training_set(model, tmp_path):
    shutil.copytree(model.parent, tmp_path / "run")
    text = run(fid, "run", "--steps", "1,2", "--num", 64, "--features", "pixels", "--batch-size", 24)
    found = scores(tmp_path / "run" / "scores.json")
    digits = mmgen.data.load("digits")
    for entry, steps in zip(found, (1, 2), strict=True):
        drawn = mmgen.load(model).sample(64, steps=steps)
        assert entry["figures"]["FD-pixels-64"] == pytest.approx(fd_pixels(drawn, digits.images), rel=1e-9)
        assert entry["samples"]["steps"] == steps and entry["samples"]["seed"] == 0 and entry["samples"]["classes"] == "random"
        assert entry["samples"]["nfe"] == steps and entry["samples"]["guidance"] == 1.0
        assert entry["reference"] == {"name": "digits", "source": digits.description, "num": 1797}
        assert entry["protocol"] == {"features": "pixels"} and entry["versions"]["torch"] == torch.__version__
    assert "FD-pixels-64" in text and "digits, 1,797 images" in text and "seed 0" in text and "labels random" in text
    assert "FID" not in text.upper().replace("CLEAN-FID", "")
    left = {p.name for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".lock"}
    assert left == {"model.safetensors", "scores.json"}  # no images anywhere


def test_samples_in_files_score_like_the_model_that_made_them(model, tmp_path):
    run(sample, model, "--steps", "1,2", "--num", 50, "--out", "samples")
    run(sample, model, "--steps", 2, "--num", 50, "--out", "two.npz")
    run(fid, model, "--steps", "1,2", "--num", 50, "--features", "pixels", "--out", "model.json")
    run(fid, "samples", "--features", "pixels", "--out", "folder.json")
    run(fid, "two.npz", "--features", "pixels")
    values = [entry["figures"]["FD-pixels-50"] for entry in scores(tmp_path / "model.json")]
    assert [entry["figures"]["FD-pixels-50"] for entry in scores(tmp_path / "folder.json")] == pytest.approx(values, rel=1e-9)
    (entry,) = scores(tmp_path / "two.npz.scores.json")
    assert entry["figures"]["FD-pixels-50"] == pytest.approx(values[1], rel=1e-9) and entry["samples"]["steps"] == 2


def test_scores_are_added_to_those_that_are_there(model, tmp_path):
    run(sample, model, "--num", 20, "--out", "samples")
    for count in (1, 2):
        run(fid, "samples", "--features", "pixels")
        assert len(scores(tmp_path / "samples" / "scores.json")) == count
    (tmp_path / "samples" / "scores.json").write_text("{}")
    with pytest.raises(DataError, match="holds no scores of this mmgen"):
        run(fid, "samples", "--features", "pixels")
    assert run(sample, model, "--num", 25, "--out", "samples")  # the scores do not disturb the samples


def test_scores_of_several_at_once_are_all_kept(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    from mmgen.metrics.results import append

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda i: append(tmp_path / "s.json", [{"number": i}]), range(40)))
    assert sorted(entry["number"] for entry in scores(tmp_path / "s.json")) == list(range(40))
    assert not list(tmp_path.glob("*.lock"))


def test_several_draws(model, tmp_path):
    run(fid, model, "--num", 40, "--repeat", 3, "--features", "pixels", "--out", "s.json")
    (entry,) = scores(tmp_path / "s.json")
    all_images = mmgen.load(model).sample(120)
    digits = mmgen.data.load("digits").images
    expected = [fd_pixels(all_images[r * 40 : (r + 1) * 40], digits) for r in range(3)]
    assert [draw["FD-pixels-40"] for draw in entry["draws"]] == pytest.approx(expected, rel=1e-9)
    assert entry["figures"]["FD-pixels-40"] == pytest.approx(min(expected), rel=1e-9)
    assert entry["spreads"]["FD-pixels-40"] == pytest.approx(np.std(expected, ddof=1), rel=1e-6)


def test_bootstrap_of_given_images(tmp_path):
    pixels = write_images(tmp_path / "a", 400, size=2)
    write_images(tmp_path / "b", 400, size=2, seed=1, mean=120)
    run(fid, "a", "--ref", "b", "--features", "pixels", "--repeat", 30)
    (entry,) = scores(tmp_path / "a" / "scores.json")
    reference = np.stack([np.array(Image.open(p)) for p in sorted((tmp_path / "b").glob("*.png"))]).transpose(0, 3, 1, 2)
    random = np.random.default_rng(0)
    drawn = [fd_pixels(pixels[random.integers(0, 400, 400)], reference) for _ in range(200)]
    assert entry["spreads"]["FD-pixels-400"] == pytest.approx(np.std(drawn), rel=0.5)
    assert entry["figures"]["FD-pixels-400"] == pytest.approx(fd_pixels(pixels, reference), rel=1e-9)


# ---- Inception


def test_all_metrics_in_one_pass(published, tmp_path):
    write_images(tmp_path / "a", 60)
    write_images(tmp_path / "b", 70, seed=1, mean=110)
    text = run(fid, "a", "--ref", "b", "--metrics", "all", "--inception", published)
    (entry,) = scores(tmp_path / "a" / "scores.json")
    names = ["fid60", "KID", "precision", "recall", "density", "coverage", "Inception Score"]
    assert list(entry["figures"]) == names and all(np.isfinite(v) for v in entry["figures"].values())
    assert entry["protocol"]["mode"] == "tf" and len(entry["protocol"]["sha256"]) == 64
    assert "note: 60 images and 2,048 features: the covariance is singular" in text
    assert "note: the CLIP score needs --clip" in text and entry["protocol"]["sha256"][:12] in text


def test_another_network_is_never_called_fid(network, tmp_path):
    write_images(tmp_path / "a", 20)
    text = run(fid, "a", "--ref", "a", "--inception", network[0])
    (entry,) = scores(tmp_path / "a" / "scores.json")
    assert list(entry["figures"]) == ["FD-inception-2015-12-05-20"] and "is not the published Inception" in text


@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
def test_saved_statistics_are_a_reference(published, tmp_path, suffix):
    write_images(tmp_path / "a", 30)
    write_images(tmp_path / "b", 30, seed=1)
    text = run(fid, "b", "--save-stats", f"b.{suffix}", "--inception", published)
    assert f"statistics: b.{suffix}" in text and not (tmp_path / "b" / "scores.json").exists()
    run(fid, "a", "--ref", "b", "--inception", published)
    run(fid, "a", "--ref", f"b.{suffix}", "--inception", published)
    first, second = scores(tmp_path / "a" / "scores.json")
    assert second["figures"]["fid30"] == pytest.approx(first["figures"]["fid30"], rel=1e-9)
    assert second["reference"]["num"] == 30
    with pytest.raises(DataError, match=rf"b.{suffix} was made with mode tf.*--mode tf"):
        run(fid, "a", "--ref", f"b.{suffix}", "--inception", published, "--mode", "clean")
    with pytest.raises(ConfigError, match="KID compare single images"):
        run(fid, "a", "--ref", f"b.{suffix}", "--inception", published, "--metrics", "kid")


def test_reference_features_are_cached_by_content(published, tmp_path, monkeypatch):
    write_images(tmp_path / "a", 20)
    write_images(tmp_path / "b", 25, seed=1)
    run(fid, "a", "--ref", "b", "--metrics", "fid,kid", "--inception", published)
    collected = []
    real = reference_sets.collect
    monkeypatch.setattr(reference_sets, "collect", lambda images, *a, **k: collected.append(images.name) or real(images, *a, **k))
    shutil.copytree(tmp_path / "b", tmp_path / "copy")
    run(fid, "a", "--ref", "copy", "--metrics", "fid,kid", "--inception", published)
    assert collected == []
    Image.new("RGB", (12, 12)).save(tmp_path / "copy" / "00000.png")
    run(fid, "a", "--ref", "copy", "--metrics", "fid,kid", "--inception", published)
    assert collected == ["copy"]
    first, second, third = (entry["figures"] for entry in scores(tmp_path / "a" / "scores.json"))
    assert first == second != third
    for damaged in (tmp_path / "cache" / "features").iterdir():
        damaged.write_bytes(b"damaged")
    run(fid, "a", "--ref", "b", "--metrics", "fid,kid", "--inception", published)
    assert scores(tmp_path / "a" / "scores.json")[-1]["figures"] == first


def test_images_of_several_sizes_where_the_mode_resizes_each(published, tmp_path):
    write_images(tmp_path / "a", 6)
    shutil.copytree("a", "b")
    Image.open("a/00003.png").resize((20, 15)).save("a/00003.png")
    with pytest.raises(DataError, match="00003.png is 20x15 colour, but the first image is 12x12 colour.*--mode clean"):
        run(fid, "a", "--ref", "b", "--inception", published)
    run(fid, "a", "--ref", "b", "--inception", published, "--mode", "clean")
    (entry,) = scores(tmp_path / "a" / "scores.json")
    assert entry["protocol"]["mode"] == "clean" and entry["figures"]["fid6"] > 0


def test_without_a_network_the_message_says_what_to_do(model, tmp_path, monkeypatch):
    from mmgen.metrics import published_file

    def refuse(*arguments, **options):
        raise OSError("Name or service not known")

    monkeypatch.setattr(published_file.urllib.request, "urlopen", refuse)
    monkeypatch.setattr(inception, "_elsewhere", lambda name: [])
    with pytest.raises(ModelError, match=r"fetch https://.*inception-2015-12-05.pt and put it at .*cache/.*--features pixels"):
        run(fid, model, "--num", 4)


def test_adm_batch_gives_precision_from_its_images_and_fid_from_its_statistics(published, tmp_path):
    write_images(tmp_path / "a", 30)
    pixels = write_images(tmp_path / "b", 40, seed=1)
    run(fid, "b", "--save-stats", "b.npz", "--inception", published)
    with np.load("b.npz") as stored:
        np.savez("VIRTUAL_b.npz", pixels.transpose(0, 2, 3, 1)[:30], mu=stored["mu"], sigma=stored["sigma"],
                 mu_s=stored["mu"], sigma_s=stored["sigma"])  # fmt: skip
    run(fid, "a", "--ref", "VIRTUAL_b.npz", "--metrics", "fid,pr", "--inception", published)
    run(fid, "a", "--ref", "b", "--inception", published)
    run(fid, "a", "--ref", "b", "--ref-num", 30, "--metrics", "pr", "--inception", published)
    adm, whole, part = (entry["figures"] for entry in scores(tmp_path / "a" / "scores.json"))
    assert adm["fid30"] == pytest.approx(whole["fid30"], rel=1e-9)
    assert (adm["precision"], adm["recall"]) == (part["precision"], part["recall"])


def test_bias_estimate_of_a_known_case(tmp_path):
    # Two samples of one Gaussian: the distance is bias alone, and falls as 1 / N
    write_images(tmp_path / "a", 600, size=2)
    write_images(tmp_path / "b", 20_000, size=2, seed=1)
    text = run(fid, "a", "--ref", "b", "--features", "pixels")
    (entry,) = scores(tmp_path / "a" / "scores.json")
    assert entry["excess_over_50k"] == pytest.approx(entry["figures"]["FD-pixels-600"], rel=0.6)
    assert "fewer samples than 50,000 raise it" in text and f"about {entry['excess_over_50k']:.2g}" in text


# ---- several processes are in test_processes.py; bad input


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
        (["a", "--ref", "b", "--metrics", "clip"], ConfigError, "needs both --metrics clip and --clip"),
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
        (["a", "--metrics", "clip", "--clip", "x", "--mode", "tf"], ConfigError, "--mode is for Inception's figures"),
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


def test_a_training_set_named_by_the_record_is_read_as_the_record_says(model):
    for option, value in (("--resolution", 16), ("--channels", 3), ("--ref-split", "test")):
        with pytest.raises(ConfigError, match=f"{option} is for --ref, and the training set is read as the model saw it"):
            run(fid, model, option, value, "--features", "pixels", "--num", 4)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"num": 21}, DataError, "samples holds 20 images, and its record samples.json says 21"),
        ({"steps": "two"}, DataError, "samples.json has been changed: steps is 'two'"),
        ({"data": 5}, DataError, "samples.json has been changed: data is 5"),
        ({"data_options": {"foo": 1}}, ConfigError, "the record of samples has been changed: 'foo' is unknown; give --ref"),
    ],
)
def test_record_that_was_changed(model, change, error, message):
    run(sample, model, "--num", 20, "--out", "samples")
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

    def full(*arguments):
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
    from safetensors import SafetensorError, torch

    def full(*arguments):
        raise SafetensorError("I/O error: No space left on device")

    write_images(tmp_path / "a", 5)
    monkeypatch.setattr(torch, "save_file", full)
    assert "KID" in run(fid, "a", "--ref", "a", "--inception", published, "--metrics", "kid")
    assert not list((tmp_path / "cache").glob("features/*"))


@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_figure_is_cut_off_on_a_narrow_terminal(width):
    from io import StringIO

    from rich.console import Console

    from mmgen.cli.fid import _print_table
    from mmgen.metrics.evaluate import Row
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


def test_figures_of_other_features_are_not_named_after_inception(tmp_path, network):
    write_images(tmp_path / "a", 20, size=4)
    run(fid, "a", "--ref", "a", "--features", "pixels", "--metrics", "fid,kid")
    run(fid, "a", "--ref", "a", "--inception", network[0], "--metrics", "kid,is")
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


def test_model_of_the_hub_leaves_nothing_in_the_hubs_cache(model, monkeypatch, tmp_path):
    from mmgen import models

    shutil.copy(model, tmp_path / "model.safetensors")
    monkeypatch.setattr(models, "_download", lambda repository, name: tmp_path / "model.safetensors")
    text = run(fid, "hf://user/name", "--features", "pixels", "--num", 10)
    assert "note: samples of the hub have no place beside them" in text and "kept in" not in text
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_an_option_for_images_is_refused_for_a_model(model):
    with pytest.raises(ConfigError, match="--split is for images"):
        run(fid, model, "--split", "test", "--features", "pixels")


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


def test_model_without_a_training_set_asks_for_a_reference(tmp_path, model):
    from mmgen.models import load_model, save_model

    loaded = load_model(model)
    config = type(loaded.config)(**{**vars(loaded.config), "data": ""})
    save_model("m.safetensors", config, loaded.network.state_dict())
    with pytest.raises(ConfigError, match="nothing says what to compare m.safetensors with: give --ref"):
        run(fid, "m.safetensors", "--features", "pixels", "--num", 4)
    save_file({"x": torch.zeros(1)}, "other.safetensors")
    with pytest.raises(ModelError, match="not one of mmgen's"):
        run(fid, "other.safetensors", "--features", "pixels", "--num", 4)
