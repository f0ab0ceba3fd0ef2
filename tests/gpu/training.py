"""A timed training of `cifar10-imm` at reduced width, with its curve: what a person gets in the minutes that are left."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..benchmarks.measuring import temporary_folder
from .runs import command

NARROW = ["network.model_channels=64", "train.batch_size=512", "optimizer.lr=4e-4", "train.ema_betas=[0.999]",
          "run.batch_per_device=512", "run.log_every=50"]  # fmt: skip
TINY = ["network.model_channels=8", "network.num_blocks=1", "network.attn_resolutions=[8]", "data.resolution=8", "run.eval_steps=[1]",
        "train.batch_size=16", "run.batch_per_device=16", "run.log_every=1"]  # fmt: skip


def training(device: str, small: bool, seconds: float, out: Path, data: str | None, features: str = "auto") -> dict[str, Any]:
    """Trains for `seconds` on `data` (CIFAR-10, or noise where there is none) and keeps the pictures in `out`."""
    folder = temporary_folder()
    if data is None:
        data, size = str(images(folder / "noise", 64 if small else 2000)), "noise"
    else:
        size = "cifar10"
    every = 64 if small else 512 * 400
    settings = [*(TINY if small else NARROW), "train.precision=tf32" if small else "train.precision=bf16",
                f"run.preview_every={every}", f"run.eval_every={every}", f"run.checkpoint_every={every}"]  # fmt: skip
    arguments = [part for setting in settings for part in ("--set", setting)]
    if small:
        arguments += ["--max-images", "128", "--eval-num", "32"]
    run = folder / "run"
    done = command(
        "-m", "mmgen", "train-imm", "--preset", "cifar10-imm", "--data", data, "--device", device, "--out", str(run),
        "--max-time", f"{int(seconds)}s", "--set", f"run.eval_features={features}", *arguments,
        cwd=folder, device=device, seconds=seconds + 240,
    )  # fmt: skip
    for name in ("curves.png", "samples.png", "log.jsonl", "results.json"):
        if (run / name).is_file():
            shutil.copy(run / name, out / f"training-{name}")
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] if (run / "log.jsonl").is_file() else []
    curve = [{"images": line["images"], "values": line["values"]} for line in lines if "values" in line]
    rates = [line["images_per_second"] for line in lines if "images_per_second" in line]
    failed = [] if done.returncode == 0 else [done.stderr[-800:]]
    return {"data": size, "images": lines[-1]["images"] if lines else 0, "curve": curve, "failed": failed,
            "images_per_second": sorted(rates)[len(rates) // 2] if rates else None}  # fmt: skip


def images(folder: Path, count: int) -> Path:
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{number:05d}.png")
    return folder
