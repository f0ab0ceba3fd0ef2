"""mmgen's own Trainer, ready for single steps: of a preset, on images or latents made of noise, in a temporary folder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from accelerate.state import AcceleratorState

from mmgen.config import sections as configs
from mmgen import data
from mmgen.data import Dataset
from mmgen.data.latents import LatentDataset, Rows
from mmgen.config.imm import ImmConfig, resolve
from mmgen.models.latents import LatentSettings
from mmgen.methods.imm.objective import imm_model_config, imm_task
from mmgen.training.loop import Trainer
from mmgen.training.run_folder import RunFolder
from mmgen.training.start import make_accelerator
from mmgen.training.task import Reporter, Task

from .measuring import temporary_folder

IMAGES = 256  # of a data set made of noise


def noise_images(resolution: int) -> Dataset:
    images = np.random.default_rng(0).integers(0, 256, (IMAGES, 3, resolution, resolution), dtype=np.uint8)
    return Dataset("noise", images, None, None, "noise", "noise")


def noise_latents(classes: int) -> LatentDataset:
    """Of 32 x 32 x 4."""
    random = np.random.default_rng(0)
    moments = random.standard_normal((IMAGES, 8, 32, 32)).astype(np.float32)
    moments[:, 4:] = 0.1
    latents = LatentSettings(vae="none", vae_sha256="", mean=(0.0,) * 4, std=(1.0,) * 4)
    labels = random.integers(0, classes, IMAGES)
    labels[0] = classes - 1
    return LatentDataset("noise", Rows([moments]), labels, None, "noise", "noise", latents, "noise")


def trainer(config: Any, dataset: Any, make_task: Callable[[Any], Task], device: str) -> Trainer:
    """`trainer(...)._step()` is one step of the run."""
    AcceleratorState._reset_state(reset_partial_state=True)  # each may have a precision of its own
    folder = temporary_folder()
    accelerator = make_accelerator(config.train, config.run, folder, device)
    return Trainer(
        make_task, dataset, RunFolder(folder), Reporter(), accelerator, train=config.train, optimizer=config.optimizer,
        run=config.run, config=config.to_dict(),
    )  # fmt: skip


def imm_config(preset: str, **changes: Any) -> ImmConfig:
    """A preset with a clipped gradient, measured nowhere."""
    fixed = {"optimizer.grad_clip": 1.0, "run.eval_num": 0, "train.precision": "tf32"}
    return resolve(configs.read_preset(preset, "train-imm"), configs.nest({**fixed, **changes}, ImmConfig))


def imm_trainer(config: ImmConfig, device: str) -> Trainer:
    if config.network.kind == "dit":
        dataset = noise_latents(config.data.num_classes)
    else:
        dataset = data.load("digits") if config.data.name == "digits" else noise_images(config.data.resolution)
    model_config = imm_model_config(config, dataset.shape)
    return trainer(config, dataset, lambda accelerator: imm_task(config, model_config), device)
