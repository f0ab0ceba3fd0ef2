"""IMM in a VAE's latent space: cache, train, sample, decode, with networks of random weights; and what is refused."""

import json
import shutil
from dataclasses import replace

import forks
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file
from tiny_vae import write_images, write_vae
from toy_task import Quiet
from typer.testing import CliRunner

import mmgen
from mmgen.cli import app
from mmgen.config import sections as configs
from mmgen.config import imm as imm_config
from mmgen.encoders import vae as vae_module
from mmgen.config.sections import preset_names, read_preset
from mmgen.data.encoding import EncodingSettings, encode_source
from mmgen.data.latents import load_latents
from mmgen.data import load
from mmgen.data.resolve import resolve
from mmgen.metrics.frechet import fd_pixels
from mmgen.errors import ConfigError, DataError
from mmgen.config.imm import ImmConfig
from mmgen.models.files import read_config
from mmgen.networks.conditions import Labels
from mmgen.system.random import keys, normal
from mmgen.training.batches import data_indices, fetch
from mmgen.methods.imm.objective import ImmObjective, imm_model_config, imm_task
from mmgen.system.processes import ProcessGroup
from mmgen.training.scorer import make_scorer
from mmgen.training.inputs import LATENT
from mmgen.methods import IMM
from mmgen.methods import run as methods
from mmgen.training.start import load_data
from mmgen.encoders.vae import load_vae

TINY = {
    "network": {"kind": "dit", "hidden_size": 16, "depth": 1, "num_heads": 2, "patch_size": 2},
    "flow": {"parametrization": "euler_fm", "t_min": 0.0, "t_max": 0.994},
    "data": {"resolution": 8, "channels": 4, "conditional": True, "num_classes": 3},
    "optimizer": {"name": "adamw", "lr": 1e-3},
    "train": {"batch_size": 16, "max_images": 64, "precision": "fp32", "ema_betas": [0.9]},
    "sampling": {"guidance": 1.5},
    "run": {"eval_num": 40, "batch_per_device": 8, "checkpoint_every": 32, "preview_every": 32, "eval_every": 32, "eval_steps": [1, 2],
            "log_every": 1},
}  # fmt: skip


@pytest.fixture(autouse=True)
def fresh():
    yield
    vae_module._load.cache_clear()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    write_images(folder / "images", per_class=30)
    vae = load_vae(write_vae(folder / "vae"))
    source = resolve(str(folder / "images"))
    encode_source(source, vae, folder / "latents", EncodingSettings(dtype="float32"), name=str(folder / "images"))
    return folder


def tiny(place, **changes):
    return imm_config.resolve(TINY, configs.nest({"data.name": str(place / "latents"), **changes}, ImmConfig))


def train(place, out, reporter=None, **changes):
    AcceleratorState._reset_state(reset_partial_state=True)
    return methods.train(IMM, tiny(place, **changes), out, reporter or Quiet(), device="cpu")


def test_cache_train_sample_decode_a_picture(place, tmp_path):
    reporter = Quiet()
    outcome = train(place, tmp_path / "run", reporter)
    assert outcome.finished and outcome.results["figure"] == "FD-pixels-40" and outcome.results["reference"] == 90
    lines = [line for line in reporter.lines if "values" in line]
    assert [line["images"] for line in lines] == [32, 64] and all(0.1 < value for value in lines[0]["variance"].values())
    best = read_config(tmp_path / "run/model-best.safetensors").training
    assert best["figures"]["FD-pixels-40"]["1"] == min(line["values"]["1"] for line in lines)
    # decoded, and compared with the images that the latents were made of, as by `mmgen fid`
    drawn = mmgen.load(tmp_path / "run").sample(40, steps=1, seed=0).images
    real = torch.from_numpy(np.array(load(str(place / "images"), resolution=16, channels=3).images))
    assert lines[-1]["values"]["1"] == pytest.approx(fd_pixels(drawn, real), rel=1e-4)
    assert [line["images"] for line in reporter.lines if "loss" in line] == [16, 32, 48, 64]
    config = read_config(tmp_path / "run/model.safetensors")
    stored = load_latents(place / "latents")
    assert config.latents == stored.latents and (config.resolution, config.channels, config.num_classes) == (8, 4, 3)
    for file in ("samples.png", "curves.png", "previews/000000000032.png"):
        assert min(Image.open(tmp_path / "run" / file).size) > 100
    images = mmgen.load(tmp_path / "run").sample(5, steps=2, seed=3).images
    assert images.shape == (5, 3, 16, 16) and images.dtype == torch.uint8 and images.float().std() > 1


