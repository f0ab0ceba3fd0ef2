"""From a method and its settings to a run: the one body of all trainings."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..training.initial import read_initial
from ..training.start import DataProgress, load_shared, make_accelerator, run_training, with_texts
from ..training.task import Outcome, Reporter, Task
from .method import Method, Start


def prepare(
    method: Method, config: Any, reporter: Reporter, accelerator: Any, data_progress: DataProgress = contextlib.nullcontext
) -> tuple[Any, Any, Callable[[Any], Task]]:
    """The config settled by the source, the data, and what makes the method's task, which knows what a step costs."""
    training = method.training()
    source, settled = training.find(config, accelerator.device)
    dataset = load_shared(training.data(settled), reporter, data_progress)
    start = Start(config, settled, source, dataset, None, reporter, accelerator)
    training.check(start)
    model_config = training.model_config(settled, dataset.shape, source)
    dataset = with_texts(dataset, model_config.text, accelerator.device, reporter)
    start = replace(start, dataset=dataset, model_config=model_config)
    return settled, dataset, lambda accelerator: replace(training.task(start), work=training.work(settled)[0])


def train(
    method: Method,
    config: Any,
    out: Path,
    reporter: Reporter,
    *,
    device: str = "auto",
    max_seconds: float = math.inf,
    data_progress: DataProgress = contextlib.nullcontext,
) -> Outcome:
    """Trains, or resumes, a run of the method in the folder `out`. Errors are those of `start.run_training`.

    config: of the method's `Training.resolve`. device: auto, cpu or cuda.
    """
    accelerator = make_accelerator(config.train, config.run, out, device)
    initial = read_initial(config.train.init) if config.train.init else None  # before anything is decoded
    settled, dataset, make_task = prepare(method, config, reporter, accelerator, data_progress)
    return run_training(
        method.name, settled, dataset, make_task, accelerator=accelerator, out=out, reporter=reporter, max_seconds=max_seconds,
        initial=initial,
    )  # fmt: skip
