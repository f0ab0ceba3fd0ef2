"""`mmgen fid`: what a person types, what it answers, what it leaves beside the samples."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from fid_tools import run, scores, write_images
from PIL import Image

import mmgen
from mmgen.cli.fid import fid
from mmgen.cli.sample import sample
from mmgen.errors import ConfigError, DataError, ModelError
from mmgen.metrics import inception, reference_sets
from mmgen.metrics.frechet import fd_pixels

# ---- models and their samples

pytestmark = pytest.mark.usefixtures("own_cache")


def test_model_is_scored_in_memory_against_its_training_set(digits_model, tmp_path):
    shutil.copytree(digits_model.parent, tmp_path / "run")
    text = run(fid, "run", "--steps", "1,2", "--num", 64, "--features", "pixels", "--batch-size", 24)
    found = scores(tmp_path / "run" / "scores.json")
    digits = mmgen.data.load("digits")
    for entry, steps in zip(found, (1, 2), strict=True):
        drawn = mmgen.load(digits_model).sample(64, steps=steps).images
        assert entry["figures"]["FD-pixels-64"] == pytest.approx(fd_pixels(drawn, digits.images), rel=1e-9)
        assert entry["samples"]["steps"] == steps and entry["samples"]["seed"] == 0 and entry["samples"]["classes"] == "random"
        assert entry["samples"]["nfe"] == steps and entry["samples"]["guidance"] == 1.0
        assert entry["reference"] == {"name": "digits", "source": digits.description, "num": 1797,
                                      "place": "digits", "fingerprint": digits.fingerprint}
        assert entry["protocol"] == {"features": "pixels"} and entry["versions"]["torch"] == torch.__version__
    assert "FD-pixels-64" in text and "digits, 1,797 images" in text and "seed 0" in text and "labels random" in text
    assert "FID" not in text.upper().replace("CLEAN-FID", "")
    left = {p.name for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".lock"}
    assert left == {"model.safetensors", "scores.json"}  # no images anywhere


def test_samples_in_files_score_like_the_model_that_made_them(digits_model, tmp_path):
    run(sample, digits_model, "--steps", "1,2", "--num", 50, "--out", "samples")
    run(sample, digits_model, "--steps", 2, "--num", 50, "--out", "two.npz")
    run(fid, digits_model, "--steps", "1,2", "--num", 50, "--features", "pixels", "--out", "model.json")
    run(fid, "samples", "--features", "pixels", "--out", "folder.json")
    run(fid, "two.npz", "--features", "pixels")
    values = [entry["figures"]["FD-pixels-50"] for entry in scores(tmp_path / "model.json")]
    assert [entry["figures"]["FD-pixels-50"] for entry in scores(tmp_path / "folder.json")] == pytest.approx(values, rel=1e-9)
    (entry,) = scores(tmp_path / "two.npz.scores.json")
    assert entry["figures"]["FD-pixels-50"] == pytest.approx(values[1], rel=1e-9) and entry["samples"]["steps"] == 2


def test_scores_are_added_to_those_that_are_there(digits_model, tmp_path):
    run(sample, digits_model, "--num", 20, "--out", "samples")
    for count in (1, 2):
        run(fid, "samples", "--features", "pixels")
        assert len(scores(tmp_path / "samples" / "scores.json")) == count
    (tmp_path / "samples" / "scores.json").write_text("{}")
    with pytest.raises(DataError, match="holds no scores of this mmgen"):
        run(fid, "samples", "--features", "pixels")
    assert run(sample, digits_model, "--num", 25, "--out", "samples")  # the scores do not disturb the samples


def test_scores_of_several_at_once_are_all_kept(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    from mmgen.metrics.results import append

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda i: append(tmp_path / "s.json", [{"number": i}]), range(40)))
    assert sorted(entry["number"] for entry in scores(tmp_path / "s.json")) == list(range(40))
    assert not list(tmp_path.glob("*.lock"))


def test_several_draws(digits_model, tmp_path):
    run(fid, digits_model, "--num", 40, "--repeat", 3, "--features", "pixels", "--out", "s.json")
    (entry,) = scores(tmp_path / "s.json")
    all_images = mmgen.load(digits_model).sample(120).images
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
    assert "note: with only 60 images fid60 is not meaningful: the covariance of 2,048 features is singular" in text
    assert "note: the CLIP score needs --clip" in text and entry["protocol"]["sha256"][:12] in text


def test_another_network_is_never_called_fid(tiny_network, tmp_path):
    write_images(tmp_path / "a", 20)
    text = run(fid, "a", "--ref", "a", "--inception", tiny_network[0])
    (entry,) = scores(tmp_path / "a" / "scores.json")
    assert list(entry["figures"]) == ["FD-inception-2015-12-05-20"] and "is not the published Inception" in text


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_without_a_network_the_message_says_what_to_do(digits_model, tmp_path, monkeypatch):
    from mmgen.metrics import published_file

    def refuse(*arguments, **options):
        raise OSError("Name or service not known")

    monkeypatch.setattr(published_file.urllib.request, "urlopen", refuse)
    monkeypatch.setattr(inception, "_elsewhere", lambda name: [])
    with pytest.raises(ModelError, match=r"fetch https://.*inception-2015-12-05.pt and put it at .*cache/.*--features pixels"):
        run(fid, digits_model, "--num", 4, "--features", "inception")
    assert "FD-pixels-4" in run(fid, digits_model, "--num", 4)  # images so small are not given to Inception


@pytest.mark.slow
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


@pytest.mark.slow
def test_bias_estimate_of_a_known_case(tmp_path):
    # Two samples of one Gaussian: the distance is bias alone, and falls as 1 / N
    write_images(tmp_path / "a", 600, size=2)
    write_images(tmp_path / "b", 20_000, size=2, seed=1)
    text = run(fid, "a", "--ref", "b", "--features", "pixels")
    (entry,) = scores(tmp_path / "a" / "scores.json")
    assert entry["excess_over_50k"] == pytest.approx(entry["figures"]["FD-pixels-600"], rel=0.6)
    assert "fewer samples than 50,000 raise it" in text and f"about {entry['excess_over_50k']:.2g}" in text
