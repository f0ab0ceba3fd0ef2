"""Half precision: which network computes in it, dropout masks of two passes, a loss scaler for each network. On a CPU, in bfloat16."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from fake_cuda import autocast, move, on_device, record

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.gpu.cases import TINY, imm_case, tiny_case, tiny_cases  # noqa: E402

from mmgen.config.imm import ImmConfig, resolve  # noqa: E402
from mmgen.config.sections import nest  # noqa: E402
from mmgen.errors import ConfigError  # noqa: E402
from mmgen.networks.dropout import Dropout  # noqa: E402
from mmgen.networks.half import GroupNorm, doubled  # noqa: E402
from mmgen.training.compute import set_precision  # noqa: E402
from mmgen.training.checkpoint import Progress, load_checkpoint, save_checkpoint  # noqa: E402

PLAIN = {"data.name": "noise", "data.resolution": 16, "data.channels": 3, "data.conditional": True, "data.num_classes": 10,
         "data.augment": 0.0, "loss.group_size": 4}  # fmt: skip
CASES = {case.name: case for case in tiny_cases()}


def imm_trainer(kind, **changes):
    settings = {f"network.{key}": value for key, value in TINY[kind].items()} | PLAIN
    return imm_case("cifar10-imm", **{**settings, **changes}).make("cpu", "bf16", 8)


def watched(network):
    """dtypes of the network's raw outputs, in the order of its passes."""
    found = []
    network.register_forward_hook(lambda module, inputs, output: found.append((output.dtype, output.requires_grad)))
    return found


@pytest.mark.parametrize("kind", ["unet", "uvit"])
@pytest.mark.parametrize("frozen", ["full", "half"])
def test_both_passes_of_imm_have_the_same_dropout_masks(kind, frozen):
    trainer = imm_trainer(kind, **{"network.dropout": 0.5, "train.frozen_precision": frozen})
    masks = []
    for module in trainer.network.modules():
        if isinstance(module, Dropout):
            module.register_forward_hook(lambda module, inputs, output: masks.append(((output == 0) & (inputs[0] != 0), output.requires_grad)))
    objective, _ = trainer._prepared["model"]
    objective(next(iter(trainer._batches(0))))
    student, target = ([mask for mask, grad in masks if grad is wanted] for wanted in (True, False))
    assert len(student) == len(target) > 1 and len(masks) == 2 * len(student)
    for one, other in zip(student, target):
        assert 0.3 < one.float().mean() < 0.7
        assert (one == other).float().mean() > 0.999  # a product may be 0 in bfloat16 where it is not in float32


@pytest.mark.parametrize("frozen", ["full", "half"])
def test_the_target_of_imm_computes_as_the_setting_says(frozen):
    trainer = imm_trainer("unet", **{"train.frozen_precision": frozen})
    found = watched(trainer.network)
    objective, _ = trainer._prepared["model"]
    loss, _ = objective(next(iter(trainer._batches(0))))
    assert found == [(torch.bfloat16, True), (torch.bfloat16 if frozen == "half" else torch.float32, False)]
    assert loss.dtype == torch.float64
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trainer.network.parameters())


@pytest.mark.parametrize("more", [{"student.dropout": 0.5}, {"student.noise_channels": 1}])
@pytest.mark.parametrize("kind", ["unet", "uvit"])
def test_x_tilde_of_a_random_student_is_the_same_in_both_turns(kind, more):
    trainer = tiny_case("alternating", kind, **more).make("cpu", "bf16", 8)
    matching, batch, found = trainer.task.trained["student"].objective.matching, next(iter(trainer._batches(0))), []
    answer = matching.student_x
    matching.student_x = lambda noised: found.append(answer(noised)) or found[-1]
    for name in ("student", "auxiliary"):
        torch.manual_seed(len(found))  # torch's generator has no part in it
        trainer._prepared[name][0](batch)
    assert torch.equal(found[0].detach(), found[1]) and matching.student.is_random


def test_half_precision_of_frozen_networks_needs_that_of_the_trained_one():
    with pytest.raises(ConfigError, match="train.frozen_precision half needs train.precision bf16 or fp16"):
        resolve({}, nest({"train.frozen_precision": "half", "train.precision": "tf32", "data.name": "digits"}, ImmConfig))


@pytest.mark.parametrize("frozen", ["full", "half"])
def test_x_tilde_is_the_same_in_both_turns_and_the_small_difference_is_full(frozen):
    trainer = CASES["alternating, unet"].make("cpu", "bf16", 8, **{"train.frozen_precision": frozen})
    matching = trainer.task.trained["student"].objective.matching
    student, auxiliary, teacher = trainer.networks["student"], trainer.networks["auxiliary"], matching.teacher.network
    answers, dtypes = [], {name: watched(network) for name, network in
                           (("student", student), ("auxiliary", auxiliary), ("teacher", teacher))}  # fmt: skip
    answer = matching.student_x
    matching.student_x = lambda noised: answers.append(answer(noised)) or answers[-1]
    batch = next(iter(trainer._batches(0)))
    for name in ("student", "auxiliary"):
        trainer._prepared[name][0](batch)
    assert torch.equal(answers[0].detach(), answers[1])
    half = torch.bfloat16
    assert dtypes["student"] == [(half, True), (half, False)]
    assert dtypes["auxiliary"] == [(torch.float32, False), (half, True)]  # in the student's turn g_phi - g_theta is small
    assert [dtype for dtype, _ in dtypes["teacher"]] == [torch.float32, half if frozen == "half" else torch.float32]


