"""Model files that version 0.1 wrote: they load, and give what version 0.1 gave.

A flow map with classes; a student of a shifted cosine process, with noise and dropout of its own; a model of DDPM's timesteps.
Images may differ by one grey value where a float64 that differs in its last bit is truncated; x_hat, whose network is float32,
by rounding of another machine's kernels.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
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
