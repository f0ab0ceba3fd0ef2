"""Folders and files that a training leaves: read, or named with the command that goes on; opened wherever a model is asked for."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from golden import state
from original_files import write_pt, write_safetensors
from test_convert import run, small_unet, write
from tiny_model import make_denoiser

import mmgen
from mmgen.cli.convert import convert as convert_command
from mmgen.cli.convert import inspect
from mmgen.cli.sample import sample
from mmgen.data.resolve import resolve
from mmgen.errors import DataError, ModelError
from mmgen.formats.family import ConvertOptions
from mmgen.formats.reading import read
from mmgen.formats.recognise import convert, family_of
from mmgen.sampling.record import Origin

DIT = state("dit_learn_sigma")
OPTIONS = ["--type", "dit", "--heads", 4]


def other(tensors: dict) -> dict:
    return {key: value + 1 for key, value in tensors.items()}


def refusal(place) -> str:
    with pytest.raises(ModelError) as caught:
        read(place)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- Lightning


@pytest.mark.parametrize("prefix", ["model.", "net.", "model.net.", "network._orig_mod."])
@pytest.mark.parametrize("safetensors", [False, True])
def test_lightning(prefix, safetensors, tmp_path):
    """A LightningModule's state dict: the network as an attribute, beside other parts."""
    tensors = {prefix + key: value for key, value in DIT.items()} | {"loss_weight.logvar": torch.ones(3)}
    if safetensors:
        path = write_safetensors(tmp_path / "a.safetensors", tensors)
    else:
        path = tmp_path / "a.ckpt"
        torch.save({"state_dict": tensors, "pytorch-lightning_version": "2.1.0", "epoch": 3, "global_step": 7}, path)
    found = read(path)
    assert found.tensors.keys() == DIT.keys() and all(torch.equal(found.tensors[key], DIT[key]) for key in DIT)
    assert found.left_out["loss_weight.logvar"] == "another part of the training module"
    convert(found, ConvertOptions("dit", heads=4))


def test_the_average_in_a_training_module(tmp_path):
    tensors = {"net." + k: v for k, v in DIT.items()} | {"net_ema." + k: v for k, v in other(DIT).items()}
    torch.save({"state_dict": tensors}, tmp_path / "a.ckpt")
    for weights, shift in (("ema", 1), ("model", 0)):
        found = read(tmp_path / "a.ckpt", weights=weights)
        assert torch.equal(found.tensors["pos_embed"], DIT["pos_embed"] + shift)
        assert len(found.left_out) == len(DIT)


