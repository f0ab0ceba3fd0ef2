"""The Python interface: what a notebook calls. Nothing of mmgen beside it is imported by those who use it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

import mmgen
from mmgen.errors import ConfigError
from mmgen.models.files import save_model

SMALL = {
    "network": {"model_channels": 8, "channel_mult": [1]}, "train.batch_size": 16, "train.max_images": 32, "train.precision": "fp32",
    "run.eval_num": 0, "run.log_every": 1, "optimizer.decay": "none",
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of each method, and what its callback was told."""
    folder, told = tmp_path_factory.mktemp("runs"), {"imm": [], "teacher": [], "student": []}
    imm = mmgen.train_imm("digits", settings=SMALL, out=folder / "imm", callback=told["imm"].append, progress=False, device="cpu")
    teacher = mmgen.train_teacher(
        settings={**SMALL, "data.name": "digits", "train.precision": "tf32"}, out=folder / "teacher", progress=False, device="cpu",
        callback=told["teacher"].append,
    )  # fmt: skip
    settings = {key: value for key, value in SMALL.items() if key != "network"} | {"loss.method": "instant", "run.teacher_steps": 0}
    student = mmgen.distill(
        folder / "teacher", steps=2, settings=settings, out=folder / "student", callback=told["student"].append, progress=False, device="cpu"
    )
    yield {"imm": imm, "teacher": teacher, "student": student}, told
    AcceleratorState._reset_state(reset_partial_state=True)


def test_importing_it_loads_no_torch():
    code = "import sys, mmgen; help(mmgen.train_imm); assert not {'torch', 'numpy', 'PIL'} & set(sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(mmgen.__file__).parents[1])
    assert result.returncode == 0, result.stderr
    assert {name for name in mmgen.__all__ if not callable(getattr(mmgen, name))} == {"__version__"}


@pytest.mark.parametrize("name", ["imm", "teacher", "student"])
def test_each_method_trains_and_its_model_draws(runs, name):
    run, lines = runs[0][name], runs[1][name]
    assert run.finished and run.images == 32 and run.folder.name == name and run.results["images"] == 32
    assert [line["images"] for line in lines if "loss" in line or "student_loss" in line][-1] == 32
    assert any(line.get("note", "").startswith("data: ") for line in lines)
    stored = json.loads((run.folder / "config.json").read_text())
    assert '"max_images": 32' in json.dumps(stored)
    samples = run.load().sample(3, steps=2)
    assert samples.images.shape == (3, 1, 8, 8) and samples.images.dtype == torch.uint8 and len(samples) == 3


