"""Commands that a person types, on this device: golden arrays, a resumed run, compiled against eager, samples and scores."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ..benchmarks.measuring import ROOT, temporary_folder
from .cases import imm_case

TINY_RUN = ["--set", "network.model_channels=8", "--eval-num", "0", "--set", "run.preview_every=1000000"]


def command(*arguments: str, cwd: Path, device: str, seconds: float = 300, **environment: str) -> subprocess.CompletedProcess:
    """A Python command with the package of this tree; never raises for its exit status."""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "MMGEN_TEST_DEVICE": device, **environment}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=seconds)


def golden(device: str, small: bool) -> dict[str, Any]:
    """The official networks' outputs and the public loss, computed on the device."""
    done = command("-m", "pytest", "tests/test_networks.py", "tests/test_imm_loss.py", "-k", "golden", "-p", "no:cacheprovider",
                   cwd=ROOT, device=device)  # fmt: skip
    count = re.search(r"(\d+) passed", done.stdout) or re.search(r"^(\.+)", done.stdout, re.M)
    passed = 0 if count is None else int(count[1]) if count[1].isdigit() else len(count[1])
    return {"passed": passed, "failed": [] if done.returncode == 0 else [done.stdout[-1500:]]}


def resume(device: str, small: bool) -> dict[str, Any]:
    """A run that was stopped and resumed against one that was not: root mean square and largest difference of the weights.

    On a GPU sums come in another order each time, so that two whole runs differ as well: `chance` is by how much.
    """
    folder, images = temporary_folder(), 2048 if small else 25_600
    more = [*(TINY_RUN if small else TINY_RUN[2:]), "--device", device, "--set", f"run.checkpoint_every={images // 2}"]

    def train(out: str, count: int) -> None:
        done = command("-m", "mmgen", "train-imm", "--max-images", str(count), "--out", out, *more, cwd=folder, device=device)
        if done.returncode:
            raise RuntimeError(done.stderr[-600:])

    def weights(out: str) -> torch.Tensor:
        found = load_file(folder / out / "model.safetensors")
        return torch.cat([value.double().flatten() for _, value in sorted(found.items()) if value.dtype.is_floating_point])

    train("whole", images)
    train("parts", images // 2)
    train("parts", images)
    apart = weights("whole") - weights("parts")
    difference, chance = apart.square().mean().sqrt().item(), 0.0
    if device != "cpu":
        train("again", images)
        chance = (weights("whole") - weights("again")).square().mean().sqrt().item()
    failed = [] if difference <= 2 * chance else [f"weights differ by {difference:.3g}, those of two whole runs by {chance:.3g}"]
    return {"difference": difference, "chance": chance, "largest_difference": apart.abs().max().item(), "failed": failed}


def compiled(device: str, small: bool) -> dict[str, Any]:
    """The loss of the digits' IMM compiled against eager, and how long the first step takes."""
    if small:  # building C++ takes minutes of a CPU, and `tests/test_training.py` compiles there
        return {"left out": "only on a GPU", "failed": []}
    values, first = {}, 0.0
    for compile_ in (False, True):
        trainer = imm_case("digits-imm").make(device, "fp32", 32, **{"run.compile": compile_})
        start = time.perf_counter()
        objective, _ = trainer._prepared["model"]
        loss, _ = objective(next(iter(trainer._batches(0))))
        loss.backward()
        values[compile_], first = loss.item(), time.perf_counter() - start
        del trainer, objective
        gc.collect()
        torch._dynamo.reset()
    apart = abs(values[True] - values[False]) / abs(values[False])
    return {"relative_difference": apart, "first_step_seconds": first, "failed": [] if apart < 1e-4 else [f"loss {apart:.3g} apart"]}
