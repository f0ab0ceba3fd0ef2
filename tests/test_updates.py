"""Steps that are left out: a loss or a gradient that is not finite changes nothing, is logged, and ends a run only where it stays."""

import json
import math
import os
import types
from pathlib import Path

import forks
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from test_training import Quiet, assert_same, tiny, weights

from mmgen.errors import TrainingError
from mmgen.training import loop
from mmgen.methods import IMM
from mmgen.methods.run import train as train_method
from mmgen.config.sections import OptimizerSettings
from mmgen.training.optim import build_optimizer
from mmgen.training.updates import LAG, MOST, MOST_SCALED, Updates, step_where, take_back_count, with_its_gradient
from torch.utils._python_dispatch import TorchDispatchMode

TESTS = Path(__file__).parent


def broken_fetch(monkeypatch, *at):
    """Images that are not numbers in the steps that begin after so many images."""
    original = loop.fetch

    def fetch(dataset, first, *rest):
        batch = original(dataset, first, *rest)
        if first // 16 * 16 in at:
            batch.images = torch.full(batch.images.shape, math.nan)
        return batch

    monkeypatch.setattr(loop, "fetch", fetch)


def broken_gradient(monkeypatch, *at):
    """A finite loss, whose gradient is not: that of sqrt(0)."""
    calls = []

    def with_it(loss):
        calls.append(loss)
        return with_its_gradient(loss) + (torch.sqrt(0 * loss) if (len(calls) - 1) // 2 * 16 in at else 0)  # two rounds a step

    monkeypatch.setattr(loop, "with_its_gradient", with_it)


def train(folder, **changes) -> Quiet:
    AcceleratorState._reset_state(reset_partial_state=True)
    reporter = Quiet()
    assert train_method(IMM, tiny(**{"run.eval_num": 0, "run.checkpoint_every": 16, "run.keep_checkpoints": 9, **changes}), folder, reporter,
                     device="cpu").finished  # fmt: skip
    return reporter


@pytest.mark.parametrize("broken", [broken_fetch, broken_gradient])
def test_a_step_that_is_left_out_changes_nothing(broken, tmp_path, monkeypatch):
    broken(monkeypatch, 48)
    reporter = train(tmp_path / "run", **{"train.max_images": 96})
    before, after, last = (tmp_path / f"run/checkpoints/{images:012d}" for images in (48, 64, 96))
    for file in sorted(before.glob("*.safetensors")):  # weights and optimiser; the averages go on towards the weights
        if file.name.startswith("ema-"):
            continue
        old, new = load_file(file), load_file(after / file.name)
        assert all(torch.equal(value, new[key]) for key, value in old.items()), file.name
        newest = load_file(last / file.name)
        assert not all(torch.equal(value, newest[key]) for key, value in old.items())
        assert all(torch.isfinite(value).all() for value in newest.values())
    lines = {line["images"]: line for line in reporter.lines}
    assert [images for images, line in lines.items() if "skipped_steps" in line] == [64]
    assert lines[64]["skipped_steps"] == 1 and lines[64]["loss"] is None
    (note,) = [note for note in reporter.notes if "left out" in note]
    assert note.startswith("step 4 was left out: the loss of model is")
    for text in (tmp_path / "run/log.jsonl").read_text().splitlines():
        json.loads(text, parse_constant=pytest.fail)  # no NaN, which JSON does not have


@pytest.mark.slow
def test_a_run_that_goes_on_leaves_out_the_same_steps(tmp_path, monkeypatch):
    broken_fetch(monkeypatch, 16, 48, 64)
    train(tmp_path / "whole")
    for images in (48, 64, 160):
        train(tmp_path / "parts", **{"train.max_images": images})
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


@pytest.mark.slow
def test_a_loss_that_stays_bad_ends_the_run_with_a_sentence(tmp_path, monkeypatch):
    broken_fetch(monkeypatch, *range(64, 1000, 16))
    with pytest.raises(TrainingError) as error:
        train(tmp_path / "run", **{"train.max_images": 320, "run.checkpoint_every": 64})
    text = str(error.value)
    assert text.startswith(f"{MOST} steps in a row were left out: at step {4 + MOST} the loss of model is nan") and "\n" not in text
    assert "optimizer.lr" in text and text.endswith("goes on from " + str(max((tmp_path / "run/checkpoints").iterdir())))
    monkeypatch.undo()
    reporter = train(tmp_path / "run", **{"train.max_images": 320, "optimizer.lr": 1e-4})
    assert any("resuming" in note for note in reporter.notes)


def test_a_loss_keeps_its_value_and_gives_its_gradient_away():
    for value in (0.3, -1e30, 0.0):
        x = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        loss = with_its_gradient(3 * x)
        loss.backward()
        assert torch.equal(loss.detach(), 3 * x.detach()) and x.grad == 3
    for constant in (math.nan, math.inf):
        x = torch.tensor(1.0, requires_grad=True)
        with_its_gradient(x + constant).backward()  # whose own gradient is 1
        assert torch.isnan(x.grad)


class Optimizer:
    steps = 0

    def step(self):
        self.steps += 1


class Scaler:
    updates = 0

    def update(self):
        self.updates += 1


def updates_with(note=lambda text: None, remedy="", scaler=None, lag=None) -> Updates:
    return Updates(types.SimpleNamespace(scaler=scaler, device=torch.device("cpu")), note, lambda: remedy, lag)


def test_a_scaler_counts_by_itself():
    """Its steps are left out quietly, since they belong to finding its factor; but not for ever."""
    notes, nan, optimizer, scaler = [], torch.tensor(math.nan), Optimizer(), Scaler()
    updates = updates_with(notes.append, "do something", scaler)
    for step, norm in enumerate([nan, nan, torch.tensor(1.0)]):
        updates.make("model", optimizer, nan, norm, step)
    assert optimizer.steps == 1
    with pytest.raises(TrainingError, match=f"^{MOST_SCALED} steps in a row .* do something$"):
        for step in range(3, 3 + MOST_SCALED):
            updates.make("model", optimizer, nan, nan, step)
    assert optimizer.steps == 1 and scaler.updates == 3 + MOST_SCALED and not notes


@pytest.mark.parametrize("bad", [(), (1,), (1, 2), (4,)])
@pytest.mark.parametrize("name", ["radam", "adam", "adamw"])
def test_the_device_leaves_out_what_the_host_would(name, bad):
    """The same weights and moments as of an optimiser that never saw the bad steps, bit for bit; the host does not ask."""
    settings = OptimizerSettings(name=name, lr=0.1, beta1=0.5, beta2=0.9, weight_decay=0.1)
    torch.manual_seed(0)
    one, two = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    two.load_state_dict(one.state_dict())
    first, second = (build_optimizer(settings, layer.parameters()) for layer in (one, two))
    for step in range(1, 13):
        gradient = torch.full((2, 3), math.nan) if step in bad else torch.randn(2, 3)
        for layer in (one, two):
            layer.weight.grad, layer.bias.grad = gradient.clone(), gradient[:, 0].clone()
        with NoQuestions():
            step_where(torch.isfinite(gradient).all(), second)
        if step not in bad:
            first.step()
        assert torch.equal(one.weight, two.weight) and torch.equal(one.bias, two.bias)
    for key, value in first.state_dict()["state"][0].items():
        assert torch.equal(value, second.state_dict()["state"][0][key]), key


def test_leaving_out_takes_as_many_kernels_for_many_parameters_as_for_few():
    """A U-Net has hundreds: copies made and gradients cleared one by one cost thousands of launches a step."""

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            counted.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    found = []
    for many in (2, 20):
        parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(many)]
        optimizer, counted = build_optimizer(OptimizerSettings(name="radam"), parameters), []
        for _ in range(2):  # the first makes the moments
            for parameter in parameters:
                parameter.grad = torch.ones(2)
            counted.clear()
            with Counting():
                step_where(torch.tensor(True), optimizer)
        found.append(sum(name.split("_")[0] in ("clone", "copy", "where", "mul", "add") or name.startswith("_foreach") for name in counted))
    assert found[0] == found[1] > 0


