"""Neon of latent models: their samples are latents for training, which no VAE decodes; and of any average of a run."""

import json
import shutil
from pathlib import Path

import forks
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_neon import run
from test_train_latents import fresh, place, tiny, train  # noqa: F401

from mmgen.data.latents import load_latents
from mmgen.encoders import vae as vae_module
from mmgen.errors import ConfigError
from mmgen.models.files import save_model
from mmgen.methods.imm.objective import imm_model_config, imm_task
from mmgen.sampling.drawing import SampleSettings, draw, plan
from mmgen.sampling.folder import all_labels
from mmgen.sampling import latents_folder
from mmgen.sampling.latents_folder import write_latents
from mmgen.sampling.record import Origin
from mmgen.training.batches import fetch
from mmgen.training.inputs import Inputs
from mmgen.training.start import load_data


@pytest.fixture(scope="module")
def model(place):  # noqa: F811
    """A latent model that no training has seen."""
    config = tiny(place)
    model_config = imm_model_config(config, load_data(config.data).shape)
    save_model(place / "model.safetensors", model_config, imm_task(config, model_config).trained["model"].network.state_dict())
    return place / "model.safetensors"


@pytest.fixture
def no_vae(monkeypatch):
    def refuse(*_):
        raise AssertionError("no VAE is needed")

    monkeypatch.setattr(vae_module, "load_vae", refuse)


@pytest.mark.slow
def test_samples_are_the_latents_that_training_sees(model, tmp_path, no_vae, monkeypatch):
    monkeypatch.setattr(latents_folder, "_LEAST_IN_SHARD", 16)
    origin, settings, told = Origin.of(model), SampleSettings(steps=1, seed=5), []
    flow = origin.load()
    write_latents(flow, tmp_path / "out", 40, settings, origin, progress=lambda done, of: told.append((done, of)))
    assert told[-1] == (40, 40) and all(done <= 40 for done, _ in told)
    dataset = load_latents(tmp_path / "out")
    assert len(dataset) == 40 and dataset.latents == flow.config.latents and dataset.num_classes == 3
    assert dataset.labels.tolist() == all_labels(flow.config, plan(flow.config, settings), 40) and dataset.class_names == ["a", "b", "c"]
    batch = fetch(dataset, 0, 16, 0, torch.device("cpu"))
    seen, _ = Inputs(tiny(tmp_path).data, 0, dataset.latents).images(batch)
    rows = [np.flatnonzero((dataset.moments[np.arange(40)] == one).all((1, 2, 3))).item() for one in batch.images.numpy()]
    torch.testing.assert_close(seen, draw(flow, settings, rows, decode=False)[0], rtol=0, atol=2e-6)
    # what is there is not drawn again, what is lost is; other samples are refused
    files = sorted((tmp_path / "out/shards").glob("*.npy"))
    before = [(file.stat().st_mtime_ns, file.read_bytes()) for file in files]
    assert len(files) == 3
    files[1].unlink()
    write_latents(flow, tmp_path / "out", 40, settings, origin)
    after = [(file.stat().st_mtime_ns, file.read_bytes()) for file in files]
    assert [b == a for (b, _), (a, _) in zip(before, after)] == [True, False, True] and [b for _, b in before] == [a for _, a in after]
    with pytest.raises(ConfigError, match="steps would be 2, not 1"):
        write_latents(flow, tmp_path / "out", 40, SampleSettings(steps=2, seed=5), origin)
    with pytest.raises(ConfigError, match="something else than samples"):
        write_latents(flow, model.parent, 40, settings, origin)
    write_latents(flow, tmp_path / "out", 50, settings, origin)
    assert len(load_latents(tmp_path / "out")) == 50


TUNE = ("--num", "24", "--steps", "1", "--images", "64", "--lr", "1e-3", "--weight", "1", "--device", "cpu")


@pytest.mark.slow
def test_two_processes_make_the_models_that_one_makes(place, tmp_path):  # noqa: F811
    """Of pixels and of latents, by one launch."""
    train(place, tmp_path / "latents", **{"run.eval_num": 0})
    status, shown = run("train-imm", "--out", tmp_path / "pixels", "--max-images", 128, "--set", "run.eval_num=0")
    assert status == 0, shown
    commands = []
    for name in ("pixels", "latents"):
        shutil.copytree(tmp_path / name, tmp_path / f"{name}-two")
        status, shown = run("neon", tmp_path / name, *TUNE)
        assert status == 0, shown
        commands.append(["neon", str(tmp_path / f"{name}-two"), *TUNE])
    launched = forks.run(*forks.TWO, forks.ROOT / "tests/several_commands.py", json.dumps(commands), cwd=tmp_path, timeout=300)
    assert launched.returncode == 0, launched.stdout[-2000:] + launched.stderr[:4000]
    assert json.loads((tmp_path / "process-1.json").read_text())["size"] == 2
    assert len(list((tmp_path / "pixels-two/neon/samples").glob("*.png"))) == 24
    for name in ("pixels", "latents"):
        base, one, two = (load_file(tmp_path / file) for file in (f"{name}/model.safetensors", f"{name}/neon/model-1.safetensors",
                                                                  f"{name}-two/neon/model-1.safetensors"))  # fmt: skip
        change = max((one[key] - base[key]).abs().max() for key in one)
        assert change > 0 and max((one[key] - two[key]).abs().max() for key in one) < 1e-3 * change


@pytest.mark.slow
def test_each_average_of_a_run_is_led_away_from_its_own_tuning(tmp_path):
    status, shown = run("train-imm", "--out", tmp_path / "run", "--max-images", 128, "--set", "run.eval_num=0", "--set", "train.ema_betas=[0.5,0.9]",
                        "--set", "train.ema_rampup=0")  # fmt: skip
    assert status == 0, shown
    status, shown = run("neon", tmp_path / "run", *TUNE[:4], "--images", 256, *TUNE[6:], "--ema", "0.9")
    assert status == 0 and str(tmp_path / "run/neon-0.9/model-1.safetensors") in shown, shown
    name = Path("model-ema-0.9.safetensors")
    base, tuned, made = (load_file(tmp_path / "run" / file) for file in (name, "neon-0.9/tuned" / name, "neon-0.9/model-1.safetensors"))
    first = load_file(tmp_path / "run/neon-0.9/tuned/model.safetensors")
    assert any(not torch.equal(first[key], value) for key, value in tuned.items())
    assert all(torch.equal(value, (2 * base[key].double() - tuned[key].double()).float()) for key, value in made.items())
    status, shown = run("neon", tmp_path / "run", "--ema", "0.7")
    assert status != 0 and "its other averages: 0.9" in shown
