"""What a run, a model, samples and scores call their data by: a place and a content, never a word that is resolved anew."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from fid_tools import run, scores
from tiny_vae import write_images, write_vae
from toy_task import Quiet

from mmgen.cli.cache_latents import cache_latents
from mmgen.cli.fid import fid
from mmgen.cli.sample import sample
from mmgen.config.distill import resolve as resolve_distill
from mmgen.config.sections import read_preset
from mmgen.config.teacher import resolve as resolve_teacher
from mmgen.errors import ConfigError, DataError
from mmgen.methods import DISTILLATION
from mmgen.methods import TEACHER
from mmgen.methods.run import train as train_method
from mmgen.models.files import load_model, read_config

SMALL = {"run": {"eval_num": 0, "teacher_steps": 0}, "train": {"batch_size": 4, "max_images": 4}}
NETWORK = {"model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
PIXELS = ["--features", "pixels", "--num", "8", "--steps", "1"]

pytestmark = pytest.mark.usefixtures("own_cache")


def train(word: str, out: str = "run", **data) -> Path:
    run_settings = {"run": {"eval_num": 0}, "train": SMALL["train"], "network": NETWORK, "data": {"name": word, **data}}
    train_method(TEACHER, resolve_teacher(read_preset("digits-teacher", "train-teacher"), run_settings), Path(out), Quiet(), device="cpu")
    return Path(out).absolute()


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_images(tmp_path / "photos", per_class=4, side=8)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """Another folder to stand in, with other images of the same name."""
    place = tmp_path / "elsewhere"
    place.mkdir()
    write_images(place / "photos", per_class=5, side=8)
    monkeypatch.chdir(tmp_path)
    return place


def test_a_run_and_its_model_keep_place_and_content(folder):
    out = train("photos")
    config = json.loads((out / "config.json").read_text())
    known = read_config(out / "model.safetensors").training["data"]
    assert config["place"] == known["place"] == str(folder)
    assert config["data"] == known["fingerprint"] and len(known["fingerprint"]) == 64


def test_a_run_is_scored_from_any_folder_against_the_images_that_it_saw(folder, elsewhere, monkeypatch):
    out = train("photos")
    monkeypatch.chdir(elsewhere)
    shown = run(fid, out, *PIXELS)
    assert "12 images" in shown and str(folder) in shown  # not the 15 of the folder of that name here
    entry = scores(out / "scores.json")[0]
    known = read_config(out / "model.safetensors").training["data"]
    assert (entry["reference"]["place"], entry["reference"]["fingerprint"]) == (str(folder), known["fingerprint"])
    assert (entry["samples"]["data_place"], entry["samples"]["data_fingerprint"]) == (str(folder), known["fingerprint"])


def test_samples_are_scored_from_any_folder(folder, elsewhere, monkeypatch):
    out = train("photos")
    run(sample, out, "--num", 8, "--steps", 1, "--out", "drawn")
    record = json.loads(Path("drawn/samples.json").read_text())
    assert record["data_place"] == str(folder) and len(record["data_fingerprint"]) == 64
    drawn = Path("drawn").absolute()
    monkeypatch.chdir(elsewhere)
    assert "12 images" in run(fid, drawn, "--features", "pixels")
    entry = scores(drawn / "scores.json")[0]
    assert entry["samples"]["place"] == str(drawn) and len(entry["samples"]["fingerprint"]) == 64


def test_changed_data_are_refused_by_name(folder):
    out = train("photos")
    next(folder.rglob("*.png")).unlink()
    with pytest.raises(DataError, match=f"was trained on photos in {folder}, and {folder} now holds other images or labels"):
        run(fid, out, *PIXELS)
    assert "11 images" in run(fid, out, *PIXELS, "--ref", "photos")  # who names them has them


def test_a_name_that_means_something_else_is_refused(folder, elsewhere, monkeypatch):
    out = train("photos")
    folder.rename(folder.with_name("moved"))
    monkeypatch.chdir(elsewhere)
    with pytest.raises(DataError, match=f"and {elsewhere}/photos now holds other images"):
        run(fid, out, *PIXELS)


def test_moved_data_are_found_by_name_where_they_are_the_same(folder, elsewhere, monkeypatch):
    out = train("photos")
    shutil.rmtree(elsewhere / "photos")
    shutil.move(folder, elsewhere / "photos")
    monkeypatch.chdir(elsewhere)
    assert "12 images" in run(fid, out, *PIXELS)


def test_models_are_compared_by_what_their_data_were_and_not_by_their_name(folder, elsewhere, monkeypatch):
    first, same = train("photos"), train(str(folder) + "/", "same")
    monkeypatch.chdir(elsewhere)
    other = train("photos", "other")
    assert "12 images" in run(fid, first, same, *PIXELS)
    with pytest.raises(ConfigError, match=f"in {folder} and on others of that name in {elsewhere}/photos: give --ref"):
        run(fid, first, other, *PIXELS)


def test_a_model_that_says_nothing_of_the_content_is_scored_with_a_warning(folder, tmp_path):
    from mmgen.models.files import save_model

    out = train("photos")
    model = load_model(out / "model.safetensors")
    del model.config.training["data"]  # as in version 0.1
    save_model(tmp_path / "old.safetensors", model.config, model.network.state_dict())
    shown = run(fid, tmp_path / "old.safetensors", *PIXELS)
    assert f"nothing says which images photos held when the model was trained: those in {folder} are taken" in shown


def distilled(**data) -> None:
    config = resolve_distill(read_preset("digits-distill", "distill"), {**SMALL, "teacher": {"name": "run"}, "data": data})
    train_method(DISTILLATION, config, Path("student"), Quiet(), device="cpu")


def test_a_student_is_distilled_on_its_teachers_data(folder, elsewhere, monkeypatch):
    out = train("photos", conditional=False)
    monkeypatch.chdir(elsewhere)
    shutil.copytree(out, "run")
    distilled(name="", conditional=False)
    assert read_config(Path("student/model.safetensors")).training["data"]["place"] == str(folder)


def test_a_student_is_not_distilled_on_what_its_teacher_did_not_see(folder):
    train("photos", conditional=False)
    next(folder.rglob("*.png")).unlink()
    with pytest.raises(ConfigError, match=f"teacher run was trained on photos, and {folder} now holds other images"):
        distilled(name="", conditional=False)
    distilled(name="photos", conditional=False)


def test_a_model_of_latents_is_scored_against_the_images_behind_them(tmp_path, elsewhere, monkeypatch):
    images = write_images(tmp_path / "large", per_class=8)
    write_vae(tmp_path / "vae")
    run(cache_latents, "--data", "large", "--vae", "vae", "--out", "latents", "--device", "cpu")
    out = train("latents", resolution=8, channels=4)
    monkeypatch.chdir(elsewhere)  # VAE, latents and images are all found again
    assert "24 images" in run(fid, out, *PIXELS)
    next(images.rglob("*.png")).unlink()
    with pytest.raises(DataError, match=f"was trained on large in {images}, and {images} now holds other images"):
        run(fid, out, *PIXELS)


def test_latents_keep_the_content_of_their_images(tmp_path):
    from mmgen.data.content import content_hash
    from mmgen.data.resolve import resolve

    write_images(tmp_path / "large", per_class=30)
    write_vae(tmp_path / "vae")
    run(cache_latents, "--data", "large", "--vae", "vae", "--out", "latents", "--device", "cpu")
    record = json.loads(Path("latents/latents.json").read_text())
    assert record["content"] == content_hash(resolve("large"))
    assert record["source"]["place"] == str(tmp_path / "large") and record["latents"]["vae"] == str(tmp_path / "vae")
