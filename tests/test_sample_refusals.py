"""What `mmgen sample` refuses, and what a failure leaves."""

# ruff: noqa: F811 (fixtures are imported)

from __future__ import annotations

import json
import os
import signal
import time

import forks
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sampled import colour_model, model, pixels, record, run  # noqa: F401

import mmgen
from mmgen.errors import ConfigError, MmgenError, ModelError
from mmgen.sampling import file as sample_file
from mmgen.sampling import missing as sample_drawing


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--steps", "0"), "steps must be at least 1"),
        (("--steps", "1000000000"), "steps must be at most 100,000"),  # a list of so many filled the memory
        (("--steps", "1,two"), "--steps must be whole numbers"),
        (("--num", "0"), "--num must be at least 1"),
        (("--classes", "10"), "unknown class '10'"),
        (("--classes", "seeven"), "did you mean 'seven'"),
        (("--sampler", "pushfoward"), "did you mean 'pushforward'"),
        (("--grid", "edn"), "did you mean 'edm'"),
        (("--eta", "nan", "--steps", "2"), "must descend"),
        (("--eta", "1.4", "--steps", "4"), "3 intermediate eta values"),
        (("--format", "jpg"), "unknown format"),
        (("--format", "png", "--out", "x.npz"), "--format is png"),
        (("--out", "x.jpg"), "nothing that can be written"),
        (("--device", "gpu"), "unknown device"),
        (("--batch-size", "0"), "batch size"),
    ],
)
def test_impossible_values_are_refused(model, tmp_path, monkeypatch, options, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=said):
        run(model, *options)
    assert not any(tmp_path.iterdir())


def test_unconditional_models_have_no_guidance_and_no_classes(colour_model, tmp_path):
    for options, said in ((("--guidance", 2), "class-conditional"), (("--classes", "balanced"), "unconditional")):
        with pytest.raises(ConfigError, match=said):
            run(colour_model, "--out", tmp_path / "out", *options)


def test_what_is_no_model_is_refused(model, tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(model.read_bytes()[:-1000])
    save_file({"weight": torch.zeros(3)}, tmp_path / "foreign.safetensors")
    (tmp_path / "empty").mkdir()
    for name, said in {
        "none.safetensors": "there is no model at",
        "empty": "is a folder without weights",
        "cut.safetensors": "damaged or cut short|cannot be read",
        "foreign.safetensors": "is of no family that mmgen knows",
    }.items():
        with pytest.raises(ModelError, match=said):
            run(tmp_path / name, "--out", tmp_path / "out")
    with pytest.raises(ModelError, match="no model-ema-0.5"):
        run(model, "--ema", "0.5", "--out", tmp_path / "out")


def test_places_that_cannot_be_written(model, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.npz").mkdir()
    for out in ("file", "folder.npz"):
        with pytest.raises(ConfigError, match="choose another --out"):
            run(model, "--num", 2, "--out", tmp_path / out)
    for out in ("file/deeper", "file/a.npz"):
        with pytest.raises(MmgenError, match="cannot write"):
            run(model, "--num", 2, "--out", tmp_path / out)


def test_a_disk_that_fills_up(model, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(sample_file, "save_array", full)
        with pytest.raises(MmgenError, match="No space left"):
            run(model, "--num", 4, "--out", tmp_path / "a.npz")
    assert not (tmp_path / "a.npz").exists() and not list((tmp_path / "a.npz.parts").iterdir())
    run(model, "--num", 4, "--out", tmp_path / "a.npz")
    assert len(np.load(tmp_path / "a.npz")["arr_0"]) == 4


def test_a_disk_that_fills_up_while_pictures_are_written(model, tmp_path, monkeypatch):
    original = os.replace

    def full(source, path):
        if path.name == "000002.png":
            raise OSError(28, "No space left on device")
        original(source, path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(MmgenError, match="000002.png: No space left"):
            run(model, "--num", 6, "--out", tmp_path / "a", "--batch-size", 2)
    assert {"000000.png", "000001.png"} <= {path.name for path in (tmp_path / "a").glob("*.png")}
    assert not list((tmp_path / "a").glob(".tmp-*"))
    assert not json.loads((tmp_path / "a" / "samples.json").read_text())["complete"]
    run(model, "--num", 6, "--out", tmp_path / "a", "--batch-size", 2)
    assert len(list((tmp_path / "a").glob("*.png"))) == 6


def test_what_was_drawn_before_a_failure_is_written(model, tmp_path, monkeypatch):
    original, calls = sample_drawing.draw, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("the network failed")
        return original(*arguments)

    monkeypatch.setattr(sample_drawing, "draw", failing)
    with pytest.raises(RuntimeError, match="the network failed"):
        run(model, "--num", 6, "--out", tmp_path / "a", "--batch-size", 2)
    assert sorted(path.name for path in (tmp_path / "a").glob("*.png")) == [f"00000{i}.png" for i in range(4)]


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_leaves_whole_files_and_continues(model, tmp_path, stop):
    out = tmp_path / "out"
    command = ["sample", str(model), "--num", "150", "--out", str(out), "--batch-size", "1", "--device", "cpu"]
    process = forks.Process("-m", "mmgen", *command)
    deadline = time.monotonic() + 60
    while len(list(out.glob("0*.png"))) < 10 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(stop)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}[stop], errors
    assert "Traceback" not in errors
    if stop != signal.SIGKILL:
        assert "continues" in errors and not list(out.glob(".tmp-*"))
    there = sorted(out.glob("0*.png"))
    assert 10 <= len(there) < 150 and not record(out / "samples.json")["complete"]
    for path in there:
        Image.open(path).load()
    run(*command[1:])
    assert record(out / "samples.json")["complete"] and not list(out.glob(".tmp-*"))
    assert np.array_equal(pixels(out), mmgen.load(model).sample(150, batch_size=1).images[:, 0].numpy())


def test_exit_status_and_one_sentence(tmp_path):
    done = forks.run("-m", "mmgen", "sample", tmp_path / "none.safetensors")
    assert done.returncode == 4 and done.stderr.startswith("error: there is no model at") and done.stderr.count("\n") == 1
