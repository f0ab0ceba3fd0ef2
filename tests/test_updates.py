"""Steps that are left out: a loss or a gradient that is not finite changes nothing, is logged, and ends a run only where it stays."""

import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from test_training import Quiet, assert_same, tiny, weights

from mmgen.errors import TrainingError
from mmgen.training import loop
from mmgen.methods import IMM
from mmgen.methods.run import train as train_method
from mmgen.training.updates import MOST, MOST_SCALED, Updates, with_its_gradient

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
    for file in sorted(before.glob("*.safetensors")):  # weights, optimiser, both averages
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


def test_a_run_that_goes_on_leaves_out_the_same_steps(tmp_path, monkeypatch):
    broken_fetch(monkeypatch, 16, 48, 64)
    train(tmp_path / "whole")
    for images in (48, 64, 160):
        train(tmp_path / "parts", **{"train.max_images": images})
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


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
    def __init__(self, skips):
        self.skips, self.steps = iter(skips), 0

    def step(self):
        self.step_was_skipped = next(self.skips)
        self.steps += 1


def test_a_scaler_counts_by_itself():
    """Its steps are left out quietly, since they belong to finding its factor; but not for ever."""
    notes, nan = [], torch.tensor(math.nan)
    optimizer = Optimizer([True, True, False] + [True] * MOST_SCALED)
    updates = Updates(types.SimpleNamespace(scaler=object()), notes.append, lambda: "do something")
    assert [updates.make("model", optimizer, nan, nan, step) for step in range(3)] == [False, False, True]
    with pytest.raises(TrainingError, match=f"^{MOST_SCALED} steps in a row .* do something$"):
        for step in range(3, 3 + MOST_SCALED):
            updates.make("model", optimizer, nan, nan, step)
    assert optimizer.steps == 3 + MOST_SCALED and not notes


def test_each_part_has_a_count_of_its_own():
    """A student that is well does not hide an auxiliary that is not."""
    updates = Updates(types.SimpleNamespace(scaler=None), lambda text: None, lambda: "")
    optimizer, good, bad = Optimizer([False] * 100), torch.tensor(1.0), torch.tensor(math.inf)
    with pytest.raises(TrainingError, match="the loss of auxiliary is 1 and the norm of its gradient inf"):
        for step in range(2 * MOST):
            updates.make(("student", "auxiliary")[step % 2], optimizer, good, (good, bad)[step % 2], step)
    assert optimizer.steps == MOST


SCRIPT = """
import math, os, sys
from pathlib import Path
import torch
import toy_task

plain, rank, size = toy_task.StudentObjective.forward, int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
assert size == int(sys.argv[2])

def forward(self, batch):
    loss, numbers = plain(self, batch)
    if batch.first == 56:  # the second half of a student's step: of two processes the second one alone meets it
        loss = loss + math.nan  # a constant: its own gradient is finite
    return loss, numbers

toy_task.StudentObjective.forward = forward
reporter = toy_task.Quiet()
toy_task.run_toy(Path(sys.argv[1]), reporter)
if rank == 0:
    print([note for note in reporter.notes if "left out" in note], [line.get("student_skipped_steps") for line in reporter.lines])
"""


@pytest.mark.slow
def test_all_processes_leave_out_what_one_of_them_met(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"}
    said = []
    for size in (1, 2):
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2"] if size == 2 else []
        result = subprocess.run(
            [sys.executable, *launcher, "script.py", str(size), str(size)], cwd=tmp_path, env=environment, capture_output=True,
            text=True, timeout=300,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        said.append(result.stdout)
    assert said[0].startswith("['step 4 was left out: the loss of student is") and said[1].count("step 4 was left out") == 1
    assert said[0].count(" 1,") == said[1].count(" 1,") == 1
    one, two = weights(tmp_path / "1"), weights(tmp_path / "2")
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-5, atol=1e-7)