def test_each_network_has_a_loss_scaler_of_its_own(tmp_path):
    trainer = CASES["alternating, unet"].make("cpu", "fp32", 8)
    scalers = {name: torch.amp.GradScaler("cpu", init_scale=2.0**power) for name, power in (("student", 4), ("auxiliary", 9))}
    for scaler in scalers.values():
        scaler.scale(torch.zeros(1))
    parts = trainer.networks, trainer.optimizers, trainer.ema
    path = save_checkpoint(tmp_path, *parts, scalers, Progress(8))
    fresh = {name: torch.amp.GradScaler("cpu") for name in scalers}
    load_checkpoint(path, *parts, fresh)
    for scaler in fresh.values():
        scaler.scale(torch.zeros(1))
    assert [scaler.get_scale() for scaler in fresh.values()] == [16.0, 512.0]


@pytest.fixture
def scaled(monkeypatch):
    """The alternating method with what accelerate makes for fp16 on a GPU, by torch's own scaler on the CPU."""
    from mmgen.training import start

    make = start.make_accelerator

    def with_scaler(*arguments):
        accelerator = make(*arguments)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
        return accelerator

    monkeypatch.setattr("tests.benchmarks.runs.make_accelerator", with_scaler)
    return CASES["alternating, unet"].make("cpu", "fp32", 8)


def scales(trainer):
    return {name: scaler.get_scale() for name, scaler in trainer.scalers.items()}


def test_a_step_uses_the_scaler_of_its_part(scaled):
    assert scaled.scalers["student"] is not scaled.scalers["auxiliary"]
    scaled.progress.images = 8  # step 1: the student's turn
    scaled._step()
    assert scales(scaled) == {"student": 2.0**11, "auxiliary": 2.0**10}  # it grows with each step that was made
    scaled._step()
    assert scales(scaled) == {"student": 2.0**11, "auxiliary": 2.0**11}


def test_an_overflow_of_the_auxiliary_is_its_own(scaled):
    """Its step is left out and its factor halved; the student's next step is made, by a factor that knows nothing of it."""
    first = next(scaled.networks["auxiliary"].parameters())
    hook = first.register_hook(lambda gradient: gradient * torch.inf)
    before = {name: [p.detach().clone() for p in network.parameters()] for name, network in scaled.networks.items()}
    scaled._step()
    assert scales(scaled) == {"student": 2.0**10, "auxiliary": 2.0**9}
    for name, network in scaled.networks.items():
        assert all(map(torch.equal, network.parameters(), before[name])) and not scaled.optimizers[name].state
    hook.remove()
    scaled._step()
    assert scales(scaled) == {"student": 2.0**11, "auxiliary": 2.0**9}
    assert scaled.optimizers["student"].state and not scaled.optimizers["auxiliary"].state
    numbers = scaled._flush()
    assert (numbers["auxiliary_skipped_steps"], numbers["student_skipped_steps"]) == (1, 0)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_what_a_training_asks_of_a_gpu(precision):
    """TF32 but for fp32, the fastest convolution for the shapes at hand, and no sum in half precision."""
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    settings = [(cudnn, "allow_tf32"), (cudnn, "benchmark"), (products, "allow_fp16_reduced_precision_reduction"),
                (products, "allow_bf16_reduced_precision_reduction")]  # fmt: skip
    before, of_products = [getattr(owner, name) for owner, name in settings], torch.get_float32_matmul_precision()
    for owner, name in settings:
        setattr(owner, name, name != "benchmark")
    try:
        set_precision(precision)
        tf32 = precision != "fp32"
        assert [getattr(owner, name) for owner, name in settings] == [tf32, True, False, False]
        assert products.allow_tf32 == tf32  # which is not put back by itself: torch has two names for it, and refuses both
    finally:
        torch.set_float32_matmul_precision(of_products)
        for (owner, name), value in zip(settings, before, strict=True):
            setattr(owner, name, value)


def test_a_group_norm_on_a_gpu_stays_in_half_precision():
    norm = GroupNorm(4, 16)
    move(norm)
    x, outputs = on_device(torch.randn(2, 16, 8, 8)), []
    with autocast(torch.bfloat16):
        found = record(lambda: outputs.append(norm(x.bfloat16())))
    assert outputs[0].dtype == torch.bfloat16 and outputs[0].device.type == "cuda" and found.faults == []
    assert torch.equal(GroupNorm(4, 16)(torch.ones(1, 16, 2, 2)), torch.nn.GroupNorm(4, 16)(torch.ones(1, 16, 2, 2)))


def test_upsampling_on_a_gpu_stays_in_half_precision():
    x, outputs = on_device(torch.randn(2, 16, 8, 8)), []
    with autocast(torch.bfloat16):
        found = record(lambda: outputs.extend([doubled(x.bfloat16()), torch.nn.functional.interpolate(x.bfloat16(), scale_factor=2)]))
    assert [each.dtype for each in outputs] == [torch.bfloat16, torch.float32] and found.faults == []
    assert torch.equal(doubled(torch.arange(4.0).reshape(1, 1, 2, 2))[0, 0, :2], torch.tensor([[0.0, 0, 1, 1]] * 2))
