"""How cost grows: time per image with the batch, and the share of the kernels in a step with the number of particles M."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import psutil
import torch

from mmgen.losses.imm import imm_loss

from .imm_step import changes_for
from .measuring import Row, Size, in_turns, seconds
from .plain_imm import kernel
from .runs import imm_config, imm_trainer

LIMIT = 2 * 2**30  # bytes of memory that the largest batch may take
LARGEST = {"tiny": {"digits-imm": 32}, "quick": {"digits-imm": 8192, "cifar10-imm": 128}, "full": {"cifar10-imm": 64}}  # batches


def rows(size: Size, device: str) -> Iterator[Row]:
    for preset, most in LARGEST[size].items():
        yield from batches(preset, most, size, device)
    yield from particles(size, device)


def batches(preset: str, most: int, size: Size, device: str) -> Iterator[Row]:
    """Milliseconds per image of the whole step, each time the batch is doubled; beside it those of batch 16."""
    batch, first = 16, None
    while batch <= most:
        changes = {**changes_for(preset, size, "cpu"), "train.batch_size": batch, "run.batch_per_device": batch}
        before = used(device)
        trainer = imm_trainer(imm_config(preset, **changes), device)
        trainer._step()
        took = used(device) - before
        repetitions = max(1, 256 // batch) if size == "quick" and preset == "digits-imm" else 1
        found = min(seconds(trainer._step) for _ in range(repetitions + 1)) * 1000 / batch
        first = found if first is None else first
        yield Row(f"step per image, {preset}, batch {batch}", "ms", found, first, first / found, took / 2**20)
        if 2 * took > LIMIT:
            return
        batch *= 2


def used(device: str) -> float:
    """Bytes: the most that the GPU has held, or that this process holds now."""
    return float(torch.cuda.max_memory_allocated()) if device == "cuda" else float(psutil.Process().memory_info().rss)


def particles(size: Size, device: str) -> Iterator[Row]:
    """Milliseconds of the loss alone, forward and back, for M particles a group; beside it the textbook's three kernels."""
    preset, batch = "digits-imm", 16 if size == "tiny" else 128
    for m in (4, 8) if size == "tiny" else (4, 8, 16, 32, 64):
        config = imm_config(preset, **{**changes_for(preset, size, "cpu"), "train.batch_size": batch, "loss.group_size": m})
        trainer = imm_trainer(config, device)
        shape = (batch, trainer.task.model_config.channels, *[trainer.task.model_config.resolution] * 2)
        y_r = torch.randn(shape, device=device)
        difference = (1e-3 * torch.randn(shape, device=device)).requires_grad_()
        t = torch.linspace(0.3, 0.9, batch // m, dtype=torch.float64, device=device)
        settings = replace(config.loss, group_size=m)

        def ours() -> None:
            loss = imm_loss(settings, config.flow, t / 2, t - 0.01, t, difference, y_r).mean()
            torch.autograd.grad(loss, difference)

        def plain() -> None:
            flat_r = y_r.double().reshape(batch // m, m, -1)
            flat_t = flat_r + difference.double().reshape(batch // m, m, -1)
            near = torch.ones_like(t)
            mmd = kernel(flat_t, flat_t, near) + kernel(flat_r, flat_r, near) - 2 * kernel(flat_t, flat_r, near)
            torch.autograd.grad(mmd.mean(), difference)

        least = in_turns({"ours": ours, "plain": plain, "step": trainer._step}, 1 if size == "tiny" else 5)
        found, textbook, step = (1000 * least[name] for name in ("ours", "plain", "step"))
        note = f"{found / step:.1%} of the step"
        yield Row(f"kernels of M = {m}, batch {batch}, {preset}", "ms", found, textbook, textbook / found, note=note)
