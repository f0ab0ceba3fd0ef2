"""What a training's log says of its speed, and a dry run of its time; IMM's numbers by noise level."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_objective import make
from test_training import tiny
from toy_task import Quiet
from rich.console import Console
from typer.testing import CliRunner

from mmgen.cli import app
from mmgen.cli.training_report import TrainingReport
from mmgen.diffusion.process import diffuse
from mmgen.losses.imm import draw_times, earlier_time
from mmgen.methods import IMM, METHODS, timing
from mmgen.methods.imm import flow_objective as imm
from mmgen.methods.run import train
from mmgen.models.files import read_config
from mmgen.models.flow_model import flow_map
from mmgen.system.random import keys, normal
from mmgen.training import speed
from mmgen.training.loop import Trainer
from mmgen.training.batches import BatchSplit
from mmgen.training.cost import IMM as WORK
from mmgen.training.cost import Work, pass_cost


def test_the_log_says_how_much_arithmetic_was_done(tmp_path):
    train(IMM, tiny(**{"train.max_images": 64, "run.eval_num": 0}), tmp_path / "run", Quiet(), device="cpu")
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "images_per_second" in line]
    flops = pass_cost(read_config(tmp_path / "run/model.safetensors"), "fp32").flops
    for line in lines:  # two passes forward, and one back, which is two
        assert line["flops_per_second"] == pytest.approx(4 * flops * line["images_per_second"], rel=0.01)
        assert "mfu" not in line and len(line["loss_by_t"]) == len(line["r_is_s"]) == len(line["distance"]) == imm.LEVELS


def test_the_share_of_a_gpu(monkeypatch):
    monkeypatch.setattr(speed, "matrix_rate", lambda device, precision: 1e12)
    monkeypatch.setattr(speed, "forward_flops", lambda config: 1e9)
    config = SimpleNamespace(network=SimpleNamespace())
    found = speed.Speed(config, WORK, torch.device("cuda"), "bf16", 2).numbers(250)
    assert found == {"flops_per_second": 1e12, "mfu": 0.5}
    adapters = replace(WORK, back=1)
    assert speed.Speed(config, adapters, torch.device("cuda"), "bf16", 2).numbers(250) == {"flops_per_second": 7.5e11, "mfu": 0.375}
    assert speed.Speed(config, None, torch.device("cuda"), "bf16", 2).numbers(200) == {}


def test_the_bar_says_the_share_of_a_gpu(monkeypatch):
    """In 80 columns, with the largest numbers that it may have to hold."""
    shown = io.StringIO()
    report = TrainingReport(watch="moment_gap")
    report.terminal = True
    monkeypatch.setattr(report, "_console", lambda: Console(file=shown, width=80, force_terminal=True, color_system=None))
    report.start(0, 1_638_400_000)
    report.log({"images": 1, "moment_gap": 0.004791})
    assert report._watched() == "moment gap 0.00479"  # as on a CPU
    report.log({"images": 2, "moment_gap": 0.004791, "mfu": 0.384})
    report.advance(1_228_800_000)
    report.stop()
    last = [line for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.getvalue()).replace("\r", "\n").split("\n") if line.strip()][-1]
    assert len(last) <= 80 and "1.23G/1.64G" in last and last.rstrip().endswith("moment gap 0.00479, MFU 38%")


def test_every_method_says_what_a_step_of_it_does():
    """Passes of networks; adapters have no gradient of the weights below; guidance is a second pass of the teacher."""
    def work(name, **settings):
        method = METHODS[name]
        config = method.training().config()
        for path, value in settings.items():
            section, name = path.split("__")
            config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
        return method.training().work(config)[0]

    assert work("train-imm") == Work(2, 1) and work("train-teacher") == Work(1, 1)
    assert work("train-imm", teacher__name="t", teacher__solver="heun").forward == 4
    assert work("distill", loss__method="alternating") == Work(3, 1, trained=2, frozen=1)
    assert work("distill", loss__method="instant") == Work(2.5, 1, whole=3)
    assert work("distill", loss__method="alternating", student__lora=4).back == 1
    assert work("distill", loss__method="alternating", teacher__guidance=2.0).forward == 4


def test_matrices_are_multiplied_at_some_rate():
    assert 1e8 < speed.matrix_rate(torch.device("cpu"), "fp32", 0.01) < 1e14


@pytest.mark.parametrize("seconds, words", [(2.34, "2.3 seconds"), (600, "10 minutes"), (3.6e4, "10 hours"), (1e6, "12 days"), (1e9, "11,574 days")])
def test_durations_in_words(seconds, words):
    assert speed.duration(seconds) == words


def test_a_long_step_is_timed_by_its_parts(monkeypatch):
    """A clock that goes on by 3 with each pass and 1 with each update: a step of 100 passes takes 301."""
    clock = [0.0]
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock[0])
    trainer = SimpleNamespace(split=BatchSplit(8, 100, 1), task=SimpleNamespace(trained={"a": 0, "b": 0}), accelerator=SimpleNamespace(device=torch.device("cpu")))

    def step():
        clock[0] += 3 * trainer.split.rounds + 1

    trainer._step = step
    assert speed.time_steps(trainer, 10.0) == pytest.approx(301) and trainer.split.rounds == 100
    before = clock[0]
    assert speed.time_steps(trainer, 0.1) == pytest.approx(400) and clock[0] - before == 2 * 2 * 4  # two turns of two networks, no more
    trainer.split = BatchSplit(8, 1, 1)
    assert speed.time_steps(trainer, 0.1) == pytest.approx(4)


def test_a_dry_run_says_how_long_the_run_takes(monkeypatch):
    monkeypatch.setattr(timing, "TIMED_SECONDS", 0.1)
    small = ["--set", "network.model_channels=8", "--set", "network.channel_mult=[1]", "--batch-size", "8", "--device", "cpu"]
    printed = CliRunner().invoke(app, ["train-imm", "--dry-run", *small], catch_exceptions=False).stdout
    assert "time of the run" in printed and "on cpu:" in printed and "s a step, scores and previews not counted" in printed
    assert re.search(r"about \d+\.\d\d MiB: weights and gradients (?!0\.00)", printed)
    monkeypatch.setattr(timing, "MOST_SECONDS", 0.0)
    printed = CliRunner().invoke(app, ["train-imm", "--dry-run", *small], catch_exceptions=False).stdout
    assert "at least" in printed and "not timed, as one pass takes" in printed


def test_a_dry_run_on_a_cpu_takes_few_images_at_a_time(monkeypatch):
    """Neither the time nor the memory of the whole pass."""
    sizes, plain = [], Trainer._step

    def step(self):
        sizes.append(self.split.size)
        plain(self)

    monkeypatch.setattr(Trainer, "_step", step)
    monkeypatch.setattr(timing, "matrix_rate", lambda device, precision: 1e9)
    monkeypatch.setattr(timing, "TIMED_SECONDS", 0.1)
    small = ["--set", "network.model_channels=8", "--set", "network.channel_mult=[1]", "--batch-size", "128", "--device", "cpu"]
    printed = CliRunner().invoke(app, ["train-imm", "--dry-run", *small], catch_exceptions=False).stdout
    assert "s a step" in printed and "1 accumulation step x 128 images" in printed
    assert max(sizes) < 128 and all(size % 4 == 0 for size in sizes)  # groups of IMM


@torch.no_grad()
def test_numbers_of_imm_by_level():
    """Against the definitions, image by image."""
    objective, batch = make(**{"loss.k": 4})
    _, numbers = objective(batch)
    flow, loss, size = objective.config.flow, objective.config.loss, objective.config.loss.group_size
    s, t = draw_times(loss, flow, keys(0, batch.index[::size], imm.TIME))
    r = earlier_time(loss, flow, s, t)
    schedule, expected = flow.get_schedule(), {name: torch.zeros(2, imm.LEVELS, dtype=torch.float64) for name in numbers}
    x = batch.images.double() / 127.5 - 1
    noise = flow.sigma_data * normal(keys(0, batch.index, imm.NOISE), x.shape[1:], torch.float32).double()
    label, target_label = objective._conditions(batch)
    for group in range(len(t)):
        eta = float(schedule.eta(t[group]))
        level = sum(eta >= edge for edge in objective.levels[1:-1])
        part = slice(group * size, (group + 1) * size)
        s_, r_, t_ = (time[group].expand(size) for time in (s, r, t))
        y_t = flow_map(objective.network, flow, diffuse(schedule, x[part], noise[part], t_), s_, t_, label[part])
        y_r = flow_map(objective.network, flow, diffuse(schedule, x[part], noise[part], r_), s_, r_, target_label[part])
        values = {"r_is_s": float(r[group] == s[group]), "distance": float((y_t - y_r).square().mean().sqrt())}
        for name, value in values.items():
            expected[name] += torch.tensor([[value], [1.0]]) * (torch.arange(imm.LEVELS) == level)
    for name in ("r_is_s", "distance"):
        torch.testing.assert_close(numbers[name], expected[name], rtol=1e-4, atol=1e-7)
    assert float(numbers["loss_by_t"][0].sum()) == pytest.approx(float(objective(batch)[0]) * len(t), rel=1e-6)
    assert 0 < float(numbers["r_is_s"][0].sum()) < len(t) and math.isclose(float(numbers["r_is_s"][1].sum()), len(t))
