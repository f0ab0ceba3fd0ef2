"""A method is one record: its command, its runs and its presets follow from it. A toy method proves it."""

from __future__ import annotations

import json

import pytest
from accelerate.state import AcceleratorState
from toy_task import ToyConfig, model_config, toy_task
from typer.testing import CliRunner

from mmgen.cli import app
from mmgen.cli.help import Command
from mmgen.cli.training import training_command
from mmgen.config import sections
from mmgen.config.sections import build, check_shared, preset_for, preset_names, presets_by_size, read_preset
from mmgen.methods import METHODS
from mmgen.methods.choosing import choose
from mmgen.methods.method import Method, Option, Training
from mmgen.training.cost import Work


def resolve(*tables):
    config = build(ToyConfig, *tables)
    check_shared(config)
    return config


TOY = Method(  # all that a new method is; `METHODS` is the one line elsewhere
    name="train-toy",
    help="Train a toy.\n\nExample: mmgen train-toy",
    training=lambda: Training(
        config=ToyConfig,
        resolve=resolve,
        model_config=lambda config, shape, source: model_config(),
        task=lambda start: toy_task(start.accelerator),
        work=lambda config: (Work(forward=2, backward=1, trained=2), 1),
    ),
    next_commands=("mmgen sample {folder}",),
    options=(Option("warmup", "optimizer.warmup_images", int, "Images of warm-up."),),
    heading="Toys",
    without=("resolution",),
)

SMALL = ["--set", "run.batch_per_device=8", "--eval-num", "0", "--set", "train.ema_betas=[]", "--set", "train.precision=fp32",
         "--batch-size", "16", "--max-images", "48", "--warmup", "32", "--device", "cpu", "--out", "run"]  # fmt: skip


@pytest.fixture
def toys(tmp_path, monkeypatch):
    """A command line with the toy method beside the others."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(METHODS, TOY.name, TOY)
    registered = list(app.registered_commands)
    app.command(TOY.name, cls=Command)(training_command(TOY))
    AcceleratorState._reset_state(reset_partial_state=True)
    yield lambda *arguments: CliRunner().invoke(app, ["train-toy", *arguments])
    app.registered_commands[:] = registered
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_toy_method_trains_from_the_factory(toys, tmp_path):
    result = toys(*SMALL)
    assert result.exit_code == 0, result.exception
    assert "mmgen sample run" in result.stdout and (tmp_path / "run/model.safetensors").is_file()
    stored = json.loads((tmp_path / "run/config.json").read_text())
    assert "train-toy" in json.dumps(stored) and '"warmup_images": 32' in json.dumps(stored)
    assert toys(*SMALL).exit_code == 0  # finished already
    dry = toys(*SMALL, "--dry-run")
    assert dry.exit_code == 0 and "2 trained" in dry.stdout


def test_its_options_are_in_its_help(toys):
    text = toys("--help").stdout
    assert "Toys:\n  --warmup N" in text and "--resolution" not in text and "--max-images" in text


def test_the_methods_differ_in_their_records_only():
    assert list(METHODS) == ["train-imm", "train-teacher", "distill"]
    for name, method in METHODS.items():
        training, names = method.training(), preset_names(name)
        assert names and method.name == name
        for preset in names:
            training.resolve(read_preset(preset, name))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_presets_say_which_data_they_are_for(method):
    kind = method.name.split("-")[-1]
    for word in ("digits", "cifar10", "uoft-cs/cifar10"):
        preset = preset_for(method.name, word)
        assert preset == f"{'cifar10' if 'cifar' in word else word}-{kind}"
        changes = {"data.name": word, **({"teacher.name": "t"} if method.name == "distill" else {})}
        assert choose(method, changes).preset == preset
    assert list(presets_by_size(method.name)) == sorted(presets_by_size(method.name)) and 64 in presets_by_size(method.name)


def test_a_preset_extends_another(monkeypatch):
    base, small = read_preset("imagenet256-imm-b"), read_preset("imagenet256-imm-s")
    assert small["network"] == {**base["network"], "hidden_size": 384, "num_heads": 6}
    assert {**small, "network": base["network"]} == base
    half, large = read_preset("imagenet256-imm-xl-fp16"), read_preset("imagenet256-imm-xl")
    assert half["loss"] == {**large["loss"], "a": 2.0, "min_gap": 1e-4} and half["network"] == large["network"]
    assert presets_by_size("train-imm") == {32: "own32-imm", 64: "own64-imm"}  # a size is not taken over
    assert not {"extends", "for", "size", "command"} & {key for name in preset_names() for key in read_preset(name)}


def test_settings_files_are_no_presets(tmp_path):
    (tmp_path / "a.toml").write_text('extends = "digits-imm"\n')
    with pytest.raises(sections.ConfigError, match="sets 'extends' itself, which is no setting"):
        sections.read_toml(tmp_path / "a.toml")
