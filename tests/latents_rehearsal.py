"""A training on latents of ImageNet's 1,281,167 rows rehearsed: tiny latents, the real order, batches, checkpoints and resuming.

    python -m tests.latents_rehearsal [ROWS]

Prints what reading a batch and a step take, and the process's memory, at the beginning and the end of the first epoch and in the second.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch

from mmgen.config import imm as imm_config
from mmgen.config.sections import nest, read_preset
from mmgen.data.latents import LatentDataset, Rows
from mmgen.methods.imm.objective import imm_model_config, imm_task
from mmgen.models.latents import LatentSettings
from mmgen.training.batches import fetch
from mmgen.training.loop import Trainer
from mmgen.training.run_folder import RunFolder
from mmgen.training.start import make_accelerator
from mmgen.training.task import Reporter

ROWS, SHARD, BATCH = 1_281_167, 10_000, 4096
SIZE, CHANNELS = 2, 4


def write_latents(folder: Path, rows: int) -> LatentDataset:
    """Shards as `mmgen cache-latents` writes them, mapped into memory; the first mean of row i is i, and its label i % 1000."""
    random, arrays = np.random.default_rng(0), []
    for start in range(0, rows, SHARD):
        count = min(SHARD, rows - start)
        moments = random.standard_normal((count, 2 * CHANNELS, SIZE, SIZE), np.float32)
        moments[:, 0, 0, 0] = np.arange(start, start + count)
        np.save(folder / f"{start // SHARD:06d}.npy", moments)
        arrays.append(np.load(folder / f"{start // SHARD:06d}.npy", mmap_mode="r"))
    latents = LatentSettings(vae="none", vae_sha256="", mean=(0.0,) * CHANNELS, std=(1.0,) * CHANNELS)
    labels = np.arange(rows) % 1000
    return LatentDataset("rehearsal", Rows(arrays), labels, None, "rehearsal", "rehearsal", latents, "rehearsal", path=str(folder))


def make_trainer(dataset: LatentDataset, folder: Path) -> Trainer:
    changes = {
        "network.hidden_size": 16, "network.depth": 1, "network.num_heads": 2, "network.patch_size": 2, "data.resolution": SIZE,
        "data.num_classes": None, "train.batch_size": 64, "train.precision": "fp32", "run.eval_num": 0, "run.batch_per_device": 64,
        "run.preview_every": 10**12, "train.max_images": 10**9,
    }  # fmt: skip
    config = imm_config.resolve(read_preset("imagenet256-imm-s", "train-imm"), nest(changes, imm_config.ImmConfig))
    model_config = imm_model_config(config, dataset.shape)
    accelerator = make_accelerator(config.train, config.run, folder, "cpu")
    run = RunFolder(folder)
    run.open("train-imm", config.to_dict(), dataset)
    return Trainer(
        lambda accelerator: imm_task(config, model_config), dataset, run, Reporter(), accelerator, train=config.train,
        optimizer=config.optimizer, run=config.run, config=config.to_dict(),
    )  # fmt: skip


def walk(dataset: LatentDataset) -> tuple[list[float], list[int]]:
    """(seconds of each batch, memory in bytes after each tenth) of an epoch and a little more. Raises AssertionError."""
    seen, seconds, memory, process = np.zeros(len(dataset), np.uint8), [], [], psutil.Process()
    count = -(-len(dataset) // BATCH)
    for number in range(count + 2):
        start = time.perf_counter()
        batch = fetch(dataset, number * BATCH, BATCH, 0, torch.device("cpu"))
        seconds.append(time.perf_counter() - start)
        rows = batch.images[:, 0, 0, 0].long().numpy()
        assert (rows % 1000 == batch.condition.classes.numpy()).all(), "images and labels are apart"
        np.add.at(seen, rows[: max(0, len(dataset) - number * BATCH)], 1)
        if number * 10 // count > len(memory) - 1:
            memory.append(process.memory_info().rss - process.memory_info().shared)
    assert (seen == 1).all(), "an epoch has every row once"
    return seconds, memory


def steps(trainer: Trainer, at: int, count: int = 8) -> float:
    """Seconds of a step from image number `at` on, the least of `count`."""
    trainer.progress.images, found = at // 64 * 64, []
    for _ in range(count):
        start = time.perf_counter()
        trainer._step()
        found.append(time.perf_counter() - start)
    return min(found)


def rehearse(rows: int, folder: Path) -> dict[str, float]:
    """All that is printed, in seconds and MiB."""
    (folder / "shards").mkdir(parents=True)
    dataset = write_latents(folder / "shards", rows)
    trainer = make_trainer(dataset, folder / "run")
    first, last = steps(trainer, 0), steps(trainer, rows - 640)
    trainer._save()
    kept = {key: value.clone() for key, value in trainer.network.state_dict().items()}
    again = make_trainer(dataset, folder / "run")
    again._resume()
    assert again.progress.images == trainer.progress.images
    assert all(torch.equal(value, kept[key]) for key, value in again.network.state_dict().items())
    for one in trainer, again:
        one._step()  # the next batch, too
    assert all(torch.equal(a, b) for a, b in zip(trainer.network.parameters(), again.network.parameters(), strict=True))
    seconds, memory = walk(dataset)
    tenth = max(1, len(seconds) // 10)
    return {
        "rows": rows, "batch, first tenth": float(np.median(seconds[:tenth])), "batch, last tenth": float(np.median(seconds[-tenth:])),
        "step, first epoch": first, "step, end of the epoch": last, "step, second epoch": steps(trainer, rows + 6400),
        "memory, first tenth": memory[1] / 2**20, "memory, at the end": memory[-1] / 2**20,
        "memory at most": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
    }  # fmt: skip


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        for name, value in rehearse(int(sys.argv[1]) if len(sys.argv) > 1 else ROWS, Path(place)).items():
            print(f"{name:24}{value:,.4g}" if name != "rows" else f"{name:24}{value:,}")


if __name__ == "__main__":
    main()
