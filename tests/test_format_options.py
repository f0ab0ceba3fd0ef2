"""What a checkpoint does not say of itself is said where it is used: to sample, fid and distill, as to convert."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import numpy as np
import original_files
import pytest
from golden import state
from test_convert import run
from tiny_inception import write_inception
from tiny_model import make_denoiser
from tiny_vae import write_vae

import mmgen
from mmgen.cli.convert import convert
from mmgen.cli.fid import fid
from mmgen.cli.sample import sample
from mmgen.config.distill import resolve
from mmgen.errors import ConfigError
from mmgen.methods import DISTILLATION
from mmgen.methods.distill.method import find_teacher
from mmgen.metrics.subjects import is_model

TOLD = ["--type", "dit", "--heads", 4]


@pytest.fixture
def silent(tmp_path, monkeypatch, own_cache):
    """A DiT's bare tensors, which do not tell its family, its heads or whether the last of 11 classes is none."""
    pytest.importorskip("diffusers")
    monkeypatch.setenv("MMGEN_VAE", write_vae(tmp_path / "vae", levels=4))
    return original_files.write_pt(tmp_path / "weights.pt", state("dit_learn_sigma"))


def drawn(path, *options) -> tuple[np.ndarray, str]:
    """The images, and what is recorded to be assumed."""
    run(sample, path, "--num", 2, "--steps", 2, "--out", "a.npz", "--overwrite", *options)
    return np.load("a.npz")["arr_0"], "; ".join(json.loads(Path("a.npz.json").read_text())["notes"])


def test_sampling_a_file_that_needs_to_be_told(silent):
    for options, missing in (((), "--type dit or --type sit"), (("--type", "dit"), "give --heads$")):
        with pytest.raises(ConfigError, match=missing):
            drawn(silent, *options)
    images, notes = drawn(silent, *TOLD)
    assert "assumed: of 11 class embeddings the last is that of no class" in notes
    run(convert, silent, "m.safetensors", *TOLD)
    assert np.array_equal(drawn("m.safetensors")[0], images)
    assert not np.array_equal(drawn(silent, "--type", "dit", "--heads", 2)[0], images)
    assert np.array_equal(mmgen.load(silent, type="dit", heads=4).sample(2, steps=2, output="numpy").images, images)
    _, notes = drawn(silent, *TOLD, "--num-classes", 11, "--guide-all")
    assert "assumed: of 11" not in notes and "guidance acts on" not in notes


def test_samples_of_a_file_that_is_read_otherwise_do_not_join(silent):
    run(sample, silent, "--num", 2, "--steps", 1, "--out", "a.npz", *TOLD)
    run(sample, silent, "--num", 3, "--steps", 1, "--out", "a.npz", *TOLD)
    with pytest.raises(ConfigError, match="its checkpoint was read otherwise .*--heads"):
        run(sample, silent, "--num", 4, "--steps", 1, "--out", "a.npz", "--type", "dit", "--heads", 2)


def test_scoring_a_file_that_needs_to_be_told(silent):
    network = silent.parent / "inception.pt"
    write_inception(network)
    score = ["--num", 20, "--steps", 1, "--inception", network, "--metrics", "is", "--out", "s.json"]
    with pytest.raises(ConfigError, match="give --heads$"):
        run(fid, silent, *score, "--type", "dit")
    run(fid, silent, *score, *TOLD)
    found = mmgen.fid(silent, num=20, steps=1, inception=network, metrics="is", type="dit", heads=4)
    (row,) = json.loads((silent.parent / "s.json").read_text())["scores"]
    assert row["figures"] == pytest.approx(found.scores)


def test_a_teacher_that_needs_to_be_told(silent):
    table = {"teacher": {"name": str(silent)}, "data": {"name": "latents"}}
    for said, missing in (({}, "--teacher-type dit or --teacher-type sit"), ({"type": "dit"}, "give --teacher-heads$")):
        with pytest.raises(ConfigError, match=missing):
            find_teacher(resolve(table, {"teacher": said}))
    teacher, _ = find_teacher(resolve(table, {"teacher": {"type": "dit", "heads": 4, "num_classes": 10}}))
    assert teacher.model.config.network.num_heads == 4 and not any("class embeddings" in note for note in teacher.notes)
    with pytest.raises(ConfigError, match="leave out --teacher-num-classes"):
        find_teacher(resolve({"teacher": {"name": str(make_denoiser(silent.with_name("own.safetensors"), channels=1)), "num_classes": 10}}))


@pytest.mark.parametrize("command", [sample, fid])
@pytest.mark.parametrize("option", [("--type", "dit"), ("--preset", "cm"), ("--heads", 4), ("--num-classes", 3), ("--guide-all",)])
def test_a_model_of_mmgen_needs_none(command, option, tmp_path):
    path = make_denoiser(tmp_path / "m.safetensors", channels=1)
    with pytest.raises(ConfigError, match=f"m.safetensors is a model of mmgen's, which says itself what it is: leave out {option[0]}$"):
        run(command, path, *option, *(["--ref", "digits"] if command is fid else []))


@pytest.mark.parametrize("option", ["--heads", "--num-classes"])
def test_a_number_below_one_is_refused(silent, option):
    with pytest.raises(ConfigError, match=f"{option} must be at least 1, not 0"):
        run(sample, silent, "--type", "dit", option, 0)


def test_every_command_that_reads_such_files_has_the_options():
    wanted = {"type", "preset", "heads", "num_classes"}
    for command in (convert, sample, fid):
        assert wanted <= inspect.signature(command).parameters.keys()
    assert {f"teacher_{name}" for name in wanted} <= {option.name for option in DISTILLATION.options}


def test_what_fid_takes_for_a_model(silent, tmp_path):
    (tmp_path / "pipeline/unet").mkdir(parents=True)
    (tmp_path / "pipeline/unet/config.json").write_text("{}")
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").touch()
    assert is_model(str(silent)) and is_model("pipeline") and is_model("hf://user/name")
    assert not is_model("images") and not is_model("digits") and not is_model("images.zip")
