"""Pipelines that are not whole, of another class, or of no use as teachers: one sentence each, by every command that opens one."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pipelines import tiny_pipeline
from typer.testing import CliRunner

import mmgen
from mmgen.cli import app
from mmgen.errors import MmgenError
from mmgen.formats.pipelines import source_of
from mmgen.formats.reading import read
from mmgen.formats.recognise import describe
from mmgen.sampling.drawing import SampleSettings
from mmgen.sampling.guidance import choose_guidance

pytest.importorskip("diffusers")
pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    place = tmp_path_factory.mktemp("whole")
    return {kind: Path(tiny_pipeline(kind, place / kind)) for kind in ("sd15", "sd21_zero_snr", "sd3", "sana")}


def edited(file: Path, **changes) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in {**content, **changes}.items() if value != "LEFT OUT"}))


def renamed(folder: Path, part: str, ending: str) -> None:
    file = next((folder / part).glob("*.safetensors"))
    file.rename(file.with_name(file.name.removesuffix(".safetensors") + ending))


BROKEN = {
    "no text encoder": ("sd15", lambda f: shutil.rmtree(f / "text_encoder"), "no folder text_encoder, which its model_index.json names"),
    "a null text encoder": ("sd15", lambda f: (edited(f / "model_index.json", text_encoder=[None, None]), shutil.rmtree(f / "text_encoder")), "has no text_encoder"),
    "no tokenizer": ("sd15", lambda f: shutil.rmtree(f / "tokenizer"), "no folder tokenizer"),
    "text encoder in half precision only": ("sd15", lambda f: renamed(f, "text_encoder", ".fp16.safetensors"), "half precision only"),
    "text encoder pickled": ("sd15", lambda f: renamed(f, "text_encoder", ".bin"), "a pickle, which is not read"),
    "no autoencoder": ("sd15", lambda f: shutil.rmtree(f / "vae"), "has no vae/config.json"),
    "autoencoder pickled": ("sd15", lambda f: renamed(f, "vae", ".bin"), "only diffusion_pytorch_model.bin"),
    "no network": ("sd15", lambda f: shutil.rmtree(f / "unet"), "without a unet or transformer folder"),
    "no weights": ("sd15", lambda f: next((f / "unet").glob("*.safetensors")).unlink(), "folder without weights"),
    "weights of another network": ("sd15", lambda f: save_file({"a": torch.zeros(1)}, f / "unet/diffusion_pytorch_model.safetensors"), "does not fit its own config: it lacks"),
    "a network of another class": ("sd15", lambda f: edited(f / "unet/config.json", _class_name="Kandinsky3UNet"), "has a UNet2DConditionModel"),
    "no scheduler": ("sd15", lambda f: shutil.rmtree(f / "scheduler"), "holds no scheduler_config.json"),
    "another scheduler": ("sd15", lambda f: edited(f / "scheduler/scheduler_config.json", _class_name="LCMScheduler"), "scheduler LCMScheduler, which mmgen cannot express"),
    "zero terminal SNR with eps": ("sd21_zero_snr", lambda f: edited(f / "scheduler/scheduler_config.json", prediction_type="epsilon"), "the noise says nothing of the image"),
    "another pipeline": ("sd15", lambda f: edited(f / "model_index.json", _class_name="KandinskyPipeline"), "KandinskyPipeline.* of diffusers"),
    "an LCM": ("sd15", lambda f: edited(f / "unet/config.json", time_cond_proj_dim=256), "told its guidance .time_cond_proj_dim.: it is a distilled model"),
    "Flux": ("sd3", lambda f: edited(f / "model_index.json", _class_name="FluxPipeline"), "a Flux model, whose guidance was distilled into its network"),
    "a sprint": ("sana", lambda f: edited(f / "transformer/config.json", guidance_embeds=True), "guidance_embeds.*a distilled model"),
    "no sample_size": ("sd15", lambda f: edited(f / "unet/config.json", sample_size="LEFT OUT"), "sample_size = None"),
    "many layers": ("sd3", lambda f: edited(f / "transformer/config.json", num_layers=10**9), "impossible numbers of layers"),
    "settings that are none": ("sd15", lambda f: edited(f / "unet/config.json", cross_attention_dim=[8, 8]), "cross_attention_dim"),
    "more than text": ("sd15", lambda f: edited(f / "unet/config.json", class_embed_type="timestep"), "class_embed_type = 'timestep'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_not_whole_is_one_sentence(whole, tmp_path, name):
    kind, change, sentence = BROKEN[name]
    folder = tmp_path / "p"
    shutil.copytree(whole[kind], folder)
    change(folder)
    with pytest.raises(MmgenError, match=sentence) as caught:
        mmgen.load(folder)
    assert str(caught.value).count("\n") == 0


def test_the_network_alone(whole):
    with pytest.raises(MmgenError, match="the UNet2DConditionModel of a pipeline alone: give the folder of the whole pipeline"):
        mmgen.load(whole["sd15"] / "unet")


def test_weights_in_half_precision_or_pickled_are_read_safely(whole, tmp_path):
    """Of the network only: they are the same numbers."""
    for ending in (".fp16.safetensors", ".bin"):
        folder = tmp_path / ending
        shutil.copytree(whole["sd15"], folder)
        file = folder / "unet/diffusion_pytorch_model.safetensors"
        state = load_file(file)
        file.unlink()
        if ending == ".bin":
            torch.save(state, file.with_suffix(".bin"))
        else:
            save_file({key: value.half() for key, value in state.items()}, file.with_suffix(ending))
        model = mmgen.load(folder)
        for key, value in model.network.model.state_dict().items():
            torch.testing.assert_close(value, state[key], rtol=0, atol=0 if ending == ".bin" else 1e-3)


def test_a_student_asked_for_guidance(whole):
    training = {"distilled": {"guidance": 2.0}, "config": {"data": {"caption_dropout": 0.0}}}
    config = replace(mmgen.load(whole["sd15"]).config, training=training)
    with pytest.raises(MmgenError, match="guidance 3 is not for this student, .* its teacher's, 2, is built in; leave guidance at 1"):
        choose_guidance(config, SampleSettings(prompts=("a",), guidance=3.0))
    assert choose_guidance(config, SampleSettings(prompts=("a",), guidance=1.0))[0] == 1


def test_inspect_loads_no_encoder(whole, tmp_path, monkeypatch):
    monkeypatch.setattr("mmgen.encoders.pipeline_text.pipeline_encoder", None)
    rows = describe(read(whole["sd3"]))
    assert rows["family"] == "text-to-image pipeline of diffusers" and "left out" in rows
    assert "write it as a folder of diffusers: mmgen convert --to diffusers" in rows["mmgen can"]
    assert any("shifted (by 3)" in line for line in rows["sampling"])


def test_the_command_line(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    single = str(tmp_path / "own.safetensors")
    for command in (
        ["inspect", str(whole["sd15"])],
        ["sample", str(whole["sd15"]), "--prompt", "a fox", "--num", "2", "--steps", "2", "--out", "a.npz"],
        ["convert", str(whole["sd15"]), single],
        ["sample", single, "--prompt", "a fox", "--num", "2", "--steps", "2", "--out", "b.npz"],
        ["convert", single, str(tmp_path / "back.pt"), "--to", "pt"],
    ):
        result = runner.invoke(app, command, catch_exceptions=False)
        assert result.exit_code == 0, result.output
    import numpy as np

    assert np.array_equal(np.load("a.npz")["arr_0"], np.load("b.npz")["arr_0"])
    back, state = torch.load(tmp_path / "back.pt", weights_only=True), load_file(whole["sd15"] / "unet/diffusion_pytorch_model.safetensors")
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in back)


def test_a_hub_id(whole, tmp_path, monkeypatch):
    """From the hub's cache, without a network: the model file names the repository, whatever the machine."""
    revision, cache = "0123456789abcdef0123456789abcdef01234567", tmp_path / "hub/models--user--tiny-sd"
    shutil.copytree(whole["sd15"], cache / "snapshots" / revision)
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = mmgen.load("user/tiny-sd")
    assert model.config.text.encoder == model.config.latents.vae == "user/tiny-sd"
    found = model.sample(2, prompts=["a fox"], steps=2).images
    assert torch.equal(found, mmgen.load(whole["sd15"]).sample(2, prompts=["a fox"], steps=2).images)
    mmgen.convert("user/tiny-sd", tmp_path / "own.safetensors")
    mmgen.convert(tmp_path / "own.safetensors", tmp_path / "out", to="diffusers")
    assert (tmp_path / "out/text_encoder/model.safetensors").is_file() and (tmp_path / "out/README.md").is_file()


def test_a_repository_in_the_hubs_cache_is_called_by_its_name(tmp_path):
    place = tmp_path / "hub/models--user--tiny-sd/snapshots/0123abcd"
    assert source_of(place) == "user/tiny-sd"
    assert source_of(tmp_path / "x") == str(tmp_path / "x")
