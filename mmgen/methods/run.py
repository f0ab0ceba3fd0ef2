"""From a method and its settings to a run: the one body of all trainings."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..training.start import DataProgress, load_shared, make_accelerator, run_training, with_texts
from ..training.task import Outcome, Reporter
from .method import Method, Start


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
    training = method.training()
    accelerator = make_accelerator(config.train, config.run, out, device)
    source, settled = training.find(config, accelerator.device)
    dataset = load_shared(training.data(settled), reporter, data_progress)
    start = Start(config, settled, source, dataset, None, reporter, accelerator)
    training.check(start)
    model_config = training.model_config(settled, dataset.shape, source)
    dataset = with_texts(dataset, model_config.text, accelerator.device, reporter)
    start = replace(start, dataset=dataset, model_config=model_config)
    return run_training(
        method.name, settled, dataset, lambda accelerator: training.task(start), accelerator=accelerator, out=out,
        reporter=reporter, max_seconds=max_seconds,
    )  # fmt: skip
