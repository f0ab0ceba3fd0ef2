"""Reading other people's checkpoints: every container, which weights are meant, and a sentence for each kind of damage."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from original_files import (
    Persistent,
    golden_state,
    original_modules,
    write_diffusers,
    write_edm2_pickle,
    write_edm_pickle,
    write_pickle,
    write_pt,
    write_safetensors,
)

from mmgen.formats.model_folders import _wanted
from mmgen.formats.reading import read
from mmgen.errors import ConfigError, ModelError

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2), "b.weight": torch.full((2,), 0.5).half()}
OTHER = {key: value + 1 for key, value in STATE.items()}


def same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key


def refusal(path, **options) -> str:
    with pytest.raises(ModelError) as error:
        read(path, **options)
    message = str(error.value)
    assert "\n" not in message and str(path) in message and len(message) < 500
    return message


# Containers


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("wrap", [None, "ema", "model_ema", "ema_model", "state_dict", "model"])
def test_torch_files(wrap, prefix, legacy, tmp_path):
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


# Damage


def pickled(value) -> bytes:
    return pickle.dumps(value)


def test_kinds_of_damage(tmp_path):
    """Each has its own sentence."""
    torch.save(STATE, tmp_path / "whole.pt")
    write_edm_pickle(tmp_path / "whole.pkl", {"model.b.weight": torch.ones(300)})
    write_safetensors(tmp_path / "whole.safetensors", STATE)
    whole, legacy = (tmp_path / "whole.pt").read_bytes(), write_pt(tmp_path / "l.pt", STATE, legacy=True).read_bytes()
    edm, safe = (tmp_path / "whole.pkl").read_bytes(), (tmp_path / "whole.safetensors").read_bytes()
    for name, content, part in [
        ("a.pkl", b"", "is empty"),
        ("a.pkl", b"<!DOCTYPE html><html>404</html>", "web page"),
        ("a.safetensors", b"<html>", "web page"),
        ("a.pt", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 41963912\n", "git lfs pull"),
        ("a.pt", whole[: len(whole) // 2], "damaged or cut short"),
        ("a.pt", legacy[:-1], "damaged or cut short"),
        ("a.pkl", edm[: len(edm) // 2], "damaged or cut short"),
        ("a.safetensors", safe[:-1], "damaged or cut short"),
        ("a.safetensors", safe[:5], "damaged or cut short"),
        ("a.pt", whole.replace(STATE["a.weight"].numpy().tobytes(), bytes(24)), "checksum"),
        ("a.gguf", b"GGUF\x03\x00\x00\x00", "GGUF file, not a format of this field"),
        ("a.onnx", b"\x08\x07\x12\x07pytorch\x1a", "ONNX file, not a format of this field"),
        ("a.h5", b"\x89HDF\r\n\x1a\n", "HDF5"),
        ("a.npy", b"\x93NUMPY\x01\x00", "NumPy array, not a format"),
        ("a.pkl", pickled({"mu": np.zeros(3), "sigma": np.eye(3)}), "NumPy arrays and no network"),
        ("a.pkl", pickled(np.zeros(3)), "holds a NumPy array, and no weights"),
        ("a.pkl", pickled([1, 2]), "holds a list"),
        ("a.pkl", pickled({"a": 1, "b\x1b[2J": 2}), "its entries: a, b"),
        ("a.txt", b"some text of somebody\n", "damaged or cut short"),
    ]:
        (tmp_path / name).write_bytes(content)
        assert part in refusal(tmp_path / name), part
        assert "\x1b" not in refusal(tmp_path / name)


def test_archives_that_are_no_weights(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.zeros(3))
    assert "NumPy .npz" in refusal(tmp_path / "a.npz")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("model.pkl", b"")
    assert "a zip archive, but none of torch.save" in refusal(tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "s.pt", "w") as file:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            file.writestr(f"archive/{name}", b"")
    assert "TorchScript" in refusal(tmp_path / "s.pt")


def rewritten(
    path: Path, target: Path, compression: int = zipfile.ZIP_STORED, twice: str = "", replace: dict | None = None
) -> Path:
    """A zip with the same entries; one of them twice, or with another content."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w", compression) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, (replace or {}).get(entry.filename.split("/", 1)[1], old.read(entry)))
        if twice:
            with pytest.warns(UserWarning, match="Duplicate"):
                new.writestr(next(e.filename for e in old.infolist() if e.filename.endswith(twice)), b"other")
    return target


