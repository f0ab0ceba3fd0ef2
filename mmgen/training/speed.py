"""How much of a device a training uses: its arithmetic a second, as the networks' formulas count it, and the device's own rate."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from ..models.config import ModelConfig
from .cost import Work, forward_flops

_SIDE = {"cuda": 8192, "cpu": 512}  # of the matrices that are multiplied


class Speed:
    """`numbers(images_per_second)` for the log; the network's arithmetic is counted when it is first asked for.

    What gradient checkpointing computes again is not counted (PaLM, arXiv:2204.02311, appendix B: model FLOPs utilization).
    """

    def __init__(self, model_config: ModelConfig, work: Work | None, device: torch.device, precision: str, processes: int) -> None:
        """work: of a step of the method; None: unknown, and nothing is logged."""
        self.model_config, self.work, self.device, self.precision = model_config, work, device, precision
        self.processes = processes
        self._found: tuple[float, float | None] | None = None

    def numbers(self, images_per_second: float) -> dict[str, float]:
        """Of all devices: their FLOP/s; on GPUs also the share of the rate at which they multiply matrices of this precision."""
        if self.work is None:
            return {}
        if self._found is None:
            flops = (self.work.forward + self.work.back * self.work.backward) * forward_flops(self.model_config)
            self._found = flops, matrix_rate(self.device, self.precision) if self.device.type == "cuda" else None
        flops, peak = self._found
        found = {"flops_per_second": _short(flops * images_per_second)}
        if peak:
            found["mfu"] = _short(flops * images_per_second / self.processes / peak)
        return found


def _short(number: float) -> float:
    """With three digits."""
    return float(f"{number:.3g}")


def matrix_rate(device: torch.device, precision: str, seconds: float = 0.1) -> float | None:
    """FLOP/s of large square matrix products on this device, the best of some; None where there is no memory for them."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    side, best, started = _SIDE[device.type], math.inf, time.perf_counter()
    try:
        a = torch.ones(side, side, device=device, dtype=dtype)
        out = torch.empty_like(a)
        while best == math.inf or time.perf_counter() - started < seconds:
            before = time.perf_counter()
            torch.mm(a, a, out=out)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - before)
    except torch.OutOfMemoryError:
        return None
    return 2 * side**3 / best


def duration(seconds: float) -> str:
    """In words: 40 seconds, 3.2 hours, 12 days."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.2g} {unit}" if seconds < 100 * length else f"{seconds / length:,.0f} {unit}"
    return f"{seconds:.2g} seconds"


def time_steps(trainer: Any, seconds: float) -> float:
    """Seconds of a step of a trainer, from steps with one accumulation step and with two, so that all of a long step need not run.

    seconds: how long to measure, about. Where a single accumulation step takes half as long, two are made, and the optimiser's time is neglected.
    """
    rounds = trainer.split.rounds
    one = _seconds_of_a_step(trainer, 1, seconds / 2)
    if rounds == 1 or one > seconds / 2:
        return one * rounds
    return one + (rounds - 1) * max(0.0, _seconds_of_a_step(trainer, 2, seconds / 2) - one)


def _seconds_of_a_step(trainer: Any, rounds: int, seconds: float) -> float:
    """The mean over whole turns of a method's networks, after one turn that does not count."""
    from dataclasses import replace

    kept, trainer.split = trainer.split, replace(trainer.split, rounds=rounds)
    turns, found, started = len(trainer.task.trained), [], time.perf_counter()
    while len(found) < 2 or time.perf_counter() - started < seconds and len(found) < 20:
        before = time.perf_counter()
        for _ in range(turns):
            trainer._step()
        if trainer.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        found.append((time.perf_counter() - before) / turns)
    trainer.split = kept
    return sum(found[1:]) / len(found[1:])