def test_scores_of_latents_by_what_can_be_had(place, tmp_path):
    """Statistics where they are named; without the images, a sentence. What cannot be compared with is refused."""
    moved, run = tmp_path / "moved", configs.RunSettings(eval_num=8)
    shutil.copytree(place / "latents", moved)
    dataset, notes = load_latents(moved), []
    gone = replace(dataset, images={**dataset.images, "word": "nowhere", "place": str(tmp_path / "nowhere")})
    scorer = lambda run, dataset: make_scorer(run, dataset, torch.device("cpu"), ProcessGroup(), notes.append)  # noqa: E731
    assert scorer(run, gone) is None and len(notes) == 1
    assert notes[0].startswith("no scores while training: ") and notes[0].endswith("`mmgen fid` scores the finished run")
    file = tmp_path / "statistics.safetensors"
    CliRunner().invoke(app, ["fid", str(place / "images"), "--features", "pixels", "--save-stats", str(file), "--device", "cpu"], catch_exceptions=False)
    found = scorer(replace(run, eval_ref=str(file)), gone)
    found._reference = found._collect(8)
    assert found.compared == 90 and found._of_data == 0
    assert scorer(replace(run, eval_ref=str(tmp_path)), gone) is None and "is no file of statistics" in notes[-1]


@pytest.mark.slow
def test_two_processes_score_latents_as_one(place, tmp_path):
    command = ["-m", "mmgen", "train-imm", "--data", str(place / "latents"), "--preset", "imagenet256-imm-s", "--device", "cpu", "--batch-size", "16",
               "--batch-per-device", "8", "--max-images", "32", "--set", "data.resolution=8", "--set", "data.num_classes=3",
               "--set", "network.hidden_size=16", "--set", "network.depth=1", "--set", "network.num_heads=2", "--precision", "fp32",
               "--eval-num", "40", "--eval-every", "16", "--set", "run.eval_steps=[1]", "--out"]  # fmt: skip
    values = []
    for name, launcher in ("one", ()), ("two", forks.TWO):
        result = forks.run(*launcher, *command, tmp_path / name, timeout=500)
        assert result.returncode == 0 and f"= {1 + (name == 'two')} device" in result.stderr, result.stderr  # who shares the batch
        lines = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        values.append([line["values"]["1"] for line in lines if "values" in line])
        assert (tmp_path / name / "model-best.safetensors").is_file()
    assert len(values[0]) == 2 and values[0] == pytest.approx(values[1], rel=1e-4)


def test_what_the_network_sees_is_drawn_anew_and_normalised(place, tmp_path):
    """z = (mean + std e - m) / s * 0.5, with e by the number of the image in the whole training."""
    config = tiny(place)
    dataset = load_data(config.data)
    model_config = imm_model_config(config, dataset.shape)
    objective = imm_task(config, model_config).trained["model"].objective
    moments = np.concatenate([np.load(f) for f in sorted((place / "latents/shards").glob("*.npy"))]).astype(np.float64)
    seen = []
    for first in (40, 40 + 90):  # the second time in another epoch
        batch = fetch(dataset, first, 8, config.train.seed, torch.device("cpu"))
        x, label = objective.inputs.images(batch)
        assert label is None and x.shape == (8, 4, 8, 8) and x.dtype == torch.float32
        rows = data_indices(90, first, 8, config.train.seed)
        noise = normal(keys(config.train.seed, torch.arange(first, first + 8), LATENT), (4, 8, 8)).double().numpy()
        raw = moments[rows, :4] + moments[rows, 4:] * noise
        mean, std = (np.array(v)[:, None, None] for v in (dataset.latents.mean, dataset.latents.std))
        torch.testing.assert_close(x.double(), torch.from_numpy((raw - mean) / std * 0.5), rtol=1e-4, atol=1e-5)
        assert batch.condition.classes.tolist() == (rows // 30).tolist()
        seen.append(x)
    assert not torch.equal(*seen)
    # over the whole data set the deviation is that of the noise
    whole = objective.inputs.images(fetch(dataset, 0, 90, 0, torch.device("cpu")))[0]
    assert whole.std((0, 2, 3)).tolist() == pytest.approx([0.5] * 4, rel=0.03)
    assert whole.mean((0, 2, 3)).tolist() == pytest.approx([0] * 4, abs=0.03)


def test_latents_have_the_deviation_of_the_noise(place):
    """sigma_data of the flow map counts, whatever the cache says."""
    config = tiny(place, **{"flow.sigma_data": 1.0})
    assert imm_model_config(config, load_data(config.data).shape).latents.target_std == 1.0


def test_pixels_are_as_before(place):
    config = imm_config.resolve({"data": {"name": "digits"}})
    dataset = load_data(config.data)
    assert dataset.shape.latents is None and imm_model_config(config, dataset.shape).latents is None
    objective = ImmObjective(torch.nn.Identity(), config)
    batch = fetch(dataset, 0, 4, 0, torch.device("cpu"))
    assert torch.equal(objective.inputs.images(batch)[0], batch.images / 127.5 - 1)


def test_labels_are_hidden_as_often_as_configured(place):
    config = tiny(place, **{"data.label_dropout": 0.25})
    objective = imm_task(config, imm_model_config(config, load_data(config.data).shape)).trained["model"].objective
    batch = replace(fetch(load_data(config.data), 0, 8, 0, torch.device("cpu")), index=torch.arange(4000))
    batch.condition = Labels(torch.zeros(4000, dtype=torch.int64), 3)
    label = objective._conditions(batch)[0].classes
    assert set(label.tolist()) == {0, 3} and (label == 3).double().mean() == pytest.approx(0.25, abs=0.03)


def test_resumed_is_the_same_bit_for_bit(place, tmp_path):
    train(place, tmp_path / "whole", **{"run.preview_every": 10**9})
    for images in (48, 64):
        train(place, tmp_path / "parts", **{"train.max_images": images, "run.preview_every": 10**9})
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(parts[key], value) for key, value in whole.items())


