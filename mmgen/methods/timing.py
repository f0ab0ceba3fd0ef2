"""How long a run will take on this device: a few of its steps are made, in a folder that is thrown away."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from ..errors import MmgenError
from ..training.auto_batch import free_memory
from ..training.compute import set_precision
from ..training.cost import Cost
from ..training.loop import Trainer
from ..training.run_folder import RunFolder
from ..training.speed import duration, matrix_rate, time_steps
from ..training.start import make_accelerator
from ..training.task import Reporter
from .method import Method
from .run import prepare

MOST_SECONDS = 20.0  # of a single pass that is still tried
CPU_PASS = 0.25  # seconds of a pass on a CPU by its matrix rate: there an image takes as long in small passes as in large ones
TIMED_SECONDS = 4.0  # of all steps together, where a step is shorter than that


def time_of_run(method: Method, config: Any, cost: Cost, images_per_pass: int, device: str = "auto") -> str:
    """One line: the time of the whole run, or why it was not measured and how long it takes at the very least."""
    train = config.train
    steps = train.max_images / train.batch_size
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return "not timed with several processes: ask for it with one"
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, eval_num=0, log_with=()))
    with tempfile.TemporaryDirectory() as folder:
        accelerator = make_accelerator(config.train, config.run, Path(folder), device)
        device = accelerator.device
        set_precision(train.precision)
        rate = matrix_rate(device, train.precision)
        if rate is not None:
            least = f"at least {duration(cost.flops_per_step * steps / rate)} on {device}, by its matrix rate of {rate / 1e12:.3g} TFLOP/s"
            group, image = method.training().work(config)[1], cost.flops_per_step / train.batch_size / rate
            if device.type == "cpu" and image * images_per_pass > CPU_PASS:
                images_per_pass = max(group, int(CPU_PASS / image) // group * group)
                config = dataclasses.replace(config, run=dataclasses.replace(config.run, batch_per_device=images_per_pass))
            seconds = image * images_per_pass
            if seconds > MOST_SECONDS:
                return f"{least}; not timed, as one pass takes {duration(seconds)} or more"
            if cost.total > free_memory(device):
                return f"{least}; not timed, as a pass does not fit into its memory"
        try:
            settled, dataset, make_task = prepare(method, config, Reporter(), accelerator)
            trainer = Trainer(
                make_task, dataset, RunFolder(Path(folder)), Reporter(), accelerator, train=settled.train, optimizer=settled.optimizer,
                run=settled.run, config=settled.to_dict(),
            )  # fmt: skip
            each = time_steps(trainer, TIMED_SECONDS)
        except (MmgenError, torch.OutOfMemoryError) as error:
            return f"not timed: {error}"
    return f"about {duration(each * steps)} on {device}: {each:.3g} s a step, scores and previews not counted"
