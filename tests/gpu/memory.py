"""Peak memory of a step against what `--dry-run` says, for every preset that fits."""

from __future__ import annotations

import gc
from typing import Any

import torch

from mmgen.training.cost import ALTERNATING, DENOISING, IMM, INSTANT, Work, estimate

from .cases import Case, distill_case, imm_case, teacher_case

SMALL = {"network.model_channels": 8, "network.num_blocks": 1}
RATE = 0.5  # images in a pass: of what the preset has, to begin with


def preset_cases(small: bool) -> list[tuple[Case, Work, int]]:
    """(case, its work, images in a pass) of the presets of each kind, a few of which are enough on a CPU."""
    if small:
        return [(imm_case("cifar10-imm", **SMALL), IMM, 4), (teacher_case("cifar10-teacher", **SMALL), DENOISING, 4)]
    noise = {"data.name": "noise", "data.resolution": 64, "data.channels": 3, "data.num_classes": 1000}
    return [
        (imm_case("digits-imm", **{"data.name": "noise", "data.resolution": 8, "data.channels": 1, "data.num_classes": 10}), IMM, 128),
        (imm_case("cifar10-imm"), IMM, 256),
        *((imm_case(f"imagenet256-imm-{size}"), IMM, batch) for size, batch in (("s", 256), ("b", 128), ("l", 64), ("xl", 64))),
        (teacher_case("cifar10-teacher"), DENOISING, 256),
        (teacher_case("imagenet64-teacher", **noise), DENOISING, 64),
        (distill_case("cifar10-distill", "cifar10-teacher"), ALTERNATING, 128),
        (distill_case("cifar10-distill", "cifar10-teacher", "instant"), INSTANT, 128),
        (distill_case("imagenet64-distill", "imagenet64-teacher", teacher=noise), ALTERNATING, 32),
    ]  # fmt: skip


def memory(device: str, small: bool) -> dict[str, Any]:
    """{preset: {"computed": GiB, "measured": GiB or None, "batch": images in a pass}}."""
    rows = {}
    for case, work, batch in preset_cases(small):
        for precision in ("tf32",) if small else ("tf32", "bf16"):
            name = f"{case.name}, {precision}"
            try:
                rows[name] = one(case, work, batch, device, precision)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                rows[name] = {"batch": batch, "error": str(error)[:200]}
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
    return {"presets": rows, "failed": [f"{name}: {row['error']}" for name, row in rows.items() if "error" in row]}


def one(case: Case, work: Work, batch: int, device: str, precision: str) -> dict[str, Any]:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer = case.make(device, precision, batch)
    turns = len(trainer.task.parts)
    for _ in range(2 * turns):  # the second has the optimiser's states
        trainer._step()
    trainer.numbers.flush()
    computed = estimate(trainer.train, trainer.task.model_config, trainer.parts, work).total
    measured = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
    return {"batch": batch, "computed": computed / 2**30, "measured": measured}
