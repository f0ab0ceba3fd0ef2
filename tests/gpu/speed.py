"""Images a second and peak memory of a step of every preset: side by side with the plain reference, as a share of the card's
matrix rate, and against what `--dry-run` says.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from mmgen.training.cost import Work, estimate

from ..benchmarks.imm_step import plain_steps
from .cases import Case, imm_case
from .presets import preset_cases

SECONDS = 2.0  # of each measurement
HALF = {"train.frozen_precision": "half"}
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "tf32": ("tf32", {}), "bf16": ("bf16", {}), "bf16, frozen too": ("bf16", HALF),
    "compiled": ("bf16", {**HALF, "run.compile": True}),
}  # fmt: skip


def ways_of(case: Case) -> dict[str, tuple[str, dict[str, Any]]]:
    """A teacher has no frozen network."""
    if not case.name.endswith("-teacher"):
        return WAYS
    return {"tf32": WAYS["tf32"], "bf16": WAYS["bf16"], "compiled": ("bf16", {"run.compile": True})}


def matrix_rate(device: str, dtype: torch.dtype, side: int = 8192) -> float:
    """FLOP/s of square matrix products of random numbers."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / least(lambda: a @ b, device, 10)


def least(run: Callable[[], Any], device: str, count: int) -> float:
    """The least seconds of `count` runs after three that do not count."""
    found = []
    for number in range(count + 3):
        synchronise(device)
        start = time.perf_counter()
        run()
        synchronise(device)
        if number >= 3:
            found.append(time.perf_counter() - start)
    return min(found)


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def rate(step: Callable[[], Any], images: int, device: str, seconds: float = SECONDS) -> float:
    """Images a second of a step, after three that do not count; several between two looks at the clock, as in a run."""
    for _ in range(3):
        step()
    synchronise(device)
    start, steps = time.perf_counter(), 0
    while time.perf_counter() - start < seconds or steps < 3:
        step()
        steps += 1
        if steps % 4 == 0:
            synchronise(device)
    synchronise(device)
    return steps * images / (time.perf_counter() - start)


def presets(
    device: str, small: bool, names: Sequence[str] = ("",), before: dict[str, Any] = {}, keep: Callable[[dict[str, Any]], None] = lambda found: None
) -> dict[str, Any]:
    """{preset: {way: {"rate": images/s, "share": of the matrix rate, "computed" and "measured": GiB}}}; `plain`: the textbook's.

    keep: is given all there is after each measurement; before: what it was given when the report was cut off. The measurement in which that
    happened is not tried again.
    """
    peak = matrix_rate(device, torch.bfloat16) if device == "cuda" else None
    seconds = 0.1 if small else SECONDS
    rows, failed = before.get("presets", {}), before.get("failed", [])
    if cut_off := before.get("begun"):
        failed.append(f"{cut_off}: it did not end")

    def measure(row: dict[str, Any], name: str, what: str, run: Callable[[], Any]) -> None:
        """Into row[what], unless it is there or was cut off."""
        if what in row or any(text.startswith(f"{name}:") for text in failed):
            return
        keep({"presets": rows, "matrix_rate_bf16": peak, "failed": failed, "begun": name})
        try:
            row[what] = run()
        except Exception as error:  # noqa: BLE001 a report says what fails and goes on
            failed.append(f"{name}: {type(error).__name__}: {error}"[:400])
        release(device)
        keep({"presets": rows, "matrix_rate_bf16": peak, "failed": failed})

    chosen = [row for row in preset_cases(small) if any(name in row[0].name for name in names)]
    for case, work, batch in chosen:
        row = rows.setdefault(case.name, {"batch": batch, "ways": {}})
        for way in list(WAYS)[:1] if small else ways_of(case):
            run = partial(measured, case, work, batch, device, way, seconds, peak)
            measure(row["ways"], f"{case.name}, {way}", way, run)
        if "imm" in case.name and (small or "-imm-" not in case.name or case.name.endswith("-b")):
            measure(row, f"{case.name}, plain", "plain", lambda: rate(plain(case, device, batch), batch, device, seconds))  # noqa: B023
        print(case.name, row, flush=True)
    return {"presets": rows, "matrix_rate_bf16": peak, "failed": failed}


def measured(
    case: Case, work: Work, batch: int, device: str, way: str, seconds: float, peak: float | None
) -> dict[str, Any]:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    precision, changes = ways_of(case)[way]
    trainer = case.make(device, precision, batch, **changes)
    cost = estimate(trainer.train, trainer.task.model_config, trainer.split, work)
    found: dict[str, Any] = {"rate": rate(trainer._step, batch, device, seconds), "computed": cost.total / 2**30}
    trainer.metrics.flush()
    if device == "cuda":
        found["measured"] = torch.cuda.max_memory_allocated() / 2**30
    if peak:
        found["share"] = found["rate"] * cost.flops_per_step / batch / peak
    return found


def plain(case: Case, device: str, batch: int) -> Callable[[], Any]:
    """The textbook's step of IMM on the same data; `tests/benchmarks/plain_imm.py`."""
    trainer = case.make(device, "tf32", batch)
    return plain_steps(trainer, trainer.task.trained["model"].objective.config, 1)


def release(device: str) -> None:
    gc.collect()
    torch._dynamo.reset()
    if device == "cuda":
        torch.cuda.empty_cache()


def profile(device: str, small: bool) -> dict[str, Any]:
    """Where a step of `cifar10-imm` spends its time: kernels by share, how many there are, and copies between devices."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    changes = {"network.model_channels": 8, "network.num_blocks": 1} if small else {}
    trainer = imm_case("cifar10-imm", **changes).make(device, "tf32" if small else "bf16", 4 if small else 256)
    for _ in range(3):
        trainer._step()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profiler(activities=activities) as recorded:
        trainer._step()
        synchronise(device)
    events = recorded.key_averages()
    time_of = (lambda e: e.self_device_time_total) if device == "cuda" else (lambda e: e.self_cpu_time_total)
    total = sum(map(time_of, events)) or 1
    top = sorted(events, key=time_of, reverse=True)[:20]
    return {
        "kernels": sum(e.count for e in events if e.self_device_time_total > 0) if device == "cuda" else None,
        "copies": {e.key: e.count for e in events if "Memcpy" in e.key or "item" in e.key or "synchronize" in e.key.lower()},
        "top": [{"name": e.key[:80], "share": time_of(e) / total, "count": e.count} for e in top],
        "milliseconds": total / 1e3,
        "failed": [],
    }
