"""One thread or all: what is chosen on idle and busy machines, what trying costs, and that a given number is kept."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch
from safetensors.torch import load_file

from mmgen.config.imm import resolve
from mmgen.methods import IMM
from mmgen.methods.run import train as train_method
from mmgen.training import threads
from mmgen.training.threads import ThreadChoice, choice

IDLE, BUSY = {1: 0.16, 2: 0.14}, {1: 0.16, 2: 0.8}  # seconds of a step by threads: the digits' on two cores
MANY = {1: 8.0, 16: 0.5}
SMALL = {
    "network": {"kind": "unet", "model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []},
    "train": {"batch_size": 8, "precision": "fp32"},
    "run": {"batch_per_device": 8, "eval_num": 0, "log_every": 4},
}  # of the digits


class Silent:
    """A reporter that shows nothing."""

    def work(self, *arguments):
        return contextlib.nullcontext(lambda *done: None)

    def __getattr__(self, name):
        return lambda *arguments: None


def simulate(machine, seconds: float, most: int = 2):
    """machine(time) -> seconds of a step by threads, and how it varies with the step. (seconds a step of the best, choices)."""
    now, used = 0.0, []
    chosen = ThreadChoice(most, used.append)
    work, best, kept = 0, 0.0, []
    while now < seconds:
        times = machine(now, work)
        took = times[used[-1]]
        best += min(times.values())
        now, work = now + took, work + 1
        chosen.step(took)
        kept.append(chosen.chosen)
    return best / now, kept


@pytest.mark.parametrize("times, most, expected", [(IDLE, 2, 2), (BUSY, 2, 1), (MANY, 16, 16)], ids=["idle", "busy", "wide"])
def test_a_steady_machine(times, most, expected):
    """The faster number, and trying the other one costs a twentieth."""
    speed, kept = simulate(lambda now, work: times, 600 if most == 2 else 6000, most)
    assert kept[-1] == expected and all(k == expected for k in kept[2 * (threads.WARM + threads.MEASURED) :])
    assert speed > 0.93


def test_a_machine_that_changes():
    """Busy for the second and the fourth of five minutes."""
    speed, kept = simulate(lambda now, work: BUSY if int(now // 60) % 2 else IDLE, 300)
    assert speed > 0.85 and {1, 2} == set(kept)


def test_networks_that_take_turns():
    """Steps of the student take three times as long as the auxiliary's: no reason to change anything."""
    speed, kept = simulate(lambda now, work: {k: v * (3 if work % 2 else 1) for k, v in IDLE.items()}, 600)
    assert set(kept) == {2} and speed > 0.93


def test_small_differences_change_nothing():
    _, kept = simulate(lambda now, work: {1: 0.1 + 0.004 * (work % 3), 2: 0.1 + 0.004 * (work % 5 % 2)}, 300)
    assert set(kept) == {2}


def test_what_is_recorded():
    """Every change, with the step from which it holds, so that the rounding of each step can be had again."""
    used = []
    chosen = ThreadChoice(2, used.append)
    notes = [chosen.step(BUSY[used[-1]]) for _ in range(40)]
    changes = chosen.taken()
    assert list(changes.values()) == used and chosen.taken() == {}
    assert list(changes) == [0, threads.WARM + threads.MEASURED]
    (note,) = filter(None, notes)
    assert note == "CPU threads: 1 from now on, a step takes 160 ms (with 2: 800 ms)"


@pytest.fixture
def own_threads(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("wanted, processes, environment", [(2, 1, None), ("auto", 2, None), ("auto", 1, "2")])
def test_a_given_number_is_kept(monkeypatch, own_threads, wanted, processes, environment):
    """By run.threads or the environment, and that of processes that share the cores."""
    torch.set_num_threads(2)
    if environment:
        monkeypatch.setenv("OMP_NUM_THREADS", environment)
    kept = choice(wanted, processes)
    for _ in range(100):
        assert kept.step(BUSY[2]) is None
    assert kept.now == torch.get_num_threads() == 2 and kept.taken() == {0: 2}


@pytest.mark.slow
def test_a_run_records_its_threads_and_resumes_with_the_same(tmp_path, own_threads):
    """auto: each change in the log, by images seen. A given number: the same weights, resumed or not, bit for bit."""

    def train(folder, images, **run):
        config = {**SMALL, "train": {**SMALL["train"], "max_images": images}, "run": {**SMALL["run"], **run}}
        train_method(IMM, resolve(config), tmp_path / folder, Silent(), device="cpu")
        lines = [json.loads(line) for line in (tmp_path / folder / "log.jsonl").read_text().splitlines()]
        return {k: v for line in lines for k, v in line.get("threads", {}).items()}

    torch.set_num_threads(2)
    found = train("auto", 8 * 16)
    assert list(found)[:2] == ["0", "48"] and list(found.values())[:2] == [2, 1]  # the trial after 6 steps of 8 images
    assert train("a", 64, threads=2) == {"0": 2}
    train("b", 32, threads=2)
    train("b", 64, threads=2)
    first, second = (load_file(tmp_path / folder / "model.safetensors") for folder in "ab")
    assert all(torch.equal(first[key], second[key]) for key in first)
