"""Figures while training: those of `mmgen fid`, of the averaged weights; the best model is kept."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from tiny_inception import write_inception

import mmgen
from mmgen.config import sections as configs
from mmgen.data import Dataset
from mmgen.errors import MmgenError, ModelError
from mmgen.config.imm import ImmConfig, resolve
from mmgen.metrics import inception, published_file
from mmgen.metrics.frechet import fd_pixels
from mmgen.models.files import read_config
from mmgen.system.processes import ProcessGroup
from mmgen.training import loop
from mmgen.training.scorer import make_scorer
from mmgen.training.model_files import BEST_FILE
from mmgen.methods import IMM
from mmgen.methods.run import train as train_method
from mmgen.training.task import Reporter

SETTINGS = {
    "network.model_channels": 8, "network.channel_mult": [1], "train.batch_size": 16, "train.max_images": 160,
    "train.ema_betas": [0.5], "run.batch_per_device": 16, "run.checkpoint_every": 32, "run.preview_every": 10**9,
    "run.eval_every": 32, "run.eval_num": 40, "run.eval_steps": [2, 1], "run.log_every": 2,
}  # fmt: skip


class Notes(Reporter):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)



@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("MMGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MMGEN_INCEPTION", raising=False)


def train(folder, **changes):
    config = resolve(configs.read_preset("digits-imm"), configs.nest({**SETTINGS, **changes}, ImmConfig))
    notes = Notes()
    return train_method(IMM, config, folder, notes, device="cpu"), notes.notes


def measured(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "values" in line]


def images(size):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 3, size, size), dtype=np.uint8)
    return Dataset("test", pixels, None, None, "30 images", "x")


def test_figures_are_those_of_the_saved_model(tmp_path):
    outcome, _ = train(tmp_path / "run")
    lines = measured(tmp_path / "run")
    assert [line["images"] for line in lines] == [32, 64, 96, 128, 160]
    assert all(line["figure"] == "FD-pixels-40" and line["num"] == 40 for line in lines)
    model, digits = mmgen.load(tmp_path / "run"), mmgen.data.load("digits")
    for steps in (1, 2):
        expected = fd_pixels(model.sample(40, steps=steps).images, digits.images)
        assert outcome.results["values"][str(steps)] == pytest.approx(expected, rel=1e-6)


def test_best_model_is_kept_by_the_first_number_of_steps(tmp_path, monkeypatch):
    wanted = iter([5.0, 3.0, 4.0, 3.0, 9.0])
    monkeypatch.setattr("mmgen.training.scorer.Scorer.measure", lambda self, model, steps, seed: {2: next(wanted), 1: 1.0})
    train(tmp_path / "run")
    best = read_config(tmp_path / "run" / BEST_FILE).training
    assert best["images"] == 64 and best["figures"] == {"FD-pixels-40": {"2": 3.0, "1": 1.0}}


def test_best_model_is_there_once_its_figure_is_logged(tmp_path, monkeypatch):
    log = loop.Trainer._log

    def killed(self, numbers):
        if "values" in numbers:
            raise KeyboardInterrupt
        log(self, numbers)

    monkeypatch.setattr(loop.Trainer, "_log", killed)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run")
    assert read_config(tmp_path / "run" / BEST_FILE).training["images"] == 32


def test_best_is_remembered_when_a_run_is_resumed(tmp_path, monkeypatch):
    wanted = iter([5.0, 3.0, 4.0, 6.0, 7.0, 8.0])
    monkeypatch.setattr("mmgen.training.scorer.Scorer.measure", lambda self, model, steps, seed: {2: next(wanted), 1: 1.0})
    train(tmp_path / "run", **{"train.max_images": 96})
    AcceleratorState._reset_state(reset_partial_state=True)
    train(tmp_path / "run")
    assert read_config(tmp_path / "run" / BEST_FILE).training["images"] == 64


@pytest.mark.slow
def test_inception_where_its_weights_are(tmp_path, monkeypatch):
    digest = write_inception(tmp_path / inception.SCRIPT)
    monkeypatch.setitem(inception.PUBLISHED, inception.SCRIPT, digest)
    monkeypatch.setenv("MMGEN_INCEPTION", str(tmp_path))
    run = configs.RunSettings(eval_num=10_000)
    assert make_scorer(run, images(32), torch.device("cpu"), ProcessGroup(), print).name == "fid10k"
    assert make_scorer(run, images(16), torch.device("cpu"), ProcessGroup(), print).name == "FD-pixels-10k"  # nothing for Inception
    changes = {"run.eval_features": "inception", "train.max_images": 32, "run.eval_num": 20}
    outcome, _ = train(tmp_path / "run", **changes)
    assert outcome.results["figure"] == "fid20" and outcome.results["between_halves"] is None
    assert set(outcome.results["values"]) == {"1", "2"}


def test_without_inception_auto_says_so_and_a_named_network_is_an_error(tmp_path, monkeypatch):
    def nothing(*arguments, **options):
        raise ModelError("no weights: fetch them and put them here")

    def unwritable(*arguments, **options):
        raise MmgenError("cannot write the cache")

    monkeypatch.setattr(published_file, "locate", nothing)
    monkeypatch.setattr(inception, "locate", nothing)
    notes = []
    scorer = make_scorer(configs.RunSettings(eval_num=100), images(32), torch.device("cpu"), ProcessGroup(), notes.append)
    assert scorer.name == "FD-pixels-100"
    assert notes == ["no FID, FD-pixels is measured instead: no weights: fetch them and put them here"]
    assert make_scorer(configs.RunSettings(eval_num=100), images(64), torch.device("cpu"), ProcessGroup(), notes.append) is None
    with monkeypatch.context() as patch:
        patch.setattr(inception, "locate", unwritable)
        assert make_scorer(configs.RunSettings(eval_num=100), images(32), torch.device("cpu"), ProcessGroup(), notes.append) is not None
        assert notes[-1].endswith("cannot write the cache")
    with pytest.raises(ModelError, match="no weights"):
        train(tmp_path / "run", **{"run.eval_features": "inception"})
    assert not (tmp_path / "run" / "log.jsonl").exists()  # before anything was trained
    assert make_scorer(configs.RunSettings(eval_num=0), images(32), torch.device("cpu"), ProcessGroup(), notes.append) is None