def test_several_networks_are_not_guessed(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", {p + k: v.clone() for p in ("student.", "teacher.") for k, v in DIT.items()})
    assert "holds several networks (student., teacher.)" in refusal(tmp_path / "a.safetensors")


def test_names_of_edm_and_imm_are_no_prefix(tmp_path):
    path, _ = write("imm_dit_euler_fm_stride", tmp_path)
    assert "model.x_embedder.proj.weight" in read(path).tensors


# ---- DeepSpeed, torch.distributed, accelerate


def deepspeed(folder: Path, name: str = "mp_rank_00_model_states.pt") -> Path:
    inner = folder / "global_step1000"
    inner.mkdir(parents=True)
    (folder / "latest").write_text("global_step1000")
    content = {"module": {"module." + k: v for k, v in DIT.items()}, "buffer_names": [], "optimizer": None, "global_steps": 1000}
    content |= {"param_shapes": [{"x": torch.Size([2, 3])}], "ds_version": "0.14.0", "ds_config": {"train_batch_size": 8}}
    torch.save(content, inner / name)
    (inner / "zero_pp_rank_0_mp_rank_00_optim_states.pt").touch()
    return folder


def test_deepspeed(tmp_path):
    folder = deepspeed(tmp_path / "run")
    for place in (folder, folder / "global_step1000", folder / "global_step1000" / "mp_rank_00_model_states.pt"):
        found = read(place)
        assert found.tensors.keys() == DIT.keys()
    assert "zero_pp_rank_0_mp_rank_00_optim_states.pt" in read(folder).left_out


def test_deepspeed_in_shards(tmp_path):
    message = refusal(deepspeed(tmp_path / "run", "zero_pp_rank_0_mp_rank_00_model_states.pt"))
    assert "ZeRO-3" in message and f"python {tmp_path}/run/zero_to_fp32.py {tmp_path}/run OUT" in message
    message = refusal(deepspeed(tmp_path / "a run", "zero_pp_rank_0_mp_rank_00_model_states.pt"))
    assert shlex.split(message.split("`")[1])[1:] == [f"{tmp_path}/a run/zero_to_fp32.py", f"{tmp_path}/a run", "OUT"]
    folder = deepspeed(tmp_path / "other")
    (folder / "global_step1000" / "mp_rank_01_model_states.pt").touch()
    assert "2 parts of the model" in refusal(folder)


def test_a_tag_that_leads_elsewhere(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "latest").write_text("../b")
    deepspeed(tmp_path / "b")
    assert "without weights" in refusal(tmp_path / "a")


@pytest.mark.slow
def test_torch_distributed(tmp_path):
    """Named without opening its pickle, and the command works."""
    import torch.distributed.checkpoint as dcp

    dcp.save({"model": DIT, "step": 3}, checkpoint_id=tmp_path / "dcp")
    message = refusal(tmp_path / "dcp")
    assert "torch.distributed (DCP)" in message and f"dcp_to_torch {tmp_path / 'dcp'} weights.pt" in message
    (tmp_path / "a state").mkdir()
    (tmp_path / "dcp").rename(tmp_path / "a state" / "pytorch_model_fsdp_0")
    program, *command = shlex.split(refusal(tmp_path / "a state").split("`")[1])
    assert program == "python" and command[-2:] == [str(tmp_path / "a state" / "pytorch_model_fsdp_0"), "weights.pt"]
    subprocess.run([sys.executable, *command], cwd=tmp_path, check=True, capture_output=True)
    assert read(tmp_path / "weights.pt").tensors.keys() == DIT.keys()


def test_two_models_of_accelerate(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", DIT)
    assert read(tmp_path).tensors.keys() == DIT.keys()
    write_safetensors(tmp_path / "model_1.safetensors", other(DIT))
    message = refusal(tmp_path)
    assert "model.safetensors and model_1.safetensors" in message and str(tmp_path / "model_1.safetensors") in message
    assert torch.equal(read(tmp_path / "model_1.safetensors").tensors["pos_embed"], DIT["pos_embed"] + 1)


# ---- diffusers' training scripts


def training_of_diffusers(folder: Path) -> Path:
    """train_unconditional.py: a pipeline, and checkpoints with the U-Net and its average."""
    diffusers = pytest.importorskip("diffusers")
    unet = small_unet(diffusers)
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(folder)
    for number in (500, 1000):
        checkpoint = folder / f"checkpoint-{number}"
        unet.save_pretrained(checkpoint / "unet")
        averaged = diffusers.UNet2DModel.from_config(unet.config)
        averaged.load_state_dict({key: value + 1 for key, value in unet.state_dict().items()})
        averaged.register_to_config(decay=0.9999, optimization_step=number, inv_gamma=1.0, power=0.75, use_ema_warmup=True)
        averaged.register_to_config(min_decay=0.0, update_after_step=0)
        averaged.save_pretrained(checkpoint / "unet_ema")
        (checkpoint / "optimizer.bin").touch()
    return folder


def test_checkpoints_of_diffusers(tmp_path):
    folder = training_of_diffusers(tmp_path / "out")
    plain = read(folder).tensors["conv_in.bias"]
    for weights, shift, left in (("ema", 1, "unet"), ("model", 0, "unet_ema")):
        found = read(folder / "checkpoint-500", weights=weights)
        assert torch.allclose(found.tensors["conv_in.bias"], plain + shift) and left in found.left_out
        config = convert(found, ConvertOptions()).config
        assert "decay" not in json.loads(config.network.config)
    (folder / "model_index.json").unlink()
    shutil.rmtree(folder / "unet")
    message = refusal(folder)
    assert "2 checkpoints" in message and message.endswith(str(folder / "checkpoint-1000"))


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "pytorch_lora_weights.safetensors"])
def test_a_lora_alone_says_what_goes_on(name, tmp_path):
    write_safetensors(tmp_path / name, {"unet.a.lora_A.weight": torch.zeros(2, 2)})
    (tmp_path / "adapter_config.json").write_text("{}") if name.startswith("adapter") else None
    assert "is a LoRA without its model: fuse them in diffusers" in refusal(tmp_path)
    text = run(inspect, tmp_path / name)
    assert "LoRA without its model" in text and "fuse them in diffusers" in text and "no family" not in text


# ---- what inspect says


