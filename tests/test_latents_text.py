"""Latents with captions: `cache-latents --pipeline` and --text, what is written, resuming, several processes, refusals."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import replace
from pathlib import Path

import forks
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines import tiny_pipeline

from mmgen.data import latent_texts
from mmgen.data.captions import captions_of
from mmgen.data.decode import centre_crop, crop_corner
from mmgen.data.encoding import EncodingSettings, encode_source
from mmgen.data.latents import load_latents
from mmgen.data.resolve import resolve
from mmgen.data.texts import without
from mmgen.encoders.pipeline import pipeline_parts
from mmgen.encoders.text import encode
from mmgen.encoders.vae import load_vae, normalise
from mmgen.errors import ConfigError, DataError
from mmgen.models.pixels import from_uint8
from mmgen.networks.text import TextSettings
from mmgen.training.batches import fetch
from mmgen.training.start import with_texts
from toy_distill import Quiet

diffusers = pytest.importorskip("diffusers")
RUN = "from typer import run; from mmgen.cli.cache_latents import cache_latents as f; run(f)"
COLOURS = ("red", "green", "blue")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MMGEN_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """images/ of several sizes with captions in metadata.jsonl, one or two each, and a pipeline of each kind."""
    folder = tmp_path_factory.mktemp("latents-text")
    write_images(folder / "images", 80)
    write_images(folder / "few", 8)
    for kind in ("sd15", "sdxl", "pixart_alpha", "sd3", "sana"):
        tiny_pipeline(kind, folder / kind)
    return folder


def write_images(folder: Path, number: int) -> Path:
    folder.mkdir(parents=True)
    random, lines = np.random.default_rng(0), []
    for i in range(number):
        height, width = random.integers(16, 50, 2)
        Image.fromarray(random.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(folder / f"{i:04d}.png")
        texts = [f"a {COLOURS[i % 3]} dot", f"image number {i}"][: 1 + i % 2]
        lines.append(json.dumps({"file_name": f"{i:04d}.png", "text": texts}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def cached(place, out, kind, images="images", notes=None, **settings):
    name = str(place / images)
    parts = None if kind is None else pipeline_parts(str(place / kind), 16)
    vae = load_vae(str(place / (kind or "sd15")))
    settings = EncodingSettings(**{"resolution": 16, "text": True, **settings})
    note = [].append if notes is None else notes.append
    return encode_source(resolve(name), vae, out, settings, name=name, pipeline=parts, note=note)


def digests(folder):
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*.*"))}


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "pixart_alpha", "sd3", "sana"])
def test_latents_and_texts_are_those_of_the_pipeline(place, tmp_path, kind):
    notes, images = [], "few" if kind == "sana" else "images"  # its instruction is long
    record = cached(place, tmp_path / "out", kind, images, notes, dtype="float32")
    number, texts = (8, 12) if kind == "sana" else (80, 120)
    found = load_latents(tmp_path / "out")
    assert found.captions.to_pylist() == [[f"a {COLOURS[i % 3]} dot", f"image number {i}"][: 1 + i % 2] for i in range(number)]
    # latents: as a script that trains the pipeline has them
    vae = diffusers.DiffusionPipeline.from_pretrained(place / kind).vae
    files = [place / images / f"{i:04d}.png" for i in (0, 5, number - 1)]
    pixels = torch.from_numpy(np.stack([np.asarray(centre_crop(Image.open(f), 16)).transpose(2, 0, 1) for f in files]))
    with torch.no_grad():
        coded = vae.encode(from_uint8(pixels))
    mean = coded.latent if kind == "sana" else coded.latent_dist.mean
    expected = (mean - (getattr(vae.config, "shift_factor", None) or 0)) * vae.config.scaling_factor
    moments = torch.from_numpy(found.moments[np.array([0, 5, number - 1])])[:, :4]
    torch.testing.assert_close(normalise(moments, found.latents), expected, rtol=1e-4, atol=1e-5)
    # texts: as the pipeline's encoders give them, whichever caption is drawn
    settings = pipeline_parts(str(place / kind), 16).text
    dataset = with_texts(found, settings, "cpu", Quiet())
    batch = fetch(dataset, 0, number, 3, torch.device("cpu")).condition
    different, drawn = list(dict.fromkeys(found.captions.flatten().to_pylist())), set()
    every = encode(settings, different)
    for i, row in enumerate(encoded_rows(dataset, number, 3)):
        own = every[[different.index(text) for text in found.captions[row].as_py()]]
        same = [torch.equal(batch.mask[i], mask) and torch.allclose(batch.tokens[i][mask], one[mask], atol=2e-2, rtol=1e-2)
                for one, mask in zip(own.tokens, own.mask, strict=True)]  # fmt: skip
        assert any(same)
        drawn.add(same.index(True))
    assert drawn == {0, 1}
    null = encode(settings, ["a"]).empty
    assert torch.allclose(batch.empty.tokens[null.mask], null.tokens[null.mask], atol=2e-2, rtol=1e-2) and torch.equal(batch.empty.mask, null.mask)
    assert (batch.pooled is None) == (settings.pooled == 0) and (batch.sizes is None) == (kind != "sdxl")
    # what is kept: features of tokens that are there, of T5 and Gemma alone
    tokens = sum(p.stat().st_size for p in (tmp_path / "out/texts").glob("*.tokens")) / 2 / settings.width
    stored = {"sd15": 0, "sdxl": 0, "sd3": texts * settings.length}.get(kind)
    assert tokens == stored if stored is not None else texts * 5 < tokens < texts * 20
    assert record["text"] == {**record["text"], "captions": texts, "features": stored != 0}
    assert any("of disk will be needed" in note and "for texts" in note for note in notes)
    assert any("captions are longer than the encoders" in note for note in notes) == (kind in ("sd15", "sdxl"))  # which take 12 tokens
    assert not [p for p in (tmp_path / "out/texts").iterdir() if p.name.endswith((".json", ".arrow")) and p.stem.isdigit()]


def encoded_rows(dataset, number, seed):
    from mmgen.training.batches import data_indices

    return data_indices(len(dataset), 0, number, seed).tolist()


def test_sdxl_is_told_each_images_size_and_crop(place, tmp_path):
    cached(place, tmp_path / "out", "sdxl", xflip=True)
    dataset = with_texts(load_latents(tmp_path / "out"), pipeline_parts(str(place / "sdxl"), 16).text, "cpu", Quiet())
    sizes = fetch(dataset, 0, 160, 0, torch.device("cpu")).condition.sizes
    for i, row in enumerate(encoded_rows(dataset, 160, 0)):
        image = Image.open(place / "images" / f"{row // 2:04d}.png")
        assert sizes[i].tolist() == [image.height, image.width, *crop_corner(image.height, image.width, 16), 16, 16]


@pytest.mark.parametrize("size", [(16, 16), (16, 40), (50, 16), (31, 33), (100, 37), (64, 65), (33, 201)])
def test_the_corner_is_that_of_the_crop(size):
    """An image whose pixels are their own coordinates: its corner says what was cropped, in the pixels of the resized image."""
    height, width = size
    y, x = np.mgrid[:height, :width].astype(np.float64)
    top, left = crop_corner(height, width, 16)
    for values, start, length in ((y, top, height), (x, left, width)):
        image = Image.fromarray((values * 255 / max(length - 1, 1)).astype(np.float32), mode="F")
        small = np.asarray(centre_crop(image, 16))
        scale = min(height, width) / 16
        middle = small[8, 8] * max(length - 1, 1) / 255  # the source coordinate of the pixel 8 of the crop
        assert abs((middle + 0.5) / scale - (start + 8.5)) < 1.2


def test_captions_alone_are_kept_for_models_of_ones_own(place, tmp_path):
    cached(place, tmp_path / "out", None)
    found = load_latents(tmp_path / "out")
    dataset = with_texts(found, TextSettings(length=16, pooled=128), "cpu", Quiet())
    text = fetch(dataset, 0, 8, 0, torch.device("cpu")).condition
    assert text.tokens.dtype == torch.int64 and text.tokens.shape == (8, 16)
    assert found.shape.captions[0] == "a red dot" and found.latents.target_std == 0.5
    with pytest.raises(DataError, match="other texts"):
        cached(place, tmp_path / "out", None, text=False)


def test_images_without_a_caption_are_named_or_left_out(place, tmp_path):
    write_images(tmp_path / "images", 70)
    lines = (tmp_path / "images/metadata.jsonl").read_text().split("\n")
    lines[5] = json.dumps({"file_name": "0005.png", "text": [""]})
    (tmp_path / "images/metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"1 of 70 images have no caption, or an empty one .the first is .*0005.png"):
        cached(place, tmp_path / "out", "pixart_alpha", images=tmp_path / "images")
    record = cached(place, tmp_path / "out", "pixart_alpha", images=tmp_path / "images", on_corrupt="skip")
    found = load_latents(tmp_path / "out")
    assert len(found) == len(found.captions) == 69 and record["skipped"] == [record["skipped"][0]] and "0005.png" in record["skipped"][0]
    assert found.captions[5].as_py() == ["a red dot"] and found.captions[4].as_py() == ["a green dot"] and len(record["content"]) == 64


def test_leaving_captions_out_takes_the_features_of_the_others(place, tmp_path):
    cached(place, tmp_path / "out", "pixart_alpha")
    found, settings = load_latents(tmp_path / "out"), pipeline_parts(str(place / "pixart_alpha"), 16).text
    left = replace(found, captions=captions_of([texts[-1:] for texts in found.captions.to_pylist()]))
    text = fetch(with_texts(left, settings, "cpu", Quiet()), 0, 80, 0, torch.device("cpu")).condition
    rows = encoded_rows(left, 80, 0)
    expected = encode(settings, [left.captions[row][0].as_py() for row in rows])
    assert torch.equal(text.mask, expected.mask) and torch.allclose(text.tokens[text.mask], expected.tokens[text.mask], atol=2e-2, rtol=1e-2)
    with pytest.raises(ConfigError, match="no image has the caption"):
        without(found.captions, ("nothing",))


def test_texts_of_another_encoder_or_length_are_one_sentence(place, tmp_path):
    cached(place, tmp_path / "out", "pixart_alpha")
    found, settings = load_latents(tmp_path / "out"), pipeline_parts(str(place / "pixart_alpha"), 16).text
    with pytest.raises(ConfigError, match="holds texts of 120 tokens by a PixArtAlphaPipeline, and the model takes 300 by a SanaPipeline: make latents"):
        with_texts(found, pipeline_parts(str(place / "sana"), 16).text, "cpu", Quiet())
    with pytest.raises(ConfigError, match="holds texts by the encoders of .*, which differ"):
        with_texts(found, replace(settings, sha256="0" * 64, encoder="/elsewhere"), "cpu", Quiet())
    with pytest.raises(DataError, match="out holds latents of another VAE than .*sd3: give another --out"):
        cached(place, tmp_path / "out", "sd3")


def test_damage_is_one_sentence(place, tmp_path):
    cached(place, tmp_path / "out", "pixart_alpha")
    for name in ("captions.arrow", "mask.npy", "000001.tokens", "null.safetensors"):
        file = tmp_path / "out/texts" / name
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2 // 16 * 16])
        with pytest.raises(DataError, match="texts is damaged"):
            load_latents(tmp_path / "out")
        file.unlink()
        with pytest.raises(DataError, match="texts is damaged"):
            load_latents(tmp_path / "out")
        file.write_bytes(content)
    assert len(load_latents(tmp_path / "out")) == 80


def test_a_disk_too_small_is_said_before(place, tmp_path, monkeypatch):
    from mmgen.data import encoding

    task = latent_texts.TextTask(resolve(str(place / "images")).captions(), pipeline_parts(str(place / "sd3"), 16).text, tmp_path, 16)
    assert task.bytes_for([range(50), range(50, 80)]) == pytest.approx(120 * (268 * 24 + 16) * 2, rel=0.1)
    monkeypatch.setattr(encoding.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1_000_000}))
    with pytest.raises(DataError, match="GB more, and 0.0 GB are free"):
        cached(place, tmp_path / "out", "sd3")
    assert not list((tmp_path / "out").rglob("*.npy"))


def command(place, out, *program):
    given = "--data", place / "images", "--pipeline", place / "pixart_alpha", "--resolution", "16", "--out", out, "--device", "cpu"
    return forks.Process(*(program or ("-c", RUN)), *given, "--batch-size", "4")


@pytest.mark.slow
def test_after_a_kill_and_with_two_processes_the_files_are_the_same(place, tmp_path):
    process = command(place, tmp_path / "one")
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0 and "120 tokens by the encoders of PixArtAlphaPipeline" in stdout, stderr[-2000:]
    assert f"--teacher {place / 'pixart_alpha'} --data {tmp_path / 'one'}" in stdout and "of disk will be needed" in stderr
    whole = digests(tmp_path / "one")
    process = command(place, tmp_path / "killed")
    while process.poll() is None and not (tmp_path / "killed/shards/000000.npy").is_file():
        time.sleep(0.01)
    process.kill()
    process.wait()
    process = command(place, tmp_path / "killed")
    assert process.communicate(timeout=300) and process.returncode == 0
    assert digests(tmp_path / "killed") == whole
    (tmp_path / "run.py").write_text(RUN)
    process = command(place, tmp_path / "two", *forks.TWO, tmp_path / "run.py")
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr[-2000:]
    assert digests(tmp_path / "two") == whole


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--pipeline", "p", "--vae", "v"], "brings its own VAE"),
        (["--captions", "c.json"], "--captions needs captions to be kept: give --pipeline, or --text"),
        (["--caption-column", "c"], "--caption-column needs captions to be kept"),
        (["--pipeline", "sd15", "--normalisation", "imm"], "have its own scaling"),
        (["--pipeline", "images"], "not the folder of a pipeline of diffusers"),
    ],
)
def test_options_that_do_not_go_together(place, tmp_path, monkeypatch, options, sentence):
    from typer.testing import CliRunner

    from mmgen.cli import app

    monkeypatch.chdir(place)
    found = CliRunner().invoke(app, ["cache-latents", "--data", "images", "--resolution", "16", "--out", str(tmp_path / "out"), *options])
    assert found.exit_code and sentence in str(found.exception)
