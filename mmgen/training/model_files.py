"""The model files of a run: averages, the best model, snapshots; and the averaged model itself, to measure and to draw from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..config.sections import RunSettings, TrainSettings
from ..models.build import AnyModel, build_model
from ..models.files import MODEL_FILE
from ..models.post_hoc import FOLDER
from ..models.power_function import average_name
from ..system.processes import ProcessGroup
from .ema import EMA
from .run_log import RunLog
from .sharding import gathered
from .task import Task

BEST_FILE = "model-best.safetensors"  # the averaged weights with the best score so far, at the first of run.eval_steps


class ModelFiles:
    """Every process has one and calls all of its methods; the main one writes."""

    def __init__(
        self, folder: Path, task: Task, ema: EMA, about: dict[str, Any], process_group: ProcessGroup, history: RunLog
    ) -> None:
        """about: what every file says of its training. history: tells what cannot be written and ends no run."""
        self.folder, self.task, self.ema, self.about, self.process_group = folder, task, ema, about, process_group
        self.history = history

    def save(self, images: int) -> None:
        """All averages; the weights themselves where nothing is averaged."""
        for name in self.ema.decays or [None]:
            file = MODEL_FILE if name == self.ema.first else f"model-ema-{name}.safetensors"
            self._write(self.folder / file, name, images)

    def save_best(self, images: int, figures: dict[str, Any]) -> None:
        with self.history.going_on(BEST_FILE):
            self._write(self.folder / BEST_FILE, self.ema.first, images, figures=figures)

    def averaged(self, device: torch.device) -> AnyModel:
        """The model with the (first) averaged weights, whole, in evaluation mode."""
        state = gathered(self.ema.state_dict(self.ema.first))
        if self.task.averaged is not None:
            return self.task.averaged(state)
        model = build_model(self.task.model_config).to(device)
        model.network.load_state_dict(state)
        return model.eval().requires_grad_(False)

    def keep_snapshots(self, images: int, lengths: tuple[float, ...]) -> None:
        """One file for each length: what `models.post_hoc` makes other lengths of."""
        for length in lengths:
            name = average_name(length)
            with self.history.going_on(FOLDER):
                self._write(self.folder / FOLDER / f"model-{images:012d}-{name}.safetensors", name, images, length=length)

    def forget_snapshots(self, after: int) -> None:
        """Those of more images: the run goes on from before them, perhaps with other settings."""
        if self.process_group.is_main:
            for file in (self.folder / FOLDER).glob("*-[0-9]*-*.safetensors"):
                if int(file.name.split("-")[1]) > after:
                    file.unlink()
        self.process_group.wait()

    def _write(self, file: Path, name: str | None, images: int, **more: Any) -> None:
        state = gathered(self.ema.state_dict(name), keep=self.process_group.is_main)
        try:
            if self.process_group.is_main:
                file.parent.mkdir(exist_ok=True)
                config = self.task.model_config
                training = {**config.training, **self.about, "images": images, "ema": name, **more}
                self.task.save(file, replace(config, training=training), state)
        finally:  # where a file may be missing, training goes on in all processes
            self.process_group.wait()


def snapshots_every(train: TrainSettings, run: RunSettings) -> int:
    """Images between snapshots: enough of them that the profiles of other lengths are met."""
    return run.snapshot_every or max(1, train.max_images // 32)