def test_without_its_vae_a_run_goes_on_without_pictures(place, tmp_path):
    shutil.copytree(place / "latents", tmp_path / "latents")
    record = json.loads((tmp_path / "latents/latents.json").read_text())
    record["latents"]["vae"] = "gone"
    (tmp_path / "latents/latents.json").write_text(json.dumps(record))
    reporter = Quiet()
    outcome = train(tmp_path, tmp_path / "run", reporter)
    assert outcome.finished and any("no pictures while training: there is no folder gone" in note for note in reporter.notes)
    assert (tmp_path / "run/model.safetensors").is_file() and not (tmp_path / "run/samples.png").exists()
    assert not (tmp_path / "run/previews").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.resolution": 16}, r"data.resolution is 16, but .* latents of 8x8 \(of images of 16x16\)"),
        ({"data.channels": 3}, "data.channels is 3, but .* 4 channels"),
        ({"data.num_classes": 10}, "data.num_classes is 10, but .* has 3 classes"),
        ({"data.xflip": True}, "data.xflip is for images"),
        ({"data.split": "test"}, "data.split is a choice of `mmgen cache-latents`"),
        ({"data.image_column": "image"}, "data.image_column is a choice"),
        ({"data.on_corrupt": "skip"}, "data.on_corrupt is a choice"),
    ],
)
def test_settings_that_contradict_the_latents(place, changes, message):
    with pytest.raises(ConfigError, match=message):
        load_data(tiny(place, **changes).data)


def test_augmentation_is_for_images(place):
    config = imm_config.resolve({"data": {"name": str(place / "latents"), "augment": 0.12}})
    with pytest.raises(ConfigError, match="data.augment is for images"):
        load_data(config.data)


def test_what_is_not_there_says_how_to_make_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = imm_config.resolve(read_preset("imagenet256-imm-xl"))
    with pytest.raises(
        DataError, match="latents of 4 channels, and imagenet256-latents is no folder of them.*mmgen cache-latents"
    ):
        load_data(config.data)


def test_every_preset_on_latents_meets_a_folder_of_them(place, tmp_path, monkeypatch):
    """The sizes of ImageNet-256 in a folder of two images: settings and data go together, and the model knows its VAE."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(place / "latents", tmp_path / "imagenet256-latents")
    record = json.loads((tmp_path / "imagenet256-latents/latents.json").read_text())
    record |= {"shards": [1000], "number": 1000, "size": 32, "resolution": 256, "class_names": None}
    record["latents"]["resolution"] = 256
    (tmp_path / "imagenet256-latents/latents.json").write_text(json.dumps(record))
    shutil.rmtree(tmp_path / "imagenet256-latents/shards")
    (tmp_path / "imagenet256-latents/shards").mkdir()
    np.save(tmp_path / "imagenet256-latents/shards/000000.npy", np.zeros((1000, 8, 32, 32), np.float32))
    np.save(tmp_path / "imagenet256-latents/labels.npy", np.arange(1000))
    names = [name for name in preset_names() if name.startswith("imagenet256-imm")]
    assert len(names) == 5
    for name in names:
        for word in ("imagenet256-latents", "imagenet256-latents/"):
            config = imm_config.resolve(read_preset(name), configs.nest({"data.name": word}, ImmConfig))
            model = imm_model_config(config, load_data(config.data).shape)
            assert (model.latents.resolution, model.num_classes, model.sampling.guidance) == (256, 1000, 1.5)
            assert config.data.label_dropout == 0.1


def test_two_vaes_are_two_runs(place, tmp_path):
    """The data's fingerprint holds the VAE and its normalisation: a run is not resumed on other latents."""
    from mmgen.errors import TrainingError

    train(place, tmp_path / "run", **{"run.preview_every": 10**9})
    other = load_vae(write_vae(tmp_path / "vae", seed=5))
    encode_source(resolve(str(place / "images")), other, tmp_path / "latents", EncodingSettings(dtype="float32"), name="x")
    config = tiny(place)
    AcceleratorState._reset_state(reset_partial_state=True)
    moved = replace(config, data=replace(config.data, name=str(tmp_path / "latents")))
    with pytest.raises(TrainingError, match="the data have changed"):
        methods.train(IMM, moved, tmp_path / "run", Quiet(), device="cpu")
