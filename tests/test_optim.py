"""Optimisers with beta1 = 0: no first moment is kept, and updates are torch's."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_distill import run, toy_teacher, weights
from torch import nn

from mmgen.config.sections import OptimizerSettings
from mmgen.training.checkpoint_sums import read_state, write_state
from mmgen.training.optim import build_optimizer, suited

PLAIN = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "radam": torch.optim.RAdam}


def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.Flatten(), nn.Linear(16 * 36, 33))


def steps(network, optimizer, count=20):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        network(torch.randn(4, 3, 8, 8, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", PLAIN)
def test_updates_are_torchs_bit_for_bit_with_one_moment_less(name, decay):
    settings = OptimizerSettings(name=name, lr=1e-2, beta1=0.0, beta2=0.99, eps=1e-12, weight_decay=decay)
    ours, theirs = layers(), layers()
    optimizer = build_optimizer(settings, ours.parameters())
    fast = {"foreach": True} if name == "radam" else {"fused": True}
    plain = PLAIN[name](theirs.parameters(), lr=1e-2, betas=(0.0, 0.99), eps=1e-12, weight_decay=decay, **fast)
    steps(ours, optimizer), steps(theirs, plain)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
        assert optimizer.state[a].keys() == {"step", "exp_avg_sq"}
        assert torch.equal(optimizer.state[a]["exp_avg_sq"], plain.state[b]["exp_avg_sq"])
        assert optimizer.state[a]["step"].dtype == plain.state[b]["step"].dtype
    kept = sum(v.nbytes for state in optimizer.state.values() for v in state.values() if v.ndim)
    assert kept == sum(p.nbytes for p in ours.parameters())


def test_with_momentum_it_is_torchs_own():
    optimizer = build_optimizer(OptimizerSettings(name="adam", beta1=0.9), layers().parameters())
    assert type(optimizer) is torch.optim.Adam


def test_a_step_that_fails_leaves_no_moment_behind():
    network = layers()
    optimizer = build_optimizer(OptimizerSettings(name="adam", beta1=0.0), network.parameters())
    steps(network, optimizer, 1)
    first = next(network.parameters())
    first.grad = torch.zeros_like(first)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert all("exp_avg" not in state for state in optimizer.state.values())


@pytest.mark.parametrize(("before", "after"), [(0.0, 0.9), (0.9, 0.0)])
def test_a_run_goes_on_with_another_beta1(before, after):
    network = layers()
    settings = OptimizerSettings(name="adam", lr=1e-3, beta1=before)
    optimizer = build_optimizer(settings, network.parameters())
    steps(network, optimizer, 3)
    saved = optimizer.state_dict()
    other = build_optimizer(replace(settings, beta1=after), network.parameters())
    other.load_state_dict({"state": suited(saved["state"], other), "param_groups": other.state_dict()["param_groups"]})
    steps(network, other, 3)
    assert all(("exp_avg" in state) == (after > 0) and state["step"] == 6 for state in other.state.values())
    assert all(p.isfinite().all() for p in network.parameters())


@pytest.mark.slow
def test_a_run_of_version_0_1_resumes_from_its_checkpoint_with_first_moments(tmp_path):
    place = toy_teacher(tmp_path)
    short = {"train.max_images": 48, "optimizer.warmup_images": 16, "optimizer.decay": "none", "run.teacher_steps": 0}
    for name in ("new", "old"):
        run(place, tmp_path / name, **short)
    last = max((tmp_path / "old/checkpoints").glob("[0-9]*"))
    content = read_state(last)
    for file in last.glob("optimizer*.safetensors"):
        state = load_file(file)
        assert not any(key.endswith(".exp_avg") for key in state)
        more = {key.replace("_sq", ""): torch.ones_like(value) for key, value in state.items() if key.endswith(".exp_avg_sq")}
        save_file({**state, **more}, file)
    write_state(last, {key: value for key, value in content.items() if key not in ("files", "sha256")})
    for name in ("new", "old"):
        run(place, tmp_path / name, **{**short, "train.max_images": 80})
    new, old = weights(tmp_path / "new"), weights(tmp_path / "old")
    assert new.keys() == old.keys() and all(torch.equal(new[key], old[key]) for key in new)
