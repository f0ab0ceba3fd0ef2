"""The device against the CPU: loss and gradient of every method with every network, in every precision; golden arrays."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import torch

from mmgen.networks.dropout import Dropout
from mmgen.training.loop import Trainer

from .cases import Case, scramble, tiny_cases

BATCH = 16
# Relative errors of a network's outputs that its precision explains: float32 sums in another order; TF32 and half precision keep 10,
# 7 (bf16) and 10 (fp16) bits of each factor, and the tiny networks are some ten layers deep. They hold for losses too, but not for
# IMM's with less than float32: it is made of the difference between two nearly equal outputs, and so is its gradient. There the
# errors are relative to that difference, which on random networks is hardly larger than the rounding; they are shown, not judged.
LIMITS = {"fp32": 2e-5, "tf32": 1e-2, "bf16": 6e-2, "fp16": 1e-2}


def precisions(device: str) -> list[str]:
    return list(LIMITS) if device == "cuda" else ["fp32"]


def numerics(device: str, small: bool) -> dict[str, Any]:
    """{case: {precision: relative errors of "outputs" of the networks, the "loss" and the "gradient"}}, and `failed`."""
    found, failed = {}, different_masks(device)
    for case in list(tiny_cases())[:: 3 if small else 1]:  # on a CPU `tests/test_fake_cuda.py` and `tests/test_matrix.py` have them all
        reference = loss_and_gradient(case, "cpu", "fp32")
        rows = {}
        for precision in precisions(device):
            try:
                rows[precision] = compared(loss_and_gradient(case, device, precision), reference)
            except Exception as error:  # noqa: BLE001 a report says what fails and goes on
                rows[precision] = {"error": f"{type(error).__name__}: {error}"[:300]}
            judged = ["outputs"] if case.name.startswith("imm") and precision != "fp32" else ["outputs", "loss"]
            if "error" in rows[precision] or not all(rows[precision][what] <= LIMITS[precision] for what in judged):
                failed.append(f"{case.name}, {precision}: {rows[precision]}")
        found[case.name] = rows
    return {"cases": found, "limits": LIMITS, "failed": failed}


def different_masks(device: str) -> list[str]:
    """IMM's two passes may be in different precisions, and their dropout masks must be the same."""
    failed, layer = [], Dropout(0.3)
    for shape in ((4, 64, 16, 16), (3, 5, 7, 7), (2, 257, 66)):
        masks = []
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            torch.manual_seed(7)
            masks.append(layer(torch.ones(shape, dtype=dtype, device=device)) == 0)
        if not 0 < masks[0].float().mean() < 1 or not all(torch.equal(mask, masks[0]) for mask in masks):
            failed.append(f"dropout of {shape}: masks depend on the precision")
    return failed


@dataclass
class Found:
    """Of one network that is trained, on the CPU, float64."""

    outputs: torch.Tensor  # of its first evaluation
    loss: float
    gradient: torch.Tensor


def loss_and_gradient(case: Case, device: str, precision: str) -> dict[str, Found]:
    """By the name of the part, of the same weights and batch."""
    trainer: Trainer = case.make(device, precision, BATCH)
    found = {}
    for network in trainer.networks.values():
        scramble(network)
    for name, part in trainer.task.trained.items():
        objective, _ = trainer._prepared[name]
        if part.prepare is not None:
            part.prepare(lambda: trainer._batches(0))
        batch, outputs = next(iter(trainer._batches(0))), []
        hook = part.network.register_forward_hook(lambda module, inputs, output: outputs.append(output.detach().double().cpu()))
        # A run's scaler begins as high and halves until nothing overflows
        for scale in [2.0**10, 2.0**5, 1.0] if precision == "fp16" else [1.0]:
            loss, _ = objective(batch)
            (loss * scale).backward()
            gradients = [p.grad.double().flatten().cpu() / scale for p in part.network.parameters() if p.grad is not None]
            part.network.zero_grad(set_to_none=True)
            if torch.isfinite(torch.cat(gradients)).all():
                break
        hook.remove()
        found[name] = Found(outputs[0], loss.item(), torch.cat(gradients))
    gc.collect()
    return found


def compared(found: dict[str, Found], reference: dict[str, Found]) -> dict[str, float]:
    """The largest relative errors over the networks."""
    pairs = [(found[name], true) for name, true in reference.items()]
    return {
        "outputs": max(_apart(own.outputs, true.outputs) for own, true in pairs),
        "loss": max(abs(own.loss - true.loss) / max(abs(true.loss), 1e-12) for own, true in pairs),
        "gradient": max(_apart(own.gradient, true.gradient) for own, true in pairs),
    }


def _apart(value: torch.Tensor, true: torch.Tensor) -> float:
    return ((value - true).norm() / true.norm().clamp(min=1e-12)).item()
