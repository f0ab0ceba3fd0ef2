"""The training loop with a method of two networks that take turns (`toy_task`)."""

from __future__ import annotations

import json
import math
from pathlib import Path

import forks
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file
from toy_task import SETTINGS, Quiet, ToyConfig, model_config, run_toy, toy_task

from mmgen.config import sections as configs
from mmgen import data
from mmgen.config.sections import OptimizerSettings
from mmgen.errors import ConfigError, TrainingError
from mmgen.models.files import load_model, read_config
from mmgen.system.random import keys, uniform
from mmgen.training import loop
from mmgen.training.batches import data_indices, share_batch
from mmgen.training.cost import ALTERNATING, DENOISING, IMM, INSTANT, estimate
from mmgen.training.evaluation import curves
from mmgen.training.optim import learning_rate


def again(*arguments, **options):
    AcceleratorState._reset_state(reset_partial_state=True)
    return run_toy(*arguments, **options)


def state(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{file.stem}.{k}": v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("image", [80, 96, 128])
def test_killed_and_resumed_is_the_same_bit_for_bit(tmp_path, monkeypatch, image):
    """Killed in the step of either part; checkpoints are at steps 3, 6, 9, before turns of both."""
    run_toy(tmp_path / "whole")
    original = loop.fetch

    def killed(dataset, first, *rest):
        if first == image:
            raise KeyboardInterrupt
        return original(dataset, first, *rest)

    monkeypatch.setattr(loop, "fetch", killed)
    with pytest.raises(KeyboardInterrupt):
        again(tmp_path / "parts")
    monkeypatch.undo()
    reporter = Quiet()
    again(tmp_path / "parts", reporter)
    assert any("resuming from" in note for note in reporter.notes)
    whole, parts = (state(tmp_path / name / "checkpoints/000000000160") for name in ("whole", "parts"))
    kinds = {key.split(".")[0] for key in whole}
    assert kinds == {"network", "optimizer", "auxiliary", "optimizer-auxiliary"}
    assert whole.keys() == parts.keys() and all(torch.equal(parts[key], value) for key, value in whole.items())
    times = {"seconds", "images_per_second", "flops_per_second", "threads"}
    logs = [[{k: v for k, v in line.items() if k not in times} for line in log_of(tmp_path / n)] for n in ("whole", "parts")]
    assert logs[0] == logs[1] and len(logs[0]) == 7  # every two steps, and at checkpoints between


def test_each_step_updates_the_part_whose_turn_it_is(tmp_path):
    run_toy(tmp_path / "run", **{"run.checkpoint_every": 16, "run.keep_checkpoints": 99})
    folders = sorted((tmp_path / "run/checkpoints").iterdir())
    assert len(folders) == 10
    states = [state(folder) for folder in folders]
    for step in range(1, 10):  # folder i is after step i, which was number i
        old, new = states[step - 1], states[step]
        changed = {key.split(".")[0] for key in new if key not in old or not torch.equal(new[key], old[key])}
        assert changed == ({"network", "optimizer"} if step % 2 else {"auxiliary", "optimizer-auxiliary"})


def test_without_averages_the_model_has_the_weights(tmp_path):
    run_toy(tmp_path / "run")
    weights = load_file(tmp_path / "run/checkpoints/000000000160/network.safetensors")
    saved = load_file(tmp_path / "run/model.safetensors")
    assert saved.keys() == weights.keys() and all(torch.equal(saved[key], weights[key]) for key in saved)
    training = read_config(tmp_path / "run/model.safetensors").training
    assert training["ema"] is None and training["images"] == 160
    assert not list((tmp_path / "run").glob("model-ema-*")) and load_model(tmp_path / "run/model.safetensors")


def test_the_first_part_is_averaged_at_every_step(tmp_path):
    """A half-life in images is one in images, whosever turn it is."""
    changes = {"train.ema_half_lives": [32], "train.ema_rampup": 0, "run.checkpoint_every": 16, "run.keep_checkpoints": 99}
    run_toy(tmp_path / "run", **changes)
    key, average = "in_conv.weight", None
    folders = sorted((tmp_path / "run/checkpoints").iterdir())
    live = [load_file(folder / "network.safetensors") for folder in folders]
    key = next(iter(live[0]))
    average = live[0][key].double()  # step 0 is the auxiliary's: the student is as it was
    for weights in live[1:]:
        average = 0.5**0.5 * average + (1 - 0.5**0.5) * weights[key].double()
    found = load_file(tmp_path / "run/model.safetensors")[key].double()
    torch.testing.assert_close(found, average, rtol=1e-6, atol=1e-7)
    assert not torch.equal(found, live[-1][key].double())


def test_numbers_are_means_over_the_images_of_all_steps(tmp_path):
    run_toy(tmp_path / "run", **{"run.log_every": 4, "train.max_images": 64, "run.checkpoint_every": 10**9})
    (line,) = log_of(tmp_path / "run")
    assert {"student_loss", "auxiliary_loss", "learning_rate", "brightness", "numbers"} <= line.keys() and "loss" not in line
    digits = data.load("digits")
    index = np.r_[16:32, 48:64]  # the student's turns
    x = digits.images[data_indices(len(digits), 0, 64, 0)[index]] / 127.5 - 1
    assert line["brightness"] == pytest.approx(x.mean(), rel=1e-5)
    level = (3 * uniform(keys(0, torch.as_tensor(index), 2)).numpy()).astype(int)
    assert line["numbers"] == [*(pytest.approx(index[level == i].mean()) for i in range(3)), None]
    assert min(curves([line, {**line, "student_loss": -1.0, "images": 99}]).size) > 100


def test_a_bad_loss_names_its_part(tmp_path):
    def broken(accelerator):
        task = toy_task(accelerator)
        objective = task.trained["auxiliary"].objective
        forward, calls = objective.forward, []

        def nan_at_the_third_turn(batch):
            calls.append(batch)
            loss, numbers = forward(batch)
            return (loss * math.nan if len(calls) > 4 else loss), numbers  # two rounds a turn

        objective.forward = nan_at_the_third_turn
        return task

    with pytest.raises(TrainingError, match=r"10 steps in a row were left out: at step 23 the loss of auxiliary is nan"):
        run_toy(tmp_path / "run", make=broken, **{"train.max_images": 480})


def test_prepare_walks_over_the_batches_of_its_step(tmp_path):
    tasks = []
    run_toy(tmp_path / "run", make=lambda accelerator: tasks.append(toy_task(accelerator)) or tasks[0])
    digits = data.load("digits")
    rows = data_indices(len(digits), 0, 160, 0).reshape(10, 16)[1::2]  # of the student's steps
    sums = [float(digits.images[batch].astype(float).sum()) for batch in rows]
    assert tasks[0].seen == [total for total in sums for _ in range(2)]


def test_finish_and_picture_are_the_methods_own(tmp_path):
    finished = []

    def make(accelerator):
        task = toy_task(accelerator)

        def finish(model, folder, scorer):
            finished.append((model.config.denoiser is not None, folder, scorer))
            return {"teacher": {"8": 1.5}}

        task.finish, task.picture = finish, lambda model, seed, scores: Image.new("RGB", (30 + seed, 20), "red")
        return task

    outcome = run_toy(tmp_path / "run", make=make, **{"run.preview_every": 64})
    assert outcome.results["teacher"] == {"8": 1.5}
    assert json.loads((tmp_path / "run/results.json").read_text())["teacher"] == {"8": 1.5}
    assert finished == [(True, tmp_path / "run", None)]
    assert Image.open(tmp_path / "run/samples.png").size == (30, 20)
    assert len(list((tmp_path / "run/previews").iterdir())) == 2
    again(tmp_path / "run", make=make, **{"run.preview_every": 64})
    assert len(finished) == 1  # nothing was trained since


def test_a_run_of_another_command_is_refused(tmp_path):
    run_toy(tmp_path / "run")
    record = json.loads((tmp_path / "run/config.json").read_text())
    (tmp_path / "run/config.json").write_text(json.dumps(record | {"command": "train-imm"}))
    with pytest.raises(TrainingError, match="a run of `mmgen train-imm`, not of `mmgen toy`"):
        again(tmp_path / "run")


def test_the_learning_rate_falls_to_zero():
    settings = OptimizerSettings(lr=1.0, warmup_images=100, decay="linear")
    rates = [learning_rate(settings, images, 1100) for images in range(0, 1101, 50)]
    assert rates[0] == pytest.approx(1 / 101) and rates[1] == pytest.approx(51 / 101)
    assert rates[2:] == pytest.approx(np.linspace(1, 0, 21))
    assert learning_rate(settings, 2000, 1100) == 0
    assert [learning_rate(settings, images, 80) for images in (0, 79, 100)] == pytest.approx([1 / 101, 80 / 101, 0])


def test_defaults_of_a_config_are_its_own():
    config = configs.build(ToyConfig, {"optimizer": {"lr": 3}}, {"data": {"split": "test"}})
    assert (config.optimizer.name, config.optimizer.lr) == ("adamw", 3.0)
    assert (config.data.conditional, config.data.split) == (True, "test")
    with pytest.raises(ConfigError, match="unknown setting 'network.kind'"):
        configs.nest({"network.kind": "dit"}, ToyConfig)


def test_presets_belong_to_a_command(tmp_path):
    assert {"digits-imm", "cifar10-imm"} <= set(configs.preset_names("train-imm"))
    assert all(name.split("-")[1] in ("teacher", "text", "flow") for name in configs.preset_names("train-teacher"))
    with pytest.raises(ConfigError, match="the preset digits-imm is for `mmgen train-imm`, not for `mmgen train-teacher`"):
        configs.read_preset("digits-imm", "train-teacher")
    with pytest.raises(ConfigError, match="unknown preset 'digit-imm': did you mean 'digits-imm'"):
        configs.read_preset("digit-imm", "train-imm")
    (tmp_path / "own.toml").write_text('command = "train-imm"\n[loss]\nk = 3\n')
    assert configs.read_toml(tmp_path / "own.toml", "train-imm") == {"loss": {"k": 3}}
    with pytest.raises(ConfigError, match="own.toml is for `mmgen train-imm`"):
        configs.read_toml(tmp_path / "own.toml", "distill")


def test_costs_of_the_methods():
    """In forward passes per image, a backward pass being two: alternating 5; instant 9 for two images; a diffusion step 3."""
    train = configs.build(ToyConfig, configs.nest(SETTINGS, ToyConfig)).train
    parts = share_batch(16, 1, 1, 8)
    costs = {work: estimate(train, model_config(), parts, work) for work in (DENOISING, IMM, ALTERNATING, INSTANT)}
    unit = costs[DENOISING].flops_per_step / 3
    assert unit == pytest.approx(2 * costs[DENOISING].macs_per_image * 16, rel=1e-6)
    assert [cost.flops_per_step / unit for cost in costs.values()] == pytest.approx([3, 4, 5, 4.5])
    size = 4 * costs[IMM].parameters
    assert [(cost.weights / size, cost.optimizer / size) for cost in costs.values()] == [(2, 2), (2, 2), (4, 4), (5, 2)]  # one gradient at a time
    without = estimate(train, model_config(), parts, ALTERNATING, moments=1)
    assert (without.weights / size, without.optimizer / size) == (4, 2)
    two = share_batch(16, 1, 2, 8)  # DistributedDataParallel keeps a copy of every gradient
    assert estimate(train, model_config(), two, ALTERNATING).weights / size == 6
    assert estimate(train, model_config(), two, ALTERNATING, sharded=True).weights / size == 2
    assert all(cost.averages == 0 for cost in costs.values())


def test_groups_stay_together():
    assert share_batch(24, 2, 1, 9).size == 8 and share_batch(27, 1, 1, 9).size == 9
    with pytest.raises(ConfigError, match="16 cannot be shared by 3 devices: choose a multiple of 3"):
        share_batch(16, 1, 3, 8)
    with pytest.raises(ConfigError, match="in groups of 4: choose a multiple of 8"):
        share_batch(12, 4, 2, 8)


@pytest.mark.slow
def test_two_processes_train_what_one_trains(tmp_path):
    found = []
    for name, launcher in (("one", ()), ("two", forks.TWO)):
        result = forks.run(*launcher, forks.ROOT / "tests/toy_task.py", tmp_path / name, timeout=300)
        assert result.returncode == 0, result.stderr
        said = "".join(result.stdout.split())  # two may write into one line
        assert said == str(len(found) + 1) * (len(found) + 1)  # each process says how many they are
        found.append((state(tmp_path / name / "checkpoints/000000000160"), log_of(tmp_path / name)))
    (one, one_log), (two, two_log) = found
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert (two[key] - value).norm() <= 1e-4 * value.norm() + 1e-7, key
    for ours, theirs in zip(two_log, one_log, strict=True):
        for name in {"student_loss", "auxiliary_loss", "brightness"} & theirs.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4)
        assert ours.get("numbers") == theirs.get("numbers") and ours.keys() == theirs.keys()