class NoQuestions(TorchDispatchMode):
    """Counts of steps, which are on the host, may be asked."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        assert func.overloadpacket.__name__ != "_local_scalar_dense" or out >= 1 and out == int(out)
        return out


def test_the_host_reads_of_a_step_when_later_ones_are_under_way():
    """A run ends LAG steps later than where it is asked at once; before a log line or a checkpoint everything is read."""
    notes, good, bad, layer = [], torch.tensor(1.0), torch.tensor(math.inf), torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(layer.parameters())
    layer(torch.ones(1, 1)).sum().backward()
    updates = updates_with(notes.append, lag=LAG)
    for step in range(1, 4):
        updates.make("model", optimizer, good, bad, step)
    assert len(notes) == 3 - LAG
    updates.read_all()
    assert [note.partition(":")[0] for note in notes] == [f"step {step} was left out" for step in (1, 2, 3)]
    with pytest.raises(TrainingError, match=f"^{MOST} steps in a row were left out: at step {MOST} "):
        for step in range(4, 100):
            updates.make("model", optimizer, good, bad, step)
    assert step == MOST + LAG


def test_counts_of_steps_on_the_host_are_taken_back():
    layer = torch.nn.Linear(1, 1, device="meta")
    optimizer = torch.optim.RAdam(layer.parameters())
    for parameter in layer.parameters():
        optimizer.state[parameter] = {"step": torch.tensor(5.0), "exp_avg": torch.zeros_like(parameter)}
    take_back_count(optimizer)
    assert {float(state["step"]) for state in optimizer.state.values()} == {4.0}


def test_each_part_has_a_count_of_its_own():
    """A student that is well does not hide an auxiliary that is not."""
    updates = updates_with()
    optimizer, good, bad = Optimizer(), torch.tensor(1.0), torch.tensor(math.inf)
    with pytest.raises(TrainingError, match="the loss of auxiliary is 1 and the norm of its gradient inf"):
        for step in range(2 * MOST):
            updates.make(("student", "auxiliary")[step % 2], optimizer, good, (good, bad)[step % 2], step)
    assert optimizer.steps == MOST


SCRIPT = """
import math, sys
from pathlib import Path
import torch
from accelerate import PartialState
import toy_task