def test_the_command_makes_the_same_run(runs, tmp_path):
    from typer.testing import CliRunner

    from mmgen.cli import app

    AcceleratorState._reset_state(reset_partial_state=True)
    sets = [f"{key}={json.dumps(value)}" for key, value in SMALL.items() if key != "network"]
    sets += ["network.model_channels=8", "network.channel_mult=[1]"]
    arguments = [part for one in sets for part in ("--set", one)]
    result = CliRunner().invoke(app, ["train-imm", *arguments, "--device", "cpu", "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.exception
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run", runs[0]["imm"].folder))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_finished_run_is_found_again(runs):
    again = mmgen.train_imm("digits", settings=SMALL, out=runs[0]["imm"].folder, progress=True, device="cpu")
    assert again.finished and again.results == runs[0]["imm"].results


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mmgen.train_imm("digits", settings={"loss.kk": 1}), "unknown setting 'loss.kk'"),
        (lambda: mmgen.train_imm("digits", settings=["loss.k=1"]), "settings must be a dictionary"),
        (lambda: mmgen.train_imm("digits", preset="digit-imm"), "did you mean 'digits-imm'"),
        (lambda: mmgen.train_imm("digits", device="cuda:1"), "CUDA_VISIBLE_DEVICES=1"),
        (lambda: mmgen.train_imm("digits", max_time="2"), "a number with a unit"),
        (lambda: mmgen.distill(""), "needs a teacher"),
        (lambda: mmgen.fid([]), "samples must be"),
        (lambda: mmgen.fid("x", refs="digits"), "did you mean 'ref'"),
        (lambda: mmgen.convert("a.pkl", "b.safetensors", typ="dit"), "did you mean 'type'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_sentence(call, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as refused:
        call()
    assert message in str(refused.value) and "\n" not in str(refused.value) and not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- model.sample


def loaded(runs, name):
    """The model of a run, moved far from its weights: after two steps they draw grey."""
    model = runs[0][name].load()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.network.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def model(runs):
    return loaded(runs, "imm")


def test_the_forms_of_images(model):
    tensor, pictures, array = (model.sample(4, steps=2, output=output) for output in ("tensor", "pil", "numpy"))
    assert array.images.shape == (4, 8, 8, 1) and array.images.dtype == np.uint8
    assert np.array_equal(array.images[..., 0], tensor.images[:, 0].numpy())
    assert all(isinstance(one, Image.Image) and one.mode == "L" for one in pictures.images)
    assert np.array_equal(np.stack([np.asarray(one) for one in pictures.images]), array.images[..., 0])
    with pytest.raises(ConfigError, match="did you mean 'pil'"):
        model.sample(1, output="pill")


def test_labels_and_names_belong_to_the_images(model):
    drawn = model.sample(5, classes=["3", 7])
    assert drawn.labels.tolist() == [3, 7, 3, 7, 3] and drawn.names == ["3", "7", "3", "7", "3"]
    assert model.sample(2, classes=7).labels.tolist() == [7, 7]
    assert model.sample(2, classes=np.array([1, 2])).labels.tolist() == model.sample(2, classes=torch.tensor([1, 2])).labels.tolist() == [1, 2]
    assert torch.equal(model.sample(1, classes=3).images, drawn.images[:1])


def test_no_images_are_an_answer(model):
    assert model.sample(0).images.shape == (0, 1, 8, 8) and model.sample(0, output="pil").images == []
    assert model.sample(0, output="numpy").images.shape == (0, 8, 8, 1) and len(model.sample(0)) == 0


def test_progress_and_the_callback(model, capsys):
    told = []
    model.sample(6, steps=2, batch_size=4, progress=True, callback=lambda done, of: told.append((done, of)))
    assert told == [(2.0, 6), (4.0, 6), (4, 6), (5.0, 6), (6.0, 6), (6, 6)]
    assert "sampling: 100%" in capsys.readouterr().err


def test_notes_are_told(runs):
    assert "distilled for 2 steps" in runs[0]["student"].load().sample(1, steps=4).notes[0]
    assert runs[0]["student"].load().sample(1).notes == ()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num": "4"}, "the number of images must be a whole number of at least 0, not '4'"),
        ({"num": -1}, "not -1"), ({"num": 2.5}, "not 2.5"), ({"num": True}, "not True"),
        ({"steps": "2"}, "steps must be a whole number, not '2'"), ({"steps": 2.0}, "steps must be a whole number"),
        ({"seed": None}, "seed must be"), ({"guidance": "high"}, "guidance must be a number"), ({"etas": 1.4}, "etas must be a list"),
        ({"classes": 1.5}, "classes must be names or numbers"), ({"classes": None}, "classes must be names or numbers"),
        ({"classes": "eleven"}, "unknown class 'eleven'"), ({"sampler": 3}, "sampler must be a word"),
        ({"prompts": 3}, "prompts must be a text or a list of texts"), ({"prompts": [3]}, "prompts must be a text"),
        ({"step": 2}, "did you mean 'steps'"), ({"precision": "bf15"}, "did you mean 'bf16'"), ({"precision": "fp16"}, "needs a GPU"),
    ],
)  # fmt: skip
def test_wrong_settings_of_sampling(model, settings, message):
    with pytest.raises(ConfigError) as refused:
        model.sample(**{"num": 1, **settings})
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_settings_may_come_from_numpy(model):
    drawn = model.sample(2, steps=np.int64(2), seed=np.int64(1), guidance=np.float32(1.5), etas=[np.float64(1.4)])
    assert torch.equal(drawn.images, model.sample(2, steps=2, seed=1, guidance=1.5).images)


# ---------------------------------------------------------------------- times, conditions, precision


