"""What may be another when a run goes on: the optimiser, precision, how a path is written. And what may not."""

import json
import shutil

import pytest
from accelerate.state import AcceleratorState
from test_training import Quiet, assert_same, tiny, weights
from tiny_vae import write_images

from mmgen.methods import choosing
from mmgen.errors import TrainingError
from mmgen.training import loop
from mmgen.methods import IMM
from mmgen.methods.run import train as train_method


def train(folder, **changes) -> Quiet:
    reporter = Quiet()
    AcceleratorState._reset_state(reset_partial_state=True)
    train_method(IMM, tiny(**{"run.eval_num": 0, **changes}), folder, reporter, device="cpu")
    return reporter


def test_the_optimiser_and_precision_may_change_and_the_log_says_so(tmp_path, monkeypatch):
    built, build = [], loop.build_optimizer
    monkeypatch.setattr(loop, "build_optimizer", lambda *arguments: built.append(build(*arguments)) or built[-1])
    train(tmp_path / "run", **{"train.max_images": 64})
    changes = {
        "optimizer.name": "adamw", "optimizer.lr": 5e-4, "optimizer.beta2": 0.95, "optimizer.weight_decay": 0.01,
        "optimizer.grad_clip": 1.0, "train.precision": "bf16", "train.ema_rampup": 0.0,
    }  # fmt: skip
    reporter = train(tmp_path / "run", **{"train.max_images": 128, **changes})
    group = built[-1].param_groups[0]  # what steps were made with, and not what the checkpoint had
    assert type(built[-1]).__name__ == "AdamW" and group["fused"]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (5e-4, (0.9, 0.95), 0.01)
    (line,) = [line for line in reporter.lines if "changed" in line]
    assert line["images"] == 64 and line["changed"] == {
        "optimizer.name": ["radam", "adamw"], "optimizer.lr": [1e-3, 5e-4], "optimizer.beta2": [0.999, 0.95],
        "optimizer.weight_decay": [0.0, 0.01], "optimizer.grad_clip": [0.0, 1.0], "train.precision": ["fp32", "bf16"],
        "train.ema_rampup": [0.05, 0.0], "train.max_images": [64, 128],
    }  # fmt: skip
    kept = [json.loads(text) for text in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [entry for entry in kept if "changed" in entry] == [line]
    assert any("changed" in note and "optimizer.lr = 0.0005, was 0.001" in note for note in reporter.notes)
    recorded = json.loads((tmp_path / "run/config.json").read_text())["config"]
    assert recorded["optimizer"]["name"] == "adamw" and recorded["train"]["precision"] == "bf16"
    again = train(tmp_path / "run", **{"train.max_images": 128, **changes})
    assert not any("changed" in line for line in again.lines)


def test_the_number_of_images_may_change_while_the_learning_rate_falls_towards_it(tmp_path):
    train(tmp_path / "run", **{"train.max_images": 64, "optimizer.decay": "linear"})
    reporter = train(tmp_path / "run", **{"train.max_images": 96, "optimizer.decay": "linear"})
    assert {"train.max_images": [64, 96]} in [line.get("changed") for line in reporter.lines]
    with pytest.raises(TrainingError, match="has seen 96 images, more than train.max_images=32: choose another --out"):
        train(tmp_path / "run", **{"train.max_images": 32, "optimizer.decay": "linear"})  # not 96 called 32


@pytest.mark.parametrize("key, value, was", [
    ("network.model_channels", 16, "8"), ("loss.k", 12.0, "15.0"), ("train.seed", 1, "0"), ("train.batch_size", 32, "16"),
    ("train.ema_betas", [0.5], r"\[0.9\]"), ("data.conditional", False, "True"), ("flow.parametrization", "euler_fm", "'simple"),
])  # fmt: skip
def test_what_cannot_change_is_named(key, value, was, tmp_path):
    train(tmp_path / "run", **{"train.max_images": 16})
    with pytest.raises(TrainingError, match=f"holds a run with {key} = {was}"):
        train(tmp_path / "run", **{"train.max_images": 16, key: value})


def test_a_run_of_version_0_1_goes_on(tmp_path):
    """It has neither the new settings nor a checkpoint without the optimiser's."""
    train(tmp_path / "run", **{"train.max_images": 64, "train.ema_rampup": 0.0})
    file = tmp_path / "run/config.json"
    content = json.loads(file.read_text())
    del content["config"]["train"]["ema_rampup"]
    file.write_text(json.dumps(content))
    reporter = train(tmp_path / "run", **{"train.max_images": 96})
    assert any("resuming" in note for note in reporter.notes)
    assert any("train.ema_rampup = 0.05, was None" in note for note in reporter.notes)


def test_a_path_may_be_written_in_another_way(tmp_path, own_cache, monkeypatch):
    """The same pixels and labels are the same data: by a slash, absolutely, from another folder, by a copy elsewhere."""
    write_images(tmp_path / "data/x", per_class=12, side=8)
    (tmp_path / "elsewhere").mkdir()
    words = ["data/x", "data/x/", "./data/../data/x", str(tmp_path / "data/x")]
    for number, word in enumerate([*words, "../data/x", "../copy"], start=1):
        if word == "../data/x":
            monkeypatch.chdir(tmp_path / "elsewhere")
            shutil.copytree(tmp_path / "data/x", tmp_path / "copy")
        reporter = train(tmp_path / "run", **{"data.name": word, "train.max_images": 16 * number})
        assert number == 1 or any("resuming" in note for note in reporter.notes)
    train(tmp_path / "whole", **{"data.name": word, "train.max_images": 96})
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "run"))


def test_the_default_folder_is_the_same_for_every_way_to_write_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/x").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["data/x", "data/x/", "./data//x", str(tmp_path / "data/x"), "~/data/x"]
    names = {choosing.default_name("digits-imm", tiny(**{"data.name": word}), tiny()) for word in words}
    assert len(names) == 1 and names != {choosing.default_name("digits-imm", tiny(**{"data.name": "data/y"}), tiny())}