def test_unusual_zips(tmp_path):
    path = write_pt(tmp_path / "a.pt", {"a": torch.zeros(1_000_000)})
    same(read(rewritten(path, tmp_path / "same.pt")).tensors, {"a": torch.zeros(1_000_000)})
    assert "compressed entries" in refusal(rewritten(path, tmp_path / "bomb.pt", zipfile.ZIP_DEFLATED))
    assert "same name" in refusal(rewritten(path, tmp_path / "twice.pt", twice="data.pkl"))
    assert "big-endian" in refusal(rewritten(path, tmp_path / "big.pt", replace={"byteorder": b"big"}))
    assert "damaged" in refusal(rewritten(path, tmp_path / "short.pt", replace={"data/0": bytes(100)}))
    assert "damaged" in refusal(rewritten(path, tmp_path / "pickle.pt", replace={"data.pkl": b"\x80\x02"}))


def test_entries_that_overlap(tmp_path):
    """A zip whose entries are all the same bytes: declared sizes are more than the file has."""
    path = write_pt(tmp_path / "a.pt", {str(i): torch.zeros(100_000) + i for i in range(8)})
    content = path.read_bytes()
    with zipfile.ZipFile(path) as file:
        entries = {e.filename: e for e in file.infolist()}
        first = next(e for name, e in entries.items() if name.endswith("data/0"))
        start = file.start_dir
    directory, kept = content[start:], content[: first.header_offset + 30 + 200 + first.file_size]
    for name, entry in entries.items():
        if "/data/" in name:
            directory = directory.replace(struct.pack("<I", entry.header_offset) + name.encode(),
                                          struct.pack("<I", first.header_offset) + name.encode())  # fmt: skip
    end = directory.rindex(b"PK\x05\x06")
    directory = directory[:end] + directory[end : end + 16] + struct.pack("<I", len(kept)) + directory[end + 20 :]
    directory = directory[: directory.index(b"PK\x06\x06")] + directory[end:] if b"PK\x06\x06" in directory else directory
    (tmp_path / "b.pt").write_bytes(kept + directory)
    assert "declares more bytes than it has" in refusal(tmp_path / "b.pt")


def test_training_states(tmp_path):
    """EDM's and IMM's training-state files hold whole modules, and EDM2's averages without names."""
    net = Persistent("EDMPrecond", {})
    net._modules["model"] = torch.nn.Linear(2, 2)
    torch_state = {"net": net, "optimizer_state": {"state": {}, "param_groups": []}}
    with original_modules():
        torch.save(torch_state, tmp_path / "a.pt")
    assert "use the network-snapshot .pkl" in refusal(tmp_path / "a.pt")
    torch.save({"state": {"cur_nimg": 1}, "net": STATE, "ema": {"stds": [0.05], "emas": [OTHER]}}, tmp_path / "b.pt")
    assert "whole training state" in refusal(tmp_path / "b.pt")
    torch.save({"model": STATE, "ema": {"decay": 0.99, "shadow_params": list(OTHER.values())}}, tmp_path / "c.pt")
    assert "whole training state" in refusal(tmp_path / "c.pt")
    torch.save({"model": STATE, "ema": [1]}, tmp_path / "d.pt")
    assert "--weights model" in refusal(tmp_path / "d.pt")
    same(read(tmp_path / "d.pt", weights="model").tensors, STATE)


def test_a_module_of_unknown_code(tmp_path):
    """torch.save(model): its class is refused by name, and the sentence says what to do."""
    namespace = argparse.Namespace
    try:
        namespace.__module__ = "models"  # pickled as models.Namespace
        sys.modules["models"] = argparse
        torch.save({"model": namespace(a=1), "ema": STATE}, tmp_path / "a.pt")
    finally:
        namespace.__module__ = "argparse"
        del sys.modules["models"]
    assert "asks for models.Namespace" in (message := refusal(tmp_path / "a.pt")) and "state_dict()" in message


def test_names_that_collide(tmp_path):
    torch.save({"a._orig_mod.b": torch.ones(1), "a.b": torch.ones(1)}, tmp_path / "a.pt")
    assert "two tensors of one name" in refusal(tmp_path / "a.pt")


def test_plain_pickles_of_state_dicts(tmp_path):
    found = read(write_pickle(tmp_path / "a.pkl", {"state_dict": STATE}))
    same(found.tensors, STATE)
    assert found.container == "pickle"
