"""A step of every method with every network on CUDA tensors that are not there: nothing is copied, nothing waits, attention can be fused."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import Pass, autocast, move, move_objective, moved, on_device, record
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.gpu.cases import DISTILLATIONS, TINY, imm_case, tiny_case, tiny_cases, tiny_settings  # noqa: E402

from mmgen.encoders import vae  # noqa: E402
from mmgen.methods.distill import instant  # noqa: E402
from mmgen.networks import ADMSettings, DiTSettings, TextSettings, UNetSettings, UViTSettings, build_network  # noqa: E402
from mmgen.networks.conditions import Labels  # noqa: E402
from mmgen.networks.text import byte_text  # noqa: E402
from mmgen.training import augment  # noqa: E402
from mmgen.training.ema import EMA  # noqa: E402
from mmgen.training.accumulator import MetricAccumulator  # noqa: E402
from mmgen.training.optim import build_optimizer  # noqa: E402
from mmgen.training.updates import LAG, Updates  # noqa: E402

DISTILLED = [tiny_case(method, name) for method in DISTILLATIONS for name in (*TINY, "text")]
DIT = {f"network.{key}": value for key, value in TINY["dit"].items()}
GUIDED = {"teacher.guidance": 2.0, "teacher.guidance_interval": [0.3, 5.0], "student.steps": 2, "student.rollouts": 0.5, "student.rollouts_after": 0}
VARIED = {
    "imm, augmented": tiny_case("imm", "unet", **{"data.augment": 0.5, "data.xflip": True, "data.label_dropout": 0.2, "network.dropout": 0.1}),
    "imm, latents": imm_case("imagenet256-imm-s", **DIT),
    "imm, mean flow": imm_case("digits-meanflow", **tiny_settings("unet")),
    "alternating, guided, with rollouts": tiny_case("alternating", "unet", **GUIDED | {"student.noise_channels": 2, "loss.weighting": "output"}),
    "instant, guided, with rollouts": tiny_case("instant, forward", "unet", **GUIDED | {"student.dropout": 0.2, "loss.preconditioner": "adam"}),
    "alternating, told w": tiny_case("alternating", "dit", **{"student.guidance_range": [1.0, 4.0]}),
    "alternating, lora": tiny_case("alternating", "uvit", **{"student.lora": 4}),
}  # fmt: skip
CASES = {case.name: case for case in (*tiny_cases(), *DISTILLED)} | VARIED


STEPS = [("imm, unet", "radam", "tf32"), ("alternating, unet", "adam", "fp16")]
STEPS += [pytest.param(name, "adam", "bf16", marks=pytest.mark.slow) for name in CASES]


@pytest.mark.parametrize(("name", "optimizer", "precision"), STEPS)
def test_a_whole_step_waits_for_nothing(name, optimizer, precision, monkeypatch):
    """Of every method with every network it copies nothing either; what attention is given a fused kernel takes."""
    monkeypatch.setattr(instant, "MOMENT_BATCHES", 2)
    trainer = on_a_gpu(CASES[name].make("cpu", "tf32", 16), optimizer, precision, monkeypatch)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)
    if keeps := name in ("imm, augmented", "imm, latents"):  # constants, which are copied once
        check_step(trainer, "model", dtype, copies=True)
    for again in range(2 if precision == "fp16" or optimizer == "radam" else 1):  # then optimisers have moments
        for part in trainer.task.trained:
            found = check_step(trainer, part, dtype)
            if not again:
                print(f"{name}, {part}: {found.of_objective} kernels a pass, {found.kernels} a step, {found.double_bytes / 2**20:.2f} MiB of float64")
    if keeps:
        for kept in (vae._constants, augment._enlarging, augment._reducing):  # of no use to a real GPU
            kept.cache_clear()


def check_step(trainer: Any, part: str, dtype: torch.dtype, copies: bool = False) -> Pass:
    """Passes, clipping, the update and whether it counts, averages, numbers for the log: all but the backward pass.

    The one copy is that of loss and norm, into pinned memory; the host reads it when the device is steps further. copies: there may
    be more.
    """
    trainer.progress.images, trainer.task.turn = 0, lambda step: part
    found = trainer.found = Pass()
    record(trainer._step, found)
    assert (found.waits, found.mismatches) == ([], [])
    assert copies or [copy.partition(":")[0] for copy in found.copies] == ["_to_copy at training/updates.py"]
    assert ("_fused_adam_" in found.operations) == (trainer.optimizer.name == "adam")
    assert ("_amp_update_scale_" in found.operations) == (dtype == torch.float16)
    assert any(q.dtype == dtype for q, _, _ in found.attention)
    assert all(tensor.stride(-1) == 1 for three in found.attention for tensor in three), "no fused attention takes such tensors"
    return found


def counting(objective: Any, trainer: Any) -> Any:
    def counted(batch: Any) -> Any:
        before = trainer.found.kernels
        out = objective(batch)
        trainer.found.of_objective += trainer.found.kernels - before
        return out

    return counted


def on_a_gpu(trainer: Any, optimizer: str, precision: str, monkeypatch: Any) -> Any:
    """A trainer as it would be on a GPU, but for the backward pass."""
    batch = moved(next(iter(trainer._batches(0))))
    monkeypatch.setattr(torch.autograd, "grad", lambda loss, inputs, **options: [torch.zeros_like(value) for value in inputs])
    monkeypatch.setattr(trainer, "_batches", lambda first: iter([batch]))
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    half = partial(autocast, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision))
    monkeypatch.setattr(trainer.accelerator, "autocast", half)
    trainer.optimizer = replace(trainer.optimizer, name=optimizer, grad_clip=1.0)
    trainer.updates = Updates(trainer.accelerator, str, str, lag=LAG + 9)  # the host would read what is not there
    trainer.metrics = MetricAccumulator(trainer.accelerator, single=len(trainer.task.trained) == 1)
    for name, part in trainer.task.trained.items():
        move_objective(part.objective)
        trainer.optimizers[name] = build_optimizer(trainer.optimizer, part.network.parameters())
        trainer._prepared[name] = counting(half()(part.objective), trainer), trainer.optimizers[name]
        trainer.scalers[name] = torch.amp.GradScaler("cuda") if precision == "fp16" else None
    trainer.ema = EMA(trainer.network, trainer.ema.decays)

    def backward(loss: torch.Tensor) -> None:
        scaler = trainer.accelerator.scaler
        assert loss.device.type == "cuda" and (scaler is None or scaler.scale(loss).device.type == "cuda")
        for parameter in trainer.task.trained[trainer.task.turn(0)].network.parameters():
            parameter.grad = torch.zeros_like(parameter)

    monkeypatch.setattr(trainer.accelerator, "backward", backward)
    return trainer


def test_a_copy_a_wait_and_two_devices_are_seen():
    """The counts can fail: each fault of version 0.1, in small."""
    x = on_device(torch.ones(3))
    assert record(lambda: torch.ones(3).to(x.device)).copies and record(lambda: x.cpu()).copies
    assert record(lambda: torch.tensor([1.0, 3.0], device=x.device)).copies and record(lambda: x.new_tensor(2.0)).copies
    assert record(lambda: bool((x == 1).any())).waits and record(lambda: x.sum().item()).waits
    assert record(lambda: x[torch.tensor([0, 1])]).copies
    with pytest.raises(Exception, match="devices"):
        record(lambda: x + torch.ones(3))
    assert record(lambda: x.view(1, 3).mul(2).relu_().device).kernels == 2
    assert record(lambda: x * 2 + torch.tensor(1.0)).faults == []  # a number of the host is an argument of the kernel


def inputs(count: int = 2, channels: int = 3, side: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(count, channels, side, side), torch.rand(count, dtype=torch.float64)


@pytest.mark.parametrize("settings", [
    ADMSettings(model_channels=32, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(8,), null_class=False),
    DiTSettings(hidden_size=32, depth=1, num_heads=2, patch_size=2, null_class=False),
], ids=lambda settings: settings.kind)  # fmt: skip
def test_a_network_without_a_null_class_does_not_ask_the_device_for_it(settings):
    network = build_network(settings, resolution=16, channels=3, num_classes=10, second_time=False)
    move(network)
    x, t = map(on_device, inputs())
    labels = Labels(on_device(torch.tensor([3, 4])), 10)
    assert record(lambda: network(x, t, None, labels)).faults == []
    for null in (None, labels.null(), labels.hidden(on_device(torch.tensor([True, False])))):
        with pytest.raises(Exception, match="no null class"):
            record(lambda null=null: network(x, t, None, null))


@pytest.mark.parametrize("kind", ["unet", "dit", "uvit"])
def test_a_text_is_not_copied(kind):
    tiny = {"unet": UNetSettings, "dit": DiTSettings, "uvit": UViTSettings}[kind]
    settings = tiny(**{key: tuple(value) if isinstance(value, list) else value for key, value in TINY[kind].items()})
    text = TextSettings(length=16, width=32, pooled=32, depth=1, heads=2)
    network = build_network(settings, resolution=16, channels=3, second_time=False, text=text)
    move(network)
    condition = byte_text(["a red circle", "2"], 16)[0].map(on_device)
    x, t = map(on_device, inputs())
    found = record(lambda: network(x, t, None, condition))
    assert found.faults == [] and found.kernels > 50
    assert all(tensor.stride(-1) == 1 for three in found.attention for tensor in three) and found.attention


@pytest.mark.parametrize("kind", TINY)
def test_attention_runs_in_a_fused_kernel(kind):
    """On a CPU the kernel that runs can be seen."""
    case = CASES[f"teacher, {kind}"]
    trainer = case.make("cpu", "fp32", 4)
    network = trainer.network.eval()
    x, t = inputs()
    with profile(activities=[ProfilerActivity.CPU]) as recorded, torch.no_grad():
        network(x, t, None, Labels(torch.tensor([1, 2]), 10))
    names = {event.key for event in recorded.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in names
    assert "aten::_scaled_dot_product_attention_math" not in names
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        plain = network(x, t, None, Labels(torch.tensor([1, 2]), 10))
    with torch.no_grad():
        torch.testing.assert_close(network(x, t, None, Labels(torch.tensor([1, 2]), 10)), plain, rtol=1e-4, atol=1e-5)
