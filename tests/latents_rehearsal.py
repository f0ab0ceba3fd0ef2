"""A training on latents of ImageNet's 1,281,167 rows rehearsed: tiny latents, the real order, batches, checkpoints and resuming.

    python -m tests.latents_rehearsal [ROWS]

Prints, for each tenth of the first epoch and for the second, the CPU time of reading a batch and of a step, and the process's memory: none may
grow. CPU time, because others on the machine add to the time by the clock.
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
    """(CPU milliseconds of a batch, memory in MiB), in each tenth of an epoch, and then of a little more. Raises AssertionError."""
    seen, process = np.zeros(len(dataset), np.uint8), psutil.Process()
    count = -(-len(dataset) // BATCH)
    tenths: list[list[float]] = [[] for _ in range(11)]
    memory = [0.0] * 11
    for number in range(count + 2):
        start = time.process_time()
        batch = fetch(dataset, number * BATCH, BATCH, 0, torch.device("cpu"))
        tenths[min(number * 10 // count, 10)].append(1e3 * (time.process_time() - start))
        rows = batch.images[:, 0, 0, 0].long().numpy()
        assert (rows % 1000 == batch.condition.classes.numpy()).all(), "images and labels are apart"
        np.add.at(seen, rows[: max(0, len(dataset) - number * BATCH)], 1)
        info = process.memory_info()
        memory[min(number * 10 // count, 10)] = (info.rss - info.shared) / 2**20
    assert (seen == 1).all(), "an epoch has every row once"
    return [float(np.median(found)) for found in tenths if found], [most for most in memory if most]


def steps(trainer: Trainer, at: int, count: int = 8) -> float:
    """CPU milliseconds of a step from image number `at` on, the least of `count`."""
    trainer.progress.images, found = at // 64 * 64, []
    for _ in range(count):
        start = time.process_time()
        trainer._step()
        found.append(1e3 * (time.process_time() - start))
    return min(found)


def rehearse(rows: int, folder: Path) -> dict[str, list[float]]:
    """All that is printed: a figure for each tenth of the epoch, then one of the second epoch."""
    (folder / "shards").mkdir(parents=True)
    dataset = write_latents(folder / "shards", rows)
    trainer = make_trainer(dataset, folder / "run")
    steps(trainer, 0)  # to warm up
    taken = [steps(trainer, rows * tenth // 10) for tenth in range(11)]
    trainer._save()
    kept = {key: value.clone() for key, value in trainer.network.state_dict().items()}
    again = make_trainer(dataset, folder / "run")
    again._resume()
    assert again.progress.images == trainer.progress.images
    assert all(torch.equal(value, kept[key]) for key, value in again.network.state_dict().items())
    for one in trainer, again:
        one._step()  # the next batch, too
    assert all(torch.equal(a, b) for a, b in zip(trainer.network.parameters(), again.network.parameters(), strict=True))
    read, memory = walk(dataset)
    return {"a step, ms": taken, f"a batch of {BATCH:,}, ms": read, "memory, MiB": memory}


def main() -> None:
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else ROWS
    with tempfile.TemporaryDirectory() as place:
        print(f"{rows:,} rows; tenths of the first epoch, then the second")
        for name, values in rehearse(rows, Path(place)).items():
            print(f"{name:24}" + "".join(f"{value:9,.3g}" if value < 100 else f"{value:9,.0f}" for value in values))
    print(f"memory at most, MiB     {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:9,.0f}")


if __name__ == "__main__":
    main()
