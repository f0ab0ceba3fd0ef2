"""Checkpoints that were damaged after they were written: found, named, kept aside, and the one before them used."""

import errno
import json
import random
import threading
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from test_training import Quiet, assert_same, tiny, weights

from mmgen.errors import MmgenError, TrainingError
from mmgen.system.processes import ProcessGroup
from mmgen.training import checkpoint_sums
from mmgen.training.checkpoint import Progress, file_names, load_checkpoint, newest_whole, save_checkpoint
from mmgen.training.checkpoint_sums import damage
from mmgen.training.ema import EMA
from mmgen.methods import IMM
from mmgen.methods.run import train

FILES = {"network.safetensors", "optimizer.safetensors", "ema-0.5.safetensors"}


class Run:
    """A network that was trained for a step, with checkpoints of 10, 20, ... images whose weights are those numbers."""

    def __init__(self, folder: Path, count: int = 2) -> None:
        self.folder, self.notes = folder, []
        self.network = torch.nn.Linear(3, 2)
        self.optimizer = torch.optim.Adam(self.network.parameters())
        self.network(torch.ones(1, 3)).sum().backward()
        self.optimizer.step()
        self.ema = EMA(self.network, {"0.5": lambda images: 0.5})
        self.needed = file_names(["model"], self.ema)
        for number in range(1, count + 1):
            self.save(10 * number)

    def save(self, images: int) -> Path:
        torch.nn.init.constant_(self.network.weight, images)
        parts = {"model": self.network}, {"model": self.optimizer}
        return save_checkpoint(self.folder, *parts, self.ema, {}, Progress(images, 1.5))

    def path(self, images: int) -> Path:
        return self.folder / f"{images:012d}"

    def choose(self, process_group: ProcessGroup = ProcessGroup()) -> Path | None:
        return newest_whole(self.folder, self.needed, process_group, self.notes.append)


def flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(bytes(content))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


def test_a_whole_checkpoint_is_whole_and_the_newest_is_used(tmp_path):
    run = Run(tmp_path)
    assert run.needed == FILES and damage(run.path(10), FILES) is None
    assert run.choose() == run.path(20) and run.notes == []
    assert Run(tmp_path / "empty", 0).choose() is None


