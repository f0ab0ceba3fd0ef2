"""Two processes train what one does: every method with every kind of network, plain, sharded (FSDP2) and by adapters; a run goes on with
another number of processes.
"""

from __future__ import annotations

from pathlib import Path

import forks
import matrix
import pytest
import torch
from test_processes import relative_difference

from mmgen.training.checkpoint import load_checkpoint

pytestmark = pytest.mark.slow

CASES = matrix.cases()
RESUMED = ("alternating, unet", "alternating, unet, lora", "imm, dit, sharded")


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """The checkpoints of two processes, a folder each case."""
    folder = tmp_path_factory.mktemp("two")
    launched = forks.run(*forks.TWO, matrix.__file__, folder, timeout=900)
    assert launched.returncode == 0, launched.stderr[-3000:]
    return folder


def checkpoint(folder: Path) -> Path:
    return max(folder.glob("[0-9]*"))


def assert_close(found: Path, expected: Path, name: str) -> None:
    """Sums of two gradients have one order only; sharded, and of second moments, they are added up in another one."""
    limit = 1e-4 if name.endswith(("sharded", "preconditioned")) else 1e-6
    files = sorted(file.name for file in expected.glob("*.safetensors"))
    assert len(files) >= 2 and files == sorted(file.name for file in found.glob("*.safetensors"))
    for file in files:
        assert relative_difference(found / file, expected / file) <= limit, file


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_what_one_does(name, two, tmp_path):
    if name.endswith("sharded") and torch.__version__ < "2.7":
        pytest.skip("torch 2.6 shards on GPUs only")
    trainer = matrix.make(CASES[name])
    before = {key: [p.detach().clone() for p in network.parameters()] for key, network in trainer.networks.items()}
    matrix.steps(trainer, matrix.STEPS, tmp_path)
    for key, network in trainer.networks.items():
        assert any((p - old).abs().max() > 1e-4 for p, old in zip(network.parameters(), before[key], strict=True)), "nothing is trained"
    assert_close(checkpoint(two / name), checkpoint(tmp_path), name)
    if name in RESUMED:
        matrix.steps(trainer, 2, tmp_path)
        again = matrix.make(CASES[name])
        again.progress = load_checkpoint(checkpoint(two / name), again.networks, again.optimizers, again.ema, again.scalers)
        matrix.steps(again, 2, tmp_path / "again")
        assert_close(checkpoint(tmp_path / "again"), checkpoint(tmp_path), name)
