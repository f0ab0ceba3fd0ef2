"""Distillation by LoRA: what is trained, what is kept, that runs resume, and what is refused."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_distill import gradient_norm
from toy_distill import assert_same, config_for, digits, grads, no_inception, place, run, task_for, weights  # noqa: F401
from toy_task import Quiet

from mmgen.errors import ConfigError
from mmgen.losses.moment_matching import finite_derivative, forward_derivative
from mmgen.methods.distill.lora import LoraNetworks
from mmgen.models.lora_files import LORA_KEY
from mmgen.models.files import load_model
from mmgen.sampling.drawing import SampleSettings, draw, plan
from mmgen.training import loop

METHODS = ["alternating", "instant"]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_training_brings_the_moments_nearer(place, tmp_path, method):
    """Of the alternating method all moments, those in the teacher's every weight; of the instant one those that it is told to match."""
    before, bytes_before, reporter = gradient_norm(place, load_model(place)), place.read_bytes(), Quiet()
    changes = {
        "loss.method": method, "optimizer.lr": 3e-3, "train.batch_size": 32, "train.max_images": 32 * 40, "student.lora": 4,
        "run.batch_per_device": 32, "run.checkpoint_every": 10**9, "run.teacher_steps": 0,
    }  # fmt: skip
    if method == "alternating":
        changes["optimizer.lr"] = 1e-2
    run(place, tmp_path / "run", reporter, **changes)
    after = gradient_norm(place, load_model(tmp_path / "run/model.safetensors"))
    assert after < (0.8 if method == "alternating" else 1.0) * before, (after, before)
    assert place.read_bytes() == bytes_before
    if method == "instant":
        losses = [line["loss"] for line in reporter.lines if "loss" in line]
        assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


@pytest.mark.parametrize("method", METHODS)
def test_the_teacher_is_the_base_without_adapters(place, method):
    """Difference 0, before and after steps of the parts; parts train adapters alone, and the gradient of one is its own."""
    task, _ = task_for(place, **{"loss.method": method, "student.lora": 4})
    plain = load_model(place)
    matching = next(iter(task.trained.values())).objective.matching
    noised = matching.noised(digits())
    with torch.no_grad():
        expected = plain.x_hat(noised.z_t, noised.s, matching.schedule, noised.condition)
        at_t = plain.x_hat(noised.z_t, noised.t, matching.schedule, noised.condition)
        assert torch.equal(matching.student_x(noised), at_t)  # the student begins as the teacher
    for name, part in reversed(task.trained.items()):  # the auxiliary first: before it has moved the student has no gradient
        optimizer = torch.optim.Adam(part.network.parameters(), lr=0.1)
        for _ in range(2):
            if part.prepare is not None:
                part.prepare(lambda: iter([digits()]))
            part.objective(digits())[0].backward()
            others = [p for key, other in task.trained.items() if key != name for p in other.network.parameters()]
            assert all(p.grad is None for p in others)
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        assert torch.equal(matching.teacher_x(noised.z_t, noised), expected)
        assert not torch.equal(matching.student_x(noised), at_t)
    for part in task.trained.values():
        assert {id(p) for p in part.objective.parameters()} == {id(p) for p in part.network.parameters()}
        assert all(".lora_A." in key or ".lora_B." in key for key in part.network.state_dict())


def test_the_students_gradient_is_that_of_all_weights_through_the_product(place):
    """Chain rule: of W + B A with the gradient G of W, dB = G A^T and dA = B^T G; G of the whole distillation, algorithm 2."""
    lora, _ = task_for(place, **{"student.lora": 4})
    full, _ = task_for(place)
    student = lora.trained["student"].network
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in [*student.parameters(), *lora.trained["auxiliary"].network.parameters()]:
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    from mmgen.networks.lora import merged

    for name in ("student", "auxiliary"):
        full.trained[name].network.load_state_dict(merged(student.base.network, lora.trained[name].network.state_dict()))
    full.trained["student"].objective(digits())[0].backward()
    lora.trained["student"].objective(digits())[0].backward()
    ours, whole = dict(student.named_parameters()), dict(full.trained["student"].network.named_parameters())
    for name in student.base.names:
        a, b, g = ours[f"{name}.lora_A.weight"], ours[f"{name}.lora_B.weight"], whole[f"{name}.weight"].grad
        for found, expected in ((b.grad.flatten(1), g.flatten(1) @ a.flatten(1).T), (a.grad.flatten(1), b.flatten(1).T @ g.flatten(1))):
            assert (found - expected).norm() <= 1e-3 * expected.norm() + 1e-6, name


