"""Neon: a model led away from what training on its own samples does."""

import inspect
import json
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file
from tiny_model import changed, make_denoiser
from typer.testing import CliRunner

import mmgen
from mmgen.cli import app
from mmgen.cli.neon import neon as command
from mmgen.diffusion.preconditioning import DenoiserSettings
from mmgen.errors import ConfigError
from mmgen.methods.neon import NeonSettings, extrapolated
from mmgen.models.files import read_config


def run(*arguments) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    return result.exit_code, result.output + str(result.exception or "")


def test_extrapolation_is_linear_and_keeps_types():
    base = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0], dtype=torch.bfloat16), "count": torch.tensor([7])}
    tuned = {"a": torch.tensor([2.0, 0.0]), "b": torch.tensor([4.0], dtype=torch.bfloat16), "count": torch.tensor([9])}
    found = extrapolated(base, tuned, 0.5)
    assert found["a"].tolist() == [0.5, 3.0] and found["b"].dtype == torch.bfloat16 and found["b"].item() == 2.5
    assert found["count"].item() == 7
    assert all(torch.equal(extrapolated(base, tuned, 0.0)[k], base[k]) for k in base)
    with pytest.raises(ConfigError, match="not the same tensors"):
        extrapolated(base, {"a": base["a"]}, 1.0)


def test_extrapolation_undoes_a_lean_that_grows_by_itself():
    """A model theta* + e whose training on its own samples goes to theta* + 1.5 e: w = 2 leads back to theta*."""
    truth, error = torch.randn(50, dtype=torch.float64), torch.randn(50, dtype=torch.float64)
    found = extrapolated({"w": truth + error}, {"w": truth + 1.5 * error}, 2.0)["w"]
    assert torch.allclose(found, truth, rtol=0, atol=1e-12)


def test_a_run_is_sampled_tuned_and_extrapolated_and_another_weight_trains_nothing(tmp_path):
    status, shown = run("train-imm", "--out", tmp_path / "run", "--max-images", 128, "--set", "run.eval_num=0")
    assert status == 0, shown
    common = ("neon", tmp_path / "run", "--num", 48, "--steps", 1, "--images", 256, "--lr", 1e-3)
    status, shown = run(*common, "--weight", 0)
    assert status == 0, shown
    folder = tmp_path / "run/neon"
    base, tuned = load_file(tmp_path / "run/model.safetensors"), load_file(folder / "tuned/model.safetensors")
    assert all(torch.equal(value, base[key]) for key, value in load_file(folder / "model-0.safetensors").items())
    assert any(not torch.equal(value, base[key]) for key, value in tuned.items())
    assert len(list((folder / "samples").glob("*.png"))) == 48
    then = (folder / "tuned/model.safetensors").stat().st_mtime_ns
    status, shown = run(*common, "--weight", 1.5)
    assert status == 0 and str(folder / "model-1.5.safetensors") in shown, shown
    assert (folder / "tuned/model.safetensors").stat().st_mtime_ns == then
    for key, value in load_file(folder / "model-1.5.safetensors").items():
        assert torch.equal(value, (2.5 * base[key].double() - 1.5 * tuned[key].double()).float())
    for option, other in (("--num", 96), ("--num", 16), ("--steps", 2), ("--lr", 1e-4), ("--images", 128)):  # of what is there, none may be told in the model
        status, shown = run(*common, "--weight", 2, option, other)
        assert status != 0 and f"was made with {option} " in shown and "another --out" in shown and "overwrite" not in shown, shown
    assert not (folder / "model-2.safetensors").exists() and len(list((folder / "samples").glob("*.png"))) == 48
    made = read_config(folder / "model-1.5.safetensors").training["neon"]
    assert made["weight"] == 1.5 and made["images"] == 256 and made["num"] == 48
    file = mmgen.neon(tmp_path / "run", weight=1.5, num=48, steps=1, images=256, lr=1e-3, progress=False)
    assert file == folder / "model-1.5.safetensors" and read_config(file).training["neon"] == made
    changed(tmp_path / "run/model.safetensors")
    status, shown = run(*common)
    assert status != 0 and "was made of other weights" in shown, shown


@pytest.mark.parametrize("options, sentence", [
    (["--num", 0], "--num must be positive"),
    (["--lr", -1], "--lr must be positive"),
    (["--out", "better.safetensors"], "--out is a folder"),
])  # fmt: skip
def test_bad_options_are_one_sentence(options, sentence, digits_model):
    status, shown = run("neon", digits_model, *options)
    assert status != 0 and sentence in shown


def test_other_models_are_refused(tmp_path):
    status, shown = run("neon", tmp_path / "none")
    assert status != 0 and "there is no" in shown
    status, shown = run("neon", make_denoiser(tmp_path / "teacher.safetensors", channels=1))
    assert status != 0 and "was not trained by mmgen" in shown


