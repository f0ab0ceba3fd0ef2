"""Reading other people's checkpoints: every container, which weights are meant, and a sentence for each kind of damage."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from original_files import (
    golden_state,
    write_diffusers,
    write_edm2_pickle,
    write_edm_pickle,
    write_pt,
    write_safetensors,
)
from reading_tools import OTHER, STATE, refusal, same

from mmgen.errors import ConfigError, ModelError
from mmgen.formats.model_folders import _wanted
from mmgen.formats.reading import read


# Containers
PREFIXES = ("", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.")


@pytest.mark.parametrize("wrap", [None, "ema", "model_ema", "ema_model", "state_dict", "model"])
def test_torch_files(wrap, tmp_path):
    for prefix, legacy in itertools.product(PREFIXES, (False, True)):
        torch_file(wrap, prefix, legacy, tmp_path)


def torch_file(wrap, prefix, legacy, tmp_path):
    names = {"image_size": 256, "model": "DiT-XL/2", "data_path": Path("x/y")}
    path = write_pt(tmp_path / "a.pt", STATE, wrap=wrap, namespace=names if wrap else None, prefix=prefix, legacy=legacy)
    found = read(path)
    same(found.tensors, STATE)
    assert found.container == ("torch .pt (legacy)" if legacy else "torch .pt (zip)") and found.path == path
    assert found.arguments == ({"args": {**names, "data_path": "x/y"}} if wrap else {}) and found.left_out == {}
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def training_file(path: Path) -> Path:
    optimizer = {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-4}]}
    extra = {"model": OTHER, "opt": optimizer, "steps": 400_000, "scaler": {"scale": 1.0}, "none": None}
    return write_pt(path, STATE, wrap="ema", namespace={"seed": 0}, extra=extra)


def test_the_average_and_the_other_weights(tmp_path):
    """The layout of DiT, SiT and REPA: what is not taken is named."""
    path = training_file(tmp_path / "a.pt")
    average, other = read(path), read(path, weights="model")
    same(average.tensors, STATE)
    same(other.tensors, OTHER)
    assert average.left_out.keys() == {"model", "opt", "scaler"} and average.left_out["opt"] == "optimizer state"
    assert average.left_out["model"] == "the weights that are not averaged" and "ema" in other.left_out
    assert average.arguments == {"args": {"seed": 0}, "entries": {"steps": 400_000}}
    with pytest.raises(ConfigError, match="'emma'.*ema"):
        read(path, weights="emma")


def test_a_file_with_the_average_only(tmp_path):
    path = write_pt(tmp_path / "a.pt", STATE, wrap="ema")
    assert "averaged weights only" in refusal(path, weights="model")


def test_nested_state_dicts(tmp_path):
    torch.save({"state_dict": {"model": STATE, "epoch": 3}, "epoch": 3}, tmp_path / "a.pt")
    same(read(tmp_path / "a.pt").tensors, STATE)


def test_nothing_goes_unmentioned(tmp_path):
    torch.save({"ema": {**STATE, "step": 3, 7: torch.ones(1)}, "steps": 4, "mean": torch.ones(1)}, tmp_path / "a.pt")
    found = read(tmp_path / "a.pt")
    assert found.left_out.keys() == {"ema.step", "ema.7", "mean"} and found.arguments == {"entries": {"steps": 4}}
    torch.save({**STATE, 7: torch.ones(1), "step": 3}, tmp_path / "a.pt")
    found = read(tmp_path / "a.pt")
    assert found.left_out.keys() == {"7"} and found.arguments == {"entries": {"step": 3}}


def test_swa(tmp_path):
    """torch.optim.swa_utils.AveragedModel counts beside the weights."""
    average = torch.optim.swa_utils.AveragedModel(torch.nn.Linear(2, 3))
    torch.save(average.state_dict(), tmp_path / "a.pt")
    found = read(tmp_path / "a.pt")
    same(found.tensors, average.module.state_dict())
    assert found.left_out == {"n_averaged": "a counter of the averaging"}


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_safetensors_by_content(suffix, tmp_path):
    path = write_safetensors(tmp_path / f"a{suffix}", STATE, {"format": "pt"})
    found = read(path)
    same(found.tensors, STATE)
    assert (found.container, found.arguments) == ("safetensors", {"metadata": {"format": "pt"}})


def test_names_do_not_matter(tmp_path):
    """The content tells what a file is: lumaai/imm's cifar10.pt is a pickle."""
    same(read(write_edm_pickle(tmp_path / "a.pt", {"model.b.weight": torch.ones(2)})).tensors, {"model.b.weight": torch.ones(2)})
    same(read(write_pt(tmp_path / "a.pkl", STATE)).tensors, STATE)
    same(read(write_pt(tmp_path / "a", STATE, legacy=True)).tensors, STATE)