@pytest.mark.parametrize("name", sorted(FILES | {"state.json"}))
@pytest.mark.parametrize("how", ["flipped", "cut", "emptied", "missing"])
def test_a_damaged_one_is_named_and_kept_and_the_one_before_used(name, how, tmp_path):
    run = Run(tmp_path)
    file = run.path(20) / name
    if how == "flipped":
        flip(file, 8 * (file.stat().st_size // 2) + 3)
    elif how == "missing":
        file.unlink()
    else:
        cut(file) if how == "cut" else file.write_bytes(b"")
    left = {p.name: p.read_bytes() for p in run.path(20).iterdir()}
    assert run.choose() == run.path(10)
    (note,) = run.notes
    assert str(run.path(20)) in note and name in note and f"{10:012d} is used" in note
    kept = tmp_path / f"damaged-{20:012d}"
    assert not run.path(20).exists() and {p.name: p.read_bytes() for p in kept.iterdir()} == left
    assert run.save(20) == run.choose() and run.notes == [note]  # the same number again
    flip(run.path(20) / "state.json", 100)
    assert run.choose() == run.path(10) and (tmp_path / f"damaged-{20:012d}-1").is_dir()


def test_bits_of_all_files_count(tmp_path):
    """A sample of them. A flip that JSON does not see, such as 1E-8 for 1e-8, changes nothing."""
    run = Run(tmp_path, 1)
    true = json.loads((run.path(10) / "state.json").read_text())
    unseen = 0
    for name in sorted(FILES | {"state.json"}):
        file = run.path(10) / name
        whole = file.read_bytes()
        for bit in range(0, 8 * len(whole), 5 if name == "state.json" else 31):
            flip(file, bit)
            found = damage(run.path(10), FILES)
            if found is None:
                assert name == "state.json" and json.loads(file.read_text()) == true, bit
                unseen += 1
            else:
                assert name in found, found
            file.write_bytes(whole)
    assert unseen < 50


def test_random_damage_of_several_kinds_at_once(tmp_path):
    chance = random.Random(0)
    for attempt in range(10):
        run = Run(tmp_path / str(attempt), 4)
        for images in (30, 40):
            file = run.path(images) / chance.choice(sorted(FILES))
            chance.choice([cut, lambda f: f.unlink(), lambda f: flip(f, chance.randrange(8 * f.stat().st_size))])(file)
        assert run.choose() == run.path(20) and len(run.notes) == 2
        progress = load_checkpoint(run.path(20), {"model": run.network}, {"model": run.optimizer}, run.ema, {})
        assert progress == Progress(20, 1.5) and run.network.weight.unique().tolist() == [20]


def test_where_none_is_whole_nothing_is_touched(tmp_path):
    run = Run(tmp_path)
    cut(run.path(10) / "network.safetensors")
    (run.path(20) / "state.json").unlink()
    for _ in range(2):  # nor does the next attempt begin from nothing
        with pytest.raises(TrainingError, match=r"is whole .*20: state.json is missing.*10: network.safetensors has"):
            run.choose()
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{10:012d}", f"{20:012d}"] and run.notes == []


def test_checkpoints_without_sums_load_and_cut_ones_are_found(tmp_path):
    run = Run(tmp_path)
    for images in (10, 20):
        file = run.path(images) / "state.json"
        state = {key: value for key, value in json.loads(file.read_text()).items() if key not in ("sha256", "files")}
        file.write_text(json.dumps({**state, "format": 1}))
    assert run.choose() == run.path(20)
    assert load_checkpoint(run.path(20), {"model": run.network}, {"model": run.optimizer}, run.ema, {}).images == 20
    cut(run.path(20) / "optimizer.safetensors")
    assert run.choose() == run.path(10) and "optimizer.safetensors" in run.notes[0]


def test_what_need_not_be_damaged_is_not_put_aside(tmp_path, monkeypatch):
    run = Run(tmp_path)
    monkeypatch.setattr(checkpoint_sums, "FORMAT", 1)
    with pytest.raises(TrainingError, match="of a newer mmgen"):
        run.choose()
    monkeypatch.undo()

    def refused(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(checkpoint_sums, "read_state", refused)
    with pytest.raises(TrainingError, match="state.json: Permission denied"):
        run.choose()
    assert run.path(10).is_dir() and run.path(20).is_dir()


def together(size: int, work) -> list:
    """What work(process_group) returns or raises in each of `size` threads that form a process_group."""
    barrier, board, results = threading.Barrier(size, timeout=30), [None] * size, [None] * size

    def member(index: int) -> None:
        def gather(value):
            board[index] = value
            barrier.wait()
            values = list(board)
            barrier.wait()
            return values

        try:
            results[index] = work(ProcessGroup(index, size, barrier.wait, gather))
        except MmgenError as error:
            results[index] = error

    threads = [threading.Thread(target=member, args=(i,)) for i in range(size)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    return results


def test_all_processes_choose_the_same(tmp_path):
    run = Run(tmp_path)
    cut(run.path(20) / "network.safetensors")
    assert together(3, run.choose) == [run.path(10)] * 3 and len(run.notes) == 1
    cut(run.path(10) / "network.safetensors")
    errors = together(3, run.choose)
    assert all(isinstance(error, TrainingError) for error in errors) and len({str(error) for error in errors}) == 1


@pytest.mark.slow
def test_a_run_goes_on_from_the_one_before_bit_for_bit(tmp_path):
    """And the model files, the log and the results are those of a run to which nothing happened."""
    changes = {"run.eval_every": 64, "run.eval_num": 16, "run.eval_steps": [1]}
    train(IMM, tiny(**changes), tmp_path / "whole", Quiet(), device="cpu")
    AcceleratorState._reset_state(reset_partial_state=True)
    train(IMM, tiny(**changes), tmp_path / "hurt", Quiet(), device="cpu")
    AcceleratorState._reset_state(reset_partial_state=True)
    flip(tmp_path / f"hurt/checkpoints/{160:012d}/optimizer.safetensors", 12345)
    reporter = Quiet()
    outcome = train(IMM, tiny(**changes), tmp_path / "hurt", reporter, device="cpu")
    assert any("damaged" in note and "optimizer.safetensors" in note for note in reporter.notes)
    assert any("resuming" in note and f"{128:012d}" in note for note in reporter.notes) and outcome.finished
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "hurt"))
    for name in ("model.safetensors", "model-best.safetensors"):
        ours, theirs = load_file(tmp_path / "whole" / name), load_file(tmp_path / "hurt" / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    logs = []
    for name in ("whole", "hurt"):
        lines = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        logs.append([{k: v for k, v in line.items() if k not in ("seconds", "images_per_second", "flops_per_second", "threads")} for line in lines])
    assert logs[0] == logs[1] and sum("values" in line for line in logs[0]) == 3
    steps = [line for line in logs[0] if "loss" in line]
    assert all(line["gradient_norm"] > 0 and line["loss_max"] >= line["loss"] for line in steps)


def test_what_was_due_when_it_was_killed_is_made_up_for(tmp_path, monkeypatch):
    """A run killed after the checkpoint and before the figure and the preview of the same step."""
    changes = {"run.eval_every": 64, "run.preview_every": 64, "run.eval_num": 16, "run.eval_steps": [1], "train.max_images": 96}
    train(IMM, tiny(**changes), tmp_path / "whole", Quiet(), device="cpu")
    AcceleratorState._reset_state(reset_partial_state=True)
    with monkeypatch.context() as patch:
        patch.setattr("mmgen.training.loop.Trainer._look", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        patch.setattr("mmgen.training.loop.crossed", lambda before, after, every: after == 64)
        with pytest.raises(KeyboardInterrupt):
            train(IMM, tiny(**changes), tmp_path / "cut", Quiet(), device="cpu")
    assert not (tmp_path / "cut/previews").exists()
    AcceleratorState._reset_state(reset_partial_state=True)
    train(IMM, tiny(**changes), tmp_path / "cut", Quiet(), device="cpu")
    for name in ("previews/000000000064.png", "model-best.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes(), name


def test_a_finished_run_has_the_model_of_its_last_checkpoint(tmp_path, monkeypatch):
    """Killed between writing the last checkpoint and what comes after it."""
    train(IMM, tiny(**{"train.max_images": 64}), tmp_path / "whole", Quiet(), device="cpu")
    AcceleratorState._reset_state(reset_partial_state=True)
    with monkeypatch.context() as patch:
        patch.setattr("mmgen.training.loop.remove_old", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(IMM, tiny(**{"train.max_images": 64, "run.checkpoint_every": 64}), tmp_path / "cut", Quiet(), device="cpu")
    AcceleratorState._reset_state(reset_partial_state=True)
    train(IMM, tiny(**{"train.max_images": 64, "run.checkpoint_every": 64}), tmp_path / "cut", Quiet(), device="cpu")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