def test_the_command_has_the_defaults_of_its_settings():
    defaults = {name: each.default for name, each in inspect.signature(command).parameters.items()}
    assert {name: defaults[name] for name in asdict(NeonSettings())} == asdict(NeonSettings())


FEW = ("--max-images", 128, "--set", "run.eval_num=0")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["train-imm", "train-teacher"])
def test_a_model_trained_with_augmentation_goes_on_with_it(method, tmp_path):
    status, shown = run(method, "--out", tmp_path / "run", *FEW, "--set", "data.augment=0.12")
    assert status == 0, shown
    status, shown = run("neon", tmp_path / "run", "--num", 16, "--steps", 1, "--images", 128, "--lr", 1e-3, "--weight", 0.5)
    assert status == 0, shown
    base, made = (load_file(tmp_path / "run" / file) for file in ("model.safetensors", "neon/model-0.5.safetensors"))
    assert base.keys() == made.keys() and any("augment" in key for key in base)
    assert json.loads((tmp_path / "run/neon/tuned/config.json").read_text())["config"]["data"]["augment"] == 0.12


@pytest.mark.slow
def test_a_student_learns_as_a_denoiser_from_its_samples(tmp_path):
    status, shown = run("train-teacher", "--out", tmp_path / "teacher", *FEW, "--set", "train.ema_betas=[0.99]")
    assert status == 0, shown
    status, shown = run("distill", "--teacher", tmp_path / "teacher", "--steps", 2, "--preset", "digits-distill", "--out", tmp_path / "run", *FEW,
                        "--set", "run.teacher_steps=0", "--set", "loss.weighting=min_snr")  # fmt: skip
    assert status == 0, shown
    status, shown = run("neon", tmp_path / "run", "--num", 16, "--images", 128, "--lr", 1e-3, "--weight", 0.2)
    assert status == 0, shown
    folder = tmp_path / "run/neon"
    base, tuned, made = (load_file(tmp_path / "run" / file) for file in ("model.safetensors", "neon/tuned/model.safetensors", "neon/model-0.2.safetensors"))
    assert all(torch.equal(value, (1.2 * base[key].double() - 0.2 * tuned[key].double()).float()) for key, value in made.items())
    assert any(not torch.equal(value, base[key]) for key, value in tuned.items())
    found, before = read_config(folder / "model-0.2.safetensors"), read_config(tmp_path / "run/model.safetensors")
    assert (found.sampling, found.denoiser, found.training["distilled"]) == (before.sampling, before.denoiser, before.training["distilled"])
    assert found.training["neon"]["steps"] == 2 and found.training["neon"]["method"] == "train-teacher"
    settings = json.loads((folder / "tuned/config.json").read_text())["config"]
    assert settings["loss"]["weighting"] == "min_snr" and settings["optimizer"]["lr"] == 1e-3 and settings["data"]["label_dropout"] == 0.0


@pytest.mark.parametrize("field", ["noise_channels", "noise_dropout", "told_guidance"])
def test_a_student_with_noise_of_its_own_is_refused(field, tmp_path):
    own = {"distilled": {}, "config": {"student": {"steps": 2}}}
    path = make_denoiser(tmp_path / "student.safetensors", DenoiserSettings(**{field: 1 if field == "noise_channels" else True}), channels=1, training=own)
    status, shown = run("neon", path)
    assert status != 0 and "neon does not improve those" in shown and not (tmp_path / "neon").exists()


@pytest.mark.slow
def test_a_model_of_texts_is_tuned_on_its_samples_with_their_prompts(tmp_path):
    status, shown = run("train-imm", "--preset", "digits-text-imm", "--out", tmp_path / "run", "--max-images", 128, "--set", "run.eval_num=0")
    assert status == 0, shown
    status, shown = run("neon", tmp_path / "run", "--num", 24, "--steps", 1, "--images", 256, "--lr", 1e-3, "--device", "cpu")
    assert status == 0, shown
    tuned = json.loads((tmp_path / "run/neon/tuned/config.json").read_text())["config"]
    assert tuned["data"]["text"] and tuned["data"]["caption_dropout"] == 0.1 and not tuned["data"]["conditional"]
    assert tuned["text"]["width"] == 32 and tuned["data"]["leave_out"] == []
    prompts = [json.loads(line)["text"] for line in (tmp_path / "run/neon/samples/metadata.jsonl").read_text().splitlines()]
    assert len(prompts) == 24 and not {"a bold three", "a thin seven"} & set(prompts)
    assert read_config(tmp_path / "run/neon/model-1.safetensors").text == read_config(tmp_path / "run/model.safetensors").text