def test_edm_pickles(tmp_path):
    mark, given = tmp_path / "mark", {"img_resolution": 8, "img_channels": 3, "label_dim": 10, "model_type": "SongUNet"}
    path = write_edm_pickle(
        tmp_path / "a.pkl", golden_state("edm_ncsnpp_cond"), "VEPrecond", given, mark=mark, sigma_max=100, extra={"cur_nimg": 7}
    )
    found = read(path)
    same(found.tensors, golden_state("edm_ncsnpp_cond"))
    assert found.container == "EDM pickle" and not mark.exists()
    assert found.arguments["class_name"] == "VEPrecond" and found.arguments["init_kwargs"] == given
    assert found.arguments["attributes"] == {"sigma_max": 100}
    assert found.arguments["modules"]["model"]["class_name"] == "SongUNet"
    assert found.left_out == {"loss_fn": "the training loss", "augment_pipe": "augmentation of the training images"}
    assert found.arguments["entries"]["dataset_kwargs"]["path"] == "cifar10-32x32.zip"
    assert found.arguments["entries"]["cur_nimg"] == 7


def test_edm2_pickles(tmp_path):
    mark = tmp_path / "mark"
    state = {"unet.emb_fourier.freqs": torch.ones(4), "unet.enc.8x8_conv.weight": torch.ones(2, 4, 3, 3).half(),
             "unet.out_gain": torch.tensor(0.5), "logvar_linear.weight": torch.ones(1, 4)}  # fmt: skip
    found = read(write_edm2_pickle(tmp_path / "a.pkl", state, encoder="StabilityVAEEncoder", mark=mark, sigma_data=0.5))
    same(found.tensors, state)
    assert found.arguments["class_name"] == "Precond" and found.arguments["modules"]["unet"]["class_name"] == "UNet"
    assert found.arguments["entries"]["encoder"]["attributes"]["scale"] == pytest.approx([0.1] * 4)
    assert found.left_out.keys() == {"encoder", "loss_fn"} and not mark.exists()


# Folders
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_pipelines(kind, shards, flat, tmp_path):
    config, scheduler = {"_class_name": "UNet2DModel", "sample_size": 8}, {"_class_name": "DDPMScheduler", "clip_sample": True}
    folder = write_diffusers(tmp_path / "p", STATE, config, scheduler, kind=kind, shards=shards, flat=flat)
    found = read(folder)
    same(found.tensors, STATE)
    assert found.container.startswith("diffusers folder") and found.arguments["config"] == config
    assert found.arguments["scheduler"] == scheduler and found.arguments["model_index"]["_class_name"] == "DDPMPipeline"
    if not flat:  # the model's own folder, of a pipeline
        inner = read(folder / "unet")
        same(inner.tensors, STATE)
        assert inner.arguments["scheduler"] == scheduler and inner.sha256 == found.sha256


def test_a_models_folder_and_safetensors_first(tmp_path):
    config = {"_class_name": "UNet2DModel"}
    write_diffusers(tmp_path, OTHER, config, component=None, kind="bin")
    first = read(tmp_path)
    write_diffusers(tmp_path, STATE, config, {"_class_name": "DDPMScheduler"}, component=None)
    found = read(tmp_path)
    same(first.tensors, OTHER)
    same(found.tensors, STATE)
    assert "scheduler" not in first.arguments and "model_index" not in found.arguments and "scheduler" in found.arguments