plain, there = toy_task.StudentObjective.forward, PartialState(cpu=True)
assert there.num_processes == int(sys.argv[2])
assert there.num_processes == 1 or torch.distributed.get_world_size() == there.num_processes

def forward(self, batch):
    loss, numbers = plain(self, batch)
    if batch.first == 56:  # the second half of a student's step: of two processes the second one alone meets it
        loss = loss + math.nan  # a constant: its own gradient is finite
    return loss, numbers

toy_task.StudentObjective.forward = forward
reporter = toy_task.Quiet()
toy_task.run_toy(Path(sys.argv[1]), reporter)
if there.is_main_process:
    print([note for note in reporter.notes if "left out" in note], [line.get("student_skipped_steps") for line in reporter.lines])
"""


@pytest.mark.slow
def test_all_processes_leave_out_what_one_of_them_met(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    said = []
    for size, launcher in ((1, ()), (2, forks.TWO)):
        result = forks.run(*launcher, "script.py", size, size, cwd=tmp_path, timeout=300, PYTHONPATH=f"{TESTS.parent}{os.pathsep}{TESTS}")
        assert result.returncode == 0, result.stderr
        said.append(result.stdout)
    assert said[0].startswith("['step 4 was left out: the loss of student is") and said[1].count("step 4 was left out") == 1
    assert said[0].count(" 1,") == said[1].count(" 1,") == 1
    one, two = weights(tmp_path / "1"), weights(tmp_path / "2")
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-5, atol=1e-7)
