"""The device against the CPU: loss and gradient of every method with every network, in every precision; golden arrays."""

from __future__ import annotations

import gc
from typing import Any

import torch

from mmgen.training.loop import Trainer

from .cases import Case, scramble, tiny_cases

BATCH = 16
# Relative errors of the loss that its precision explains: float32 sums in another order; TF32 and half precision keep 10, 7 (bf16)
# and 10 (fp16) bits of each factor, and the tiny networks are some ten layers deep
LIMITS = {"fp32": 2e-5, "tf32": 1e-2, "bf16": 6e-2, "fp16": 1e-2}


def precisions(device: str) -> list[str]:
    return list(LIMITS) if device == "cuda" else ["fp32"]


def numerics(device: str, small: bool) -> dict[str, Any]:
    """{case: {precision: {"loss": relative error, "gradient": relative error of the whole gradient}}}, and `failed`."""
    found, failed = {}, []
    for case in tiny_cases():
        reference = loss_and_gradient(case, "cpu", "fp32")
        rows = {}
        for precision in precisions(device):
            try:
                rows[precision] = compared(loss_and_gradient(case, device, precision), reference)
            except Exception as error:  # noqa: BLE001 a report says what fails and goes on
                rows[precision] = {"error": f"{type(error).__name__}: {error}"[:300]}
            if "error" in rows[precision] or not rows[precision]["loss"] <= LIMITS[precision]:
                failed.append(f"{case.name}, {precision}: {rows[precision]}")
        found[case.name] = rows
    return {"cases": found, "limits": LIMITS, "failed": failed}


def loss_and_gradient(case: Case, device: str, precision: str) -> dict[str, tuple[float, torch.Tensor]]:
    """Of each network that is trained: the loss and the gradient, float64 on the CPU, of the same weights and batch."""
    trainer: Trainer = case.make(device, precision, BATCH)
    found = {}
    for network in trainer.networks.values():
        scramble(network)
    for name, part in trainer.task.parts.items():
        objective, _ = trainer._prepared[name]
        if part.prepare is not None:
            part.prepare(lambda: trainer._batches(0))
        batch = next(iter(trainer._batches(0)))
        scale = 2.0**10 if precision == "fp16" else 1.0
        loss, _ = objective(batch)
        (loss * scale).backward()
        gradients = [p.grad.double().flatten().cpu() / scale for p in part.network.parameters() if p.grad is not None]
        found[name] = loss.item(), torch.cat(gradients)
        part.network.zero_grad(set_to_none=True)
    gc.collect()
    return found


def compared(found: dict, reference: dict) -> dict[str, float]:
    """The largest relative errors over the networks."""
    loss = max(abs(found[name][0] - value) / max(abs(value), 1e-12) for name, (value, _) in reference.items())
    gradient = max(((found[name][1] - g).norm() / g.norm().clamp(min=1e-12)).item() for name, (_, g) in reference.items())
    return {"loss": loss, "gradient": gradient}