def test_parts_of_a_pipeline(tmp_path):
    folder = write_diffusers(tmp_path, STATE, {"_class_name": "DiTTransformer2DModel"}, component="transformer")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "vae").mkdir()
    (folder / "model_index.json").write_text(json.dumps({**index, "vae": ["diffusers", "AutoencoderKL"]}))
    found = read(folder)
    same(found.tensors, STATE)
    assert found.left_out == {"vae": "decodes latents: give it as --vae"}


def test_folders_that_hold_no_model(tmp_path):
    assert "without weights" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "without weights" in refusal(tmp_path)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ModelError, match="model_index.json cannot be read as JSON"):
        read(tmp_path)
    (tmp_path / "model_index.json").write_text("[" * 100_000)
    with pytest.raises(ModelError, match="model_index.json cannot be read as JSON"):
        read(tmp_path)


def test_damaged_shards(tmp_path):
    folder = write_diffusers(tmp_path / "a", STATE, {"_class_name": "UNet2DModel"}, shards=3)
    index = next((folder / "unet").glob("*.index.json"))
    good = json.loads(index.read_text())
    name = good["weight_map"]["a.weight"]
    for weight_map, part in [
        ({**good["weight_map"], "extra": name}, "do not fit their index"),
        ({**good["weight_map"], "extra": "missing.safetensors"}, "lacks missing.safetensors"),
        ({**good["weight_map"], "extra": "../../a.safetensors"}, "outside its folder"),
        ({**good["weight_map"], "extra": "..\\a.safetensors"}, "outside its folder"),
        ({**good["weight_map"], "extra": "/etc/passwd"}, "outside its folder"),
        ({"a.weight": 3}, "lists no weights"),
        ({}, "lists no weights"),
    ]:
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ModelError, match=part):
            read(folder)


# The hub
def test_files_of_a_repository():
    def wanted(*names):
        return set(_wanted(list(names), "user/name"))

    stem = "diffusion_pytorch_model"
    layout = ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json", "README.md", "vae/config.json"]
    files = [f"unet/{stem}.bin", f"unet/{stem}.safetensors", f"unet/{stem}.fp16.safetensors", f"vae/{stem}.bin"]
    assert wanted(*layout, *files) == {*layout[:3], f"unet/{stem}.safetensors"}
    shards = [f"unet/{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert wanted(*layout, *shards, f"unet/{stem}.safetensors.index.json") == {
        *layout[:3], *shards, f"unet/{stem}.safetensors.index.json"
    }  # fmt: skip
    flat = ["config.json", "model_index.json", "scheduler_config.json", f"{stem}.bin"]
    assert wanted(*flat, "README.md", "vae/config.json") == set(flat)
    assert wanted("README.md", "cifar10.pkl") == {"cifar10.pkl"}
    with pytest.raises(ModelError, match="choose one of hf://user/name/a.pkl, hf://user/name/b.pt"):
        wanted("a.pkl", "b.pt")
    with pytest.raises(ModelError, match="no weights"):
        wanted("README.md")


def offline(code: str, cache: Path) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache), "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_hub_out_of_reach(tmp_path):
    """One sentence without a copy in the cache; with one, it is read."""
    code = (
        "from mmgen.formats.reading import read\nfrom mmgen.errors import ModelError\n"
        "for word in ('user/name', 'hf://user/name', 'hf://user/name/a.pkl', 'hf://user/there', 'hf://user/there/a.pt'):\n"
        "    try:\n        print(sorted(read(word).tensors))\n    except ModelError as error:\n        print(error)\n"
    )
    snapshot = tmp_path / "models--user--there" / "snapshots" / ("0" * 40)
    (snapshot.parents[1] / "refs").mkdir(parents=True)
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    snapshot.mkdir(parents=True)
    write_pt(snapshot / "a.pt", STATE)
    *absent, folder, file = offline(code, tmp_path).splitlines()
    assert len(absent) == 3 and all("user/name is not in the local cache and the hub cannot be reached" in m for m in absent)
    assert folder == file == str(sorted(STATE))


@pytest.mark.parametrize("place", ["/nowhere/a.pkl", "./a.pkl", "nowhere.pkl", "folder/a.pkl", "a/b/c"])
def test_what_is_not_there(place):
    assert "there is no file or folder" in refusal(place)
