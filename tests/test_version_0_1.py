"""What version 0.1 did: the model files that it wrote load and give what they gave, and its trainings take the same steps.

A flow map with classes; a student of a shifted cosine process, with noise and dropout of its own; a model of DDPM's timesteps.
Images may differ by one grey value where a float64 that differs in its last bit is truncated; x_hat, whose network is float32,
by rounding of another machine's kernels. Trainings are those of its presets of the digits, but for the warm-up.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from golden import FOLDER, arrays

import mmgen
from mmgen.networks.conditions import Labels


@pytest.mark.parametrize("name", ["imm", "schedule", "discrete"])
def test_a_model_file_of_version_0_1(name):
    expected, model = arrays("v0.1"), mmgen.load(FOLDER / f"v0.1-{name}.safetensors")
    drawn = {name: model.sample(6, steps=2, seed=5).images}
    if name != "schedule":
        drawn[f"{name}_guided"] = model.sample(6, steps=3, seed=5, guidance=1.5, classes="balanced").images
    for key, images in drawn.items():
        difference = (images.int() - expected[key].int()).abs()
        assert difference.max() <= 1 and (difference == 0).double().mean() > 0.95, key
        assert len(np.unique(images)) >= 5  # a picture, not clipped to nothing
    x = torch.linspace(-1, 1, 32, dtype=torch.float64).reshape(2, 1, 4, 4)
    labels, time = Labels(torch.tensor([0, 3]), 3), torch.tensor([0.1, 2.0], dtype=torch.float64)
    if name == "imm":
        found = model.f(x, 0.1 * time, 0.4 * time, labels, 1.5)
    else:
        found = model.denoise(x, time, labels, 1.5, torch.tensor([3, 4]))
    torch.testing.assert_close(found, expected[f"{name}_x"], rtol=1e-4, atol=1e-5)


SHARED = {"train.max_images": 384, "run.threads": 1, "run.log_every": 1, "run.eval_num": 0, "run.eval_steps": [1], "train.precision": "fp32"}
IMM = {"optimizer.lr": 2e-3, "optimizer.warmup_images": 10_000, "optimizer.decay": "none", "train.ema_rampup": 0}
TEACHER = {"optimizer.warmup_images": 1_280, "sampling.steps": 1}
RUNS = {  # what the log of version 0.1 (commit 4bf308e) holds: losses and gradient norms of three steps
    "train_imm": (IMM, [0.24741265269564439, 0.19740078389192253, 0.2262007852794538], [0.3867237865924835, 0.284709632396698, 0.4021434485912323]),
    "train_teacher": (TEACHER, [0.8528638924472034, 0.8193020541220903, 0.852435446344316], [1.3631947040557861, 1.4465484619140625, 1.5106432437896729]),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("method", RUNS)
def test_its_trainings(method, tmp_path):
    settings, losses, norms = RUNS[method]
    lines = []
    getattr(mmgen, method)(data="digits", settings=SHARED | settings, out=tmp_path / "run", callback=lines.append, progress=False, device="cpu")
    AcceleratorState._reset_state(reset_partial_state=True)
    steps = [line for line in lines if "loss" in line]
    assert [line["loss"] for line in steps] == pytest.approx(losses, rel=1e-5)
    assert [line["gradient_norm"] for line in steps] == pytest.approx(norms, rel=1e-4)
