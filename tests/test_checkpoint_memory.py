"""A process that does not write a checkpoint, and is not sharded, copies nothing for it: weights, averages, moments, model files."""

from __future__ import annotations

import pytest
import torch
from test_training import Quiet, tiny
from torch.utils._python_dispatch import TorchDispatchMode

from mmgen.methods import IMM
from mmgen.methods.run import train
from mmgen.system.processes import ProcessGroup
from mmgen.training import loop

COPIES = {"clone", "copy_", "_to_copy", "contiguous", "_foreach_copy_", "detach_copy", "cat", "stack"}


class Copies(TorchDispatchMode):
    """Counts the numbers that are copied."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if function.overloadpacket.__name__ in COPIES and isinstance(result, torch.Tensor):
            self.numbers += result.numel()
        return result


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    made = []
    original = loop.Trainer.run
    monkeypatch.setattr(loop.Trainer, "run", lambda self: made.append(self) or original(self))
    train(IMM, tiny(**{"train.max_images": 32, "run.eval_num": 0, "train.ema_betas": [0.9, 0.99]}), tmp_path / "run", Quiet(), device="cpu")
    return made[0]


def saved(trainer, group: ProcessGroup) -> tuple[int, int]:
    """Numbers copied while a checkpoint is made, and how often the processes met."""
    met = []
    group = ProcessGroup(group.index, group.size, lambda: met.append(1))
    trainer.process_group = trainer.files.process_group = group
    with Copies() as copies:
        trainer._save()
    return copies.numbers, len(met)


def test_who_does_not_write_copies_nothing(trainer):
    numbers, met = saved(trainer, ProcessGroup(1, 2))
    assert numbers == 0 and met >= 5  # it waits for every file


def test_a_copy_would_be_counted(trainer, monkeypatch):
    """As version 0.1 made them: of weights, averages and moments, whoever writes."""
    from mmgen.training import checkpoint, model_files

    parameters = sum(p.numel() for p in trainer.network.parameters())

    def copied(state, keep=True):
        return {key: value.detach().clone() for key, value in state.items()}

    for module in (checkpoint, model_files):
        monkeypatch.setattr(module, "gathered", copied)
    numbers, _ = saved(trainer, ProcessGroup(1, 2))
    assert numbers >= 5 * parameters