def test_lightningdit_is_no_dit(tmp_path):
    tensors = DIT | {"blocks.0.mlp.w12.weight": torch.zeros(2, 2), "feat_rope.freqs_cos": torch.zeros(2, 2)}
    path = write_pt(tmp_path / "a.pt", tensors, wrap="ema")
    assert family_of(read(path)) == "lightningdit"
    text = run(inspect, path)
    assert "LightningDiT (hustvl/LightningDiT)" in text and "not convert it" in text
    with pytest.raises(ModelError, match="LightningDiT.*no network of mmgen has"):
        run(convert_command, path, tmp_path / "m.safetensors")


@pytest.mark.parametrize("name, words", [("adm", "ADM or consistency models"), ("consistency", "ADM or consistency models")])
def test_inspect_does_not_tell_apart_what_cannot_be(name, words, tmp_path):
    path, _ = write(name, tmp_path)
    assert words in run(inspect, path)


def test_inspect_names_the_class_of_diffusers(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "unet" / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    write_safetensors(
        tmp_path / "unet" / "diffusion_pytorch_model.safetensors", {"time_embedding.linear_1.weight": torch.ones(2)}
    )
    text = run(inspect, tmp_path)
    assert "UNet2DConditionModel of diffusers" in text and "UNet2DModel of diffusers" not in text


@pytest.mark.parametrize("name", ["dit", "sit", "edm_ddpmpp_cond"])
def test_inspect_promises_what_convert_keeps(name, tmp_path):
    path, options = write(name, tmp_path)
    text = " ".join(run(inspect, path, *options).split())
    promised = "write it as a folder of diffusers" in text
    assert promised is False and "not write it for diffusers" in text
    run(convert_command, path, tmp_path / "m.safetensors", *options)
    with pytest.raises(mmgen.errors.ConfigError):
        run(convert_command, tmp_path / "m.safetensors", tmp_path / "out", "--to", "diffusers")


def test_inspect_promises_diffusers_its_own(tmp_path):
    text = run(inspect, training_of_diffusers(tmp_path / "out"))
    assert "write it as a folder of diffusers" in text


# ---- opened as they are


def test_what_a_teacher_can_be_is_sampled_and_loaded(tmp_path):
    path, _ = write("edm_ddpmpp_cond", tmp_path)
    run(convert_command, path, tmp_path / "m.safetensors")
    ours = mmgen.load(tmp_path / "m.safetensors").sample(3, steps=2, seed=1).images
    assert torch.equal(mmgen.load(path).sample(3, steps=2, seed=1).images, ours)
    run(sample, path, "--num", 3, "--steps", 2, "--out", tmp_path / "samples")
    record = json.loads((tmp_path / "samples" / "samples.json").read_text())
    assert record["complete"] and record["model_sha256"] == read(path).sha256
    assert any("sigma_max 80" in sentence for sentence in record["assumed"])
    assert not (tmp_path / "mark").exists()


def test_a_folder_of_diffusers_is_sampled(tmp_path):
    folder = training_of_diffusers(tmp_path / "out")
    run(sample, folder, "--num", 2, "--steps", 2, "--out", tmp_path / "grid.png")
    assert (tmp_path / "grid.png").is_file()
    assert mmgen.load(folder).sample(1, steps=1).images.shape == (1, 3, 8, 8)


def test_options_of_loading(tmp_path):
    path = write_pt(tmp_path / "a.pt", DIT)
    assert mmgen.load(path, type="dit", heads=4).config.network.num_heads == 4
    with pytest.raises(mmgen.errors.ConfigError, match="say which with type"):
        mmgen.load(path)
    own = make_denoiser(tmp_path / "own.safetensors", channels=1)
    with pytest.raises(mmgen.errors.ConfigError, match="leave out"):
        mmgen.load(own, type="dit")
    assert mmgen.load(own).config.denoiser is not None


@pytest.mark.parametrize("word", ["runs/digits-im", "runs/digits-im/", "other/digits-imn"])
def test_a_run_that_is_not_there(word, tmp_path, monkeypatch):
    """No repository of the hub: one sentence with the nearest run."""
    monkeypatch.chdir(tmp_path)
    for name in ("digits-imm", "cifar10-teacher"):
        folder = tmp_path / word.split("/")[0] / name
        folder.mkdir(parents=True)
        (folder / "log.jsonl").touch()
    for ask in (read, mmgen.load, Origin.of, resolve):  # the last: what `fid` and `compare` take for samples, and --data
        with pytest.raises((ModelError, DataError)) as caught:
            ask(word)
        assert str(caught.value).endswith(f"the nearest run is {word.split('/')[0]}/digits-imm"), ask


def test_no_runs_at_all(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="there is nothing at runs/x: there are no runs in runs"):
        mmgen.load("runs/x")
