"""What tests of distillation share: a toy configuration, its parts, passes of digits."""

import contextlib

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tiny_model import make_denoiser
from toy_task import Quiet

from mmgen import data
from mmgen.config.sections import nest
from mmgen.models.denoiser import DenoiserSettings
from mmgen.config.distill import DistillConfig, resolve
from mmgen.diffusion.schedules import ScheduleSettings
from mmgen.training.batches import fetch
from mmgen.methods import DISTILLATION
from mmgen.methods.run import train
from mmgen.methods.distill.method import distill_task, find_teacher, student_model_config

COSINE = ScheduleSettings("vp_cosine")
V = DenoiserSettings(precondition="schedule", prediction="v", schedule=COSINE, time_scale=100.0)
TINY = {
    "student.steps": 2, "optimizer.lr": 1e-3, "optimizer.warmup_images": 32, "optimizer.grad_clip": 1.0,
    "train.batch_size": 16, "train.max_images": 160, "train.precision": "fp32",
    "run.batch_per_device": 8, "run.checkpoint_every": 48, "run.eval_num": 0, "run.log_every": 2, "run.teacher_steps": 4,
}  # fmt: skip


class One:
    """An accelerator of one process."""

    num_processes, process_index, device = 1, 0, torch.device("cpu")
    autocast = staticmethod(contextlib.nullcontext)


def toy_teacher(folder):
    """A teacher of digits with random weights."""
    return make_denoiser(folder / "teacher.safetensors", V, channels=1, num_classes=10)


def config_for(place, **changes):
    return resolve(nest({"teacher.name": str(place), **TINY, **changes}, DistillConfig))


def run(place, out, reporter=None, **changes):
    AcceleratorState._reset_state(reset_partial_state=True)
    outcome = train(DISTILLATION, config_for(place, **changes), out, reporter or Quiet(), device="cpu")
    assert outcome.signal is None, "the tests were sent a signal, which ended a run before its end"
    return outcome


def task_for(place, **changes):
    teacher, config = find_teacher(config_for(place, **changes))
    dataset = data.load("digits")
    return distill_task(config, teacher, student_model_config(config, teacher, dataset), dataset, Quiet(), One()), teacher


def digits(first=0, count=16):
    return fetch(data.load("digits"), first, count, 0, torch.device("cpu"))


def weights(folder):
    last = max((folder / "checkpoints").glob("[0-9]*"))
    return {f"{file.stem}.{k}": v for file in sorted(last.glob("*.safetensors")) for k, v in load_file(file).items()}


def assert_same(a, b):
    assert a.keys() == b.keys() and len(a) > 100
    for key in a:
        assert torch.equal(a[key], b[key]), key


def perturb(network, amount=0.1):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(amount * parameter.std(correction=0) * torch.randn(parameter.shape, generator=generator))


def grads(loss, network):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))])


@pytest.fixture(autouse=True)
def no_inception(monkeypatch):
    monkeypatch.setenv("MMGEN_INCEPTION", "")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return toy_teacher(tmp_path_factory.mktemp("teacher"))
