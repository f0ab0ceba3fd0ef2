"""A method of two networks that take turns, in small: what the training loop must carry for any such method.

The student (a U-Net) moves towards the images; the auxiliary (a convolution) towards the student. As a script it trains in
the folder that it is given, with as many processes as it is launched with.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from torch import nn

from mmgen.config import sections as configs
from mmgen.config.sections import DataSettings, OptimizerSettings, RunSettings, TrainSettings
from mmgen.models.denoiser import DenoiserSettings
from mmgen.models.build import build_model
from mmgen.models.config import ModelConfig
from mmgen.models.pixels import from_uint8
from mmgen.networks import UNetSettings
from mmgen.system.random import keys, normal, uniform
from mmgen.training.start import load_shared, make_accelerator, run_training
from mmgen.training.task import TrainedNetwork, Reporter, Task

SETTINGS = {
    "train.batch_size": 16, "train.max_images": 160, "train.precision": "fp32", "train.ema_betas": [],
    "optimizer.name": "adam", "optimizer.lr": 1e-2, "optimizer.beta1": 0.0, "optimizer.decay": "linear",
    "optimizer.warmup_images": 32, "optimizer.grad_clip": 1.0,
    "run.batch_per_device": 8, "run.checkpoint_every": 48, "run.eval_num": 0, "run.log_every": 2, "run.eval_steps": [1],
}  # fmt: skip


@dataclass(frozen=True)
class ToyConfig:
    data: DataSettings = DataSettings(conditional=True)
    optimizer: OptimizerSettings = OptimizerSettings(name="adamw")
    train: TrainSettings = TrainSettings()
    run: RunSettings = RunSettings()

    def to_dict(self):
        return dataclasses.asdict(self)


class Quiet(Reporter):
    def __init__(self):
        self.notes, self.lines = [], []

    def note(self, text):
        self.notes.append(text)

    def log(self, line):
        self.lines.append(line)


class StudentObjective(nn.Module):
    """The student's error, and two numbers: the mean brightness, and by level (the last one always empty) the image's number."""

    def __init__(self, student):
        super().__init__()
        self.student = student

    def forward(self, batch):
        x = from_uint8(batch.images)
        noise = normal(keys(0, batch.index, 1), x.shape[1:])
        time = uniform(keys(0, batch.index, 2))
        out = self.student(x + noise, time, None, batch.condition)
        ones = torch.ones_like(time)
        level = (3 * time).long()
        by_level = torch.zeros(2, 4, dtype=torch.float64).index_add_(1, level, torch.stack([batch.index.double(), ones]))
        brightness = torch.stack([x.mean((1, 2, 3)).sum(), torch.tensor(float(len(x)))])[:, None]
        return (out - x).square().mean(), {"brightness": brightness, "numbers": by_level}


class AuxiliaryObjective(nn.Module):
    def __init__(self, auxiliary, student):
        super().__init__()
        self.auxiliary = auxiliary
        self.others = [student]  # no sub-module: it is not trained here

    def forward(self, batch):
        x = from_uint8(batch.images)
        with torch.no_grad():
            target = self.others[0](x, torch.zeros(len(x), dtype=torch.float64), None, batch.condition)
        return (self.auxiliary(x) - target).square().mean(), {}


def model_config():
    network = UNetSettings(model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=(), dropout=0.0)
    return ModelConfig(network=network, flow=None, denoiser=DenoiserSettings(), resolution=8, channels=1, num_classes=10)


def toy_task(accelerator):
    student = build_model(model_config()).network
    auxiliary = nn.Conv2d(1, 1, 3, padding=1)
    seen = []  # what prepare found: sums over this process's share

    def prepare(walk):
        for _ in range(2):  # it may walk more than once
            total = sum(batch.images.double().sum() for batch in walk())
            seen.append(float(accelerator.reduce(total, reduction="sum")))

    parts = {
        "student": TrainedNetwork(student, StudentObjective(student), prepare),
        "auxiliary": TrainedNetwork(auxiliary, AuxiliaryObjective(auxiliary, student)),
    }
    task = Task(parts, model_config(), turn=lambda step: ("auxiliary", "student")[step % 2], picture=lambda model, seed, scores: None)
    task.seen = seen
    return task


def run_toy(out: Path, reporter=None, make=toy_task, **changes):
    config = configs.build(ToyConfig, configs.nest({**SETTINGS, **changes}, ToyConfig))
    configs.check_shared(config)
    reporter = reporter or Quiet()
    accelerator = make_accelerator(config.train, config.run, out, "cpu")
    dataset = load_shared(config.data, reporter)
    return run_training("toy", config, dataset, make, accelerator=accelerator, out=out, reporter=reporter)


if __name__ == "__main__":
    run_toy(Path(sys.argv[1]))
    print(PartialState().num_processes)