def test_the_instant_directions_are_those_of_the_auxiliarys_matrices_b(place):
    """nu is the teacher's gradient in B, where A is random and B zero: that of every weight times A^T; in A it is zero."""
    lora, _ = task_for(place, **{"loss.method": "instant", "student.lora": 4, "student.lora_auxiliary": 2})
    full, _ = task_for(place, **{"loss.method": "instant"})
    for task in (lora, full):
        task.trained["model"].prepare(lambda: iter([digits()]))
    ours, whole = (task.trained["model"].objective.direction for task in (lora, full))
    parameters = lora.trained["model"].objective.teacher.parameters
    names = [key.removesuffix(".lora_A.weight") for key in ours if key.endswith(".lora_A.weight")]
    assert len(names) > 20
    for name in names:
        assert not ours[f"{name}.lora_A.weight"].any()
        a = parameters[f"{name}.lora_A.weight"]
        assert a.shape[0] == 2
        expected = whole[f"{name}.weight"].flatten(1) @ a.flatten(1).T
        assert (ours[f"{name}.lora_B.weight"].flatten(1) - expected).norm() <= 1e-3 * expected.norm() + 1e-7, name


def test_finite_differences_serve_as_well(place):
    found = {}
    for jvp in ("auto", "finite"):
        torch.manual_seed(0)  # the directions are random
        task, _ = task_for(place, **{"loss.method": "instant", "loss.jvp": jvp, "student.lora": 4})
        part = task.trained["model"]
        assert part.objective.derivative is (forward_derivative if jvp == "auto" else finite_derivative)
        part.prepare(lambda: iter([digits()]))
        found[jvp] = grads(part.objective(digits())[0], part.network)
    assert (found["finite"] - found["auto"]).norm() <= 1e-2 * found["auto"].norm()


# ---------------------------------------------------------------------- runs


