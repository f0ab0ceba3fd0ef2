"""--init: a training that begins with given weights, which its config names by hash."""

import json
from dataclasses import replace

import original_files
import pytest
import torch
from accelerate.state import AcceleratorState
from golden import state
from hostile import refused
from safetensors.torch import load_file
from test_training import Quiet, tiny
from tiny_model import make_model

from mmgen.diffusion.flow_map import FlowMapSettings
from mmgen.errors import ConfigError, ModelError, TrainingError
from mmgen.methods import IMM
from mmgen.methods.run import train as train_method
from mmgen.models.config import ModelConfig
from mmgen.models.files import read_config, save_model
from mmgen.models.flow_model import FlowModel
from mmgen.networks import ADMSettings, DiTSettings, UNetSettings
from mmgen.system.files import sha256_of
from mmgen.training.initial import begin_with, check_initial, read_initial
from mmgen.training.task import Task, TrainedNetwork


def train(folder, **changes) -> Quiet:
    AcceleratorState._reset_state(reset_partial_state=True)
    reporter = Quiet()
    train_method(IMM, tiny(**{"run.eval_num": 0, "train.max_images": 32, "run.checkpoint_every": 16, **changes}), folder, reporter, device="cpu")
    return reporter


@pytest.mark.slow
def test_a_run_begins_with_the_weights_and_says_so(tmp_path):
    train(tmp_path / "first")
    given = tmp_path / "first/model.safetensors"
    still = {"optimizer.lr": 1e-30, "optimizer.warmup_images": 0, "train.seed": 5, "train.init": str(given), "network.dropout": 0.0}
    reporter = train(tmp_path / "second", **still)
    found = load_file(tmp_path / "second/checkpoints/000000000016/network.safetensors")
    assert all(torch.equal(value, found[key]) for key, value in load_file(given).items())
    recorded = json.loads((tmp_path / "second/config.json").read_text())["config"]["train"]
    assert recorded["init"] == str(given) and recorded["init_sha256"] == sha256_of(given)
    assert any("begins with the weights of" in note for note in reporter.notes)
    # a run folder is its model; the same content under another name goes on, another content does not
    still |= {"train.init": str(tmp_path / "first"), "train.max_images": 48}
    assert any("resuming" in note for note in train(tmp_path / "second", **still).notes)
    train(tmp_path / "third", **{"train.seed": 9})
    with pytest.raises(TrainingError, match="train.init_sha256"):
        train(tmp_path / "second", **{**still, "train.init": str(tmp_path / "third")})


@pytest.mark.parametrize("change, words", [
    ({"network.model_channels": 16}, "network.model_channels is 16 here and 8 there"),
    ({"data.conditional": False}, "num_classes is 0 here and 10 there"),
])  # fmt: skip
def test_another_network_is_named(change, words, tmp_path):
    train(tmp_path / "first", **{"train.max_images": 16})
    with pytest.raises(ConfigError, match=f"--init .*first: its network is another one: {words}"):
        train(tmp_path / "second", **{"train.init": str(tmp_path / "first"), **change})


def test_a_foreign_file_that_needs_an_option_is_converted_first(tmp_path):
    path = original_files.write_pt(tmp_path / "in.pt", state("dit_learn_sigma"), wrap="ema", namespace={"num_heads": 4})
    with pytest.raises(ConfigError, match="say so to `mmgen convert`, and give what that writes as --init"):
        train(tmp_path / "run", **{"train.init": str(path)})


def test_a_model_that_is_not_there_is_told_before_data_are_read(tmp_path):
    with pytest.raises(ModelError, match="there is no file or folder .*none.safetensors"):
        train(tmp_path / "run", **{"train.init": str(tmp_path / "none.safetensors"), "data.name": "nowhere"})


def test_a_dry_run_looks_at_it_too(tmp_path):
    given = make_model(tmp_path / "model.safetensors", channels=1, num_classes=10)
    for init, status, words in ((given, 2, "its network is another one"), (tmp_path / "none.safetensors", 4, "there is no file or folder")):
        assert words in refused("train-imm", "--preset", "digits-imm", "--init", init, "--dry-run", "--device", "cpu", status=status)


SIZES = {
    "unet": (UNetSettings(model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,)), {"attn_resolutions": (8,)}),
    "residual": (UNetSettings(model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), encoder="residual"), {"attn_resolutions": (8,)}),
    "adm": (ADMSettings(model_channels=16, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), channels_per_head=16), {"attn_resolutions": (8,)}),
    "dit": (DiTSettings(hidden_size=16, depth=1, num_heads=2), {}),
}


@pytest.mark.parametrize("kind", SIZES)
def test_weights_go_to_the_same_places_of_a_network_for_larger_images(kind, tmp_path):
    """Both networks are built in the same order, whatever their blocks are called."""
    network, larger = SIZES[kind]
    flow = FlowMapSettings(t_min=0.006, t_max=0.994)
    small, large = (ModelConfig(network=one, flow=flow, resolution=side, channels=1) for one, side in ((network, 8), (replace(network, **larger), 16)))
    torch.manual_seed(0)
    given = FlowModel(small).network
    save_model(tmp_path / "small.safetensors", small, given.state_dict())
    task = begin_with(Task({"model": TrainedNetwork(FlowModel(large).network, None)}, large), read_initial(str(tmp_path / "small.safetensors")))
    ours = list(task.trained["model"].network.parameters())
    assert len(ours) > 20 and all(torch.equal(a, b) for a, b in zip(given.parameters(), ours, strict=True))
    if kind != "dit":
        with pytest.raises(ConfigError, match=r"network.attn_resolutions is \(4, ?\) here and, at 16 pixels, \(8, ?\) there"):
            check_initial(read_initial(str(tmp_path / "small.safetensors")), replace(large, network=network))


def test_a_run_goes_on_at_a_higher_resolution(tmp_path):
    small = make_model(tmp_path / "small.safetensors", channels=1, num_classes=10)
    network = {"network.channel_mult": [1, 2], "network.attn_resolutions": [8], "data.resolution": 16}
    reporter = train(tmp_path / "large", **network, **{"train.init": str(small), "train.max_images": 16})
    assert any("begins with the weights of" in note and "8 x 8" in note for note in reporter.notes)
    assert read_config(tmp_path / "large/model.safetensors").resolution == 16