def test_times_may_be_numbers(runs, model):
    x, labels = torch.randn(2, 1, 8, 8, dtype=torch.float64), mmgen.Labels(torch.tensor([3, 4]), 10)
    times = torch.full((2,), 0.5, dtype=torch.float64)
    assert torch.equal(model.f(x, 0.0, 0.5, labels), model.f(x, torch.zeros(2, dtype=torch.float64), times, labels))
    teacher = runs[0]["teacher"].load()
    assert torch.equal(teacher.denoise(x, 0.5, labels), teacher.denoise(x, times, labels))
    for wrong in ("half", [0.1, 0.2, 0.3], None):
        with pytest.raises(ConfigError, match="time"):
            teacher.denoise(x, wrong, labels)
    with pytest.raises(TypeError, match=r"a condition is mmgen.Labels\(classes, num_classes\) or None, not Tensor"):
        model.f(x, 0.0, 0.5, torch.tensor([3, 4]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["imm", "teacher", "student"])
def test_half_precision_models_draw_nearly_the_same(runs, name, dtype, tmp_path):
    """Weights in half precision in the file, which are computed with in full, and a model that was made half."""
    model = loaded(runs, name)
    whole = model.sample(4, steps=2).images.float()
    assert whole.std() > 20
    save_model(tmp_path / "half.safetensors", model.config, {k: v.to(dtype) for k, v in model.network.state_dict().items()})
    from_file, made = mmgen.load(tmp_path / "half.safetensors"), model.to(dtype)
    for half in (from_file, made):
        drawn = half.sample(4, steps=2).images.float()
        assert (drawn - whole).abs().mean() < 0.1 * whole.std() and not torch.equal(drawn, whole)


def test_precision_is_recorded(model, tmp_path, runs):
    before = torch.get_float32_matmul_precision()
    half, whole = model.sample(4, steps=2, precision="bf16"), model.sample(4, steps=2, precision="fp32")
    assert torch.equal(whole.images, model.sample(4, steps=2).images)
    difference = (half.images.float() - whole.images.float()).abs()
    assert 0 < difference.max() and difference.mean() < 4 and torch.get_float32_matmul_precision() == before
    from typer.testing import CliRunner

    from mmgen.cli import app

    command = ["sample", str(runs[0]["imm"].folder), "--num", "4", "--steps", "2", "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert CliRunner().invoke(app, [*command, "--precision", "bf16"]).exit_code == 0
    assert json.loads((tmp_path / "out/samples.json").read_text())["precision"] == "bf16"
    assert "precision would be None, not bf16" in str(CliRunner().invoke(app, command).exception)


@pytest.mark.parametrize(("count", "word", "message"), [
    (0, "cuda:1", "torch finds no GPU"), (1, "cuda:1", "torch finds 1 GPU, numbered from 0"), (2, "gpu", "unknown device"),
])  # fmt: skip
def test_devices_by_number(count, word, message, monkeypatch, runs):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(ConfigError, match=message):
        mmgen.load(runs[0]["imm"].folder, device=word)
    from mmgen.system.devices import find_device

    assert find_device("auto") == ("cuda" if count else "cpu") and (count < 2 or find_device("cuda:1") == "cuda:1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="for one process"):
        find_device("cuda:0")


# ---------------------------------------------------------------------- scores and conversion


def test_scores(runs, tmp_path):
    report = mmgen.fid(runs[0]["imm"].folder, num=16, steps=[1, 2], features="pixels", out=tmp_path / "scores.json", device="cpu")
    assert [row.subject.record["steps"] for row in report.rows] == [1, 2]
    (name,) = report.scores
    assert name.startswith("FD-pixels") and report.scores[name] > 0
    assert len(json.loads((tmp_path / "scores.json").read_text())["scores"]) == 2


def test_the_pipeline_is_of_the_same_model(runs, model):
    picture = mmgen.pipeline(model)(class_labels=[3], num_inference_steps=2, generator=0).images[0]
    assert np.array_equal(np.asarray(picture), model.sample(1, steps=2, classes=[3], output="numpy").images[0, ..., 0])