def test_files_hold_adapters_alone_and_the_model_is_merged(place, tmp_path):
    changes = {"student.lora": 2, "student.lora_auxiliary": 1, "train.ema_betas": [0.9, 0.99], "run.preview_every": 80, "run.eval_num": 8}
    reporter = Quiet()
    run(place, tmp_path / "run", reporter, **changes)
    assert any("LoRA of rank 2 in 48 layers" in note for note in reporter.notes)
    last = max((tmp_path / "run/checkpoints").glob("[0-9]*"))
    adapter, other = load_file(last / "network.safetensors"), load_file(last / "auxiliary.safetensors")
    numbers = {name: sum(value.numel() for value in state.values()) for name, state in (("student", adapter), ("auxiliary", other))}
    assert numbers["student"] == 2 * numbers["auxiliary"] and all(".lora_" in key for key in adapter)
    for file in last.glob("*.safetensors"):
        tensors = load_file(file)
        most = numbers["auxiliary" if "auxiliary" in file.name else "student"]
        held = sum(value.numel() for key, value in tensors.items() if not key.endswith(".step"))
        assert held == most * (1 if "optimizer" not in file.name else len({k.split(".")[1] for k in tensors} - {"step"})), file.name
    # merged: the model file samples as the adapter on the base does; the file of the adapter is the checkpoint's
    task, _ = task_for(place, **changes)
    average = load_file(last / "ema-0.9.safetensors")
    assert all(torch.equal(value, average[key]) for key, value in load_file(tmp_path / "run/lora.safetensors").items())
    unmerged, model = task.averaged(average), load_model(tmp_path / "run/model.safetensors")
    chosen = plan(model.config, SampleSettings(seed=3))
    ours, theirs = (draw(m, chosen, range(8))[0] for m in (unmerged, model))
    assert (ours.int() - theirs.int()).abs().max() <= 1
    z, t = torch.randn(4, 1, 8, 8, dtype=torch.float64), torch.tensor([0.1, 0.5, 0.9, 1.0], dtype=torch.float64)
    matching = task.trained["student"].objective.matching
    with torch.no_grad():
        ours, theirs = (m.x_hat(z, t, matching.schedule) for m in (unmerged, model))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())
    assert (theirs - load_model(place).x_hat(z, t, matching.schedule)).abs().max() > 1e-4
    with safe_open(tmp_path / "run/lora-ema-0.99.safetensors", "pt") as file:
        assert json.loads(file.metadata()[LORA_KEY])["rank"] == 2
    assert model.config.training["distilled"]["lora"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_killed_and_resumed_is_the_same_bit_for_bit(place, tmp_path, monkeypatch, method):
    changes = {"train.max_images": 96, "optimizer.warmup_images": 16, "student.lora": 2, "loss.method": method, "run.teacher_steps": 0,
               "run.gradient_checkpointing": True, "run.preview_every": 32, "train.ema_betas": [0.9]}  # fmt: skip
    run(place, tmp_path / "whole", **changes)
    original = loop.fetch

    def killed(dataset, first, *rest):
        if first == 64:
            raise KeyboardInterrupt
        return original(dataset, first, *rest)

    monkeypatch.setattr(loop, "fetch", killed)
    with pytest.raises(KeyboardInterrupt):
        run(place, tmp_path / "killed", **changes)
    monkeypatch.setattr(loop, "fetch", original)
    run(place, tmp_path / "killed", **changes)
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    for name in ("model.safetensors", "lora.safetensors"):
        assert_same_file(tmp_path / "whole" / name, tmp_path / "killed" / name)


def assert_same_file(a, b):
    a, b = load_file(a), load_file(b)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_half_precision(place, tmp_path):
    """bf16: passes with gradient under autocast, adapters and their gradients in float32."""
    run(place, tmp_path / "run", **{"student.lora": 2, "train.precision": "bf16", "train.max_images": 64, "run.teacher_steps": 0})
    found = load_file(tmp_path / "run/lora.safetensors")
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in found.values())
    assert any(value.any() for key, value in found.items() if ".lora_B." in key)


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"student.lora": -1}, "student.lora must be a rank from 0 to 4096, not -1"),
    ({"student.lora_targets": ["fc1"]}, "student.lora_targets is for LoRA"),
    ({"student.lora_auxiliary": 8}, "student.lora_auxiliary is for LoRA"),
    ({"student.lora": 4, "student.dropout": 0.1}, "student.dropout and student.lora exclude each other"),
    ({"student.lora": 4, "student.noise_channels": 1}, "student.noise_channels and student.lora exclude each other"),
    ({"student.lora": 4, "student.guidance_range": [1, 8]}, "student.guidance_range and student.lora exclude each other"),
    ({"student.lora": 4, "run.compile": True}, "run.compile and student.lora exclude each other"),
    ({"student.lora": 4, "train.init": "x"}, "train.init and student.lora exclude each other"),
])  # fmt: skip
def test_refusals(place, changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        config_for(place, **changes)


def test_shards_are_refused(place, monkeypatch):
    from mmgen.methods.distill import lora

    monkeypatch.setattr(lora, "is_sharded", lambda accelerator: True)
    with pytest.raises(ConfigError, match="student.lora cannot be sharded"):
        LoraNetworks(load_model(place).network, config_for(place, **{"student.lora": 4}).student, None)


def test_without_peft_the_package_is_named(place, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ConfigError, match=r"pip install 'mmgen\[lora\]'"):
        task_for(place, **{"student.lora": 4})
