"""The whole step of moment matching distillation, alternating (one of each network) and instant, against the textbook's."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from mmgen.config import sections as configs
from mmgen import data
from mmgen.config import teacher as teacher_config
from mmgen.config.distill import DistillConfig, resolve
from mmgen.models.build import build_model
from mmgen.models.files import save_model
from mmgen.methods.distill.method import distill_task, find_teacher, student_model_config
from mmgen.training.loop import Trainer
from mmgen.methods.teacher.objective import teacher_model_config
from mmgen.training.task import Reporter

from . import plain_matching as plain_
from .measuring import Case, Row, Run, Size, compared, temporary_folder
from .plain_imm import clip, plain_optimizer
from .plain_unet import unet
from .runs import trainer

STEPS = 8  # of the student
RANK = 8  # of adapters
TINY = {"network.model_channels": 8}


def cases(size: Size, device: str) -> list[Case]:
    """On the digits."""
    batch = 16 if size == "tiny" else 128
    found = []
    for method, steps in (("alternating", 2), ("instant", 1)):
        found.append(
            Case(
                f"moment matching, {method}, digits, batch {batch}",
                "images",
                steps * batch,
                partial(ours, method, batch, steps, size, device),
                partial(plain, method, batch, size, device),
                1 if size == "tiny" else 7,
            )  # fmt: skip
        )
    # A step by LoRA against one of all weights: mmgen on both sides
    name = f"LoRA of rank {RANK} against all weights, alternating, digits, batch {batch}"
    by_lora, full = (partial(ours, "alternating", batch, 2, size, device, rank) for rank in (RANK, 0))
    return [*found, Case(name, "images", 2 * batch, by_lora, full, 1 if size == "tiny" else 7)]


def rows(size: Size, device: str) -> Iterator[Row]:
    for one in cases(size, device):
        yield compared("matching", one, size, device)


def make_teacher(size: Size) -> Path:
    """A file with random weights."""
    changes = configs.nest(TINY if size == "tiny" else {}, teacher_config.TeacherConfig)
    config = teacher_config.resolve(configs.read_preset("digits-teacher", "train-teacher"), changes)
    model_config = teacher_model_config(config, data.load("digits").shape)
    torch.manual_seed(0)
    model = build_model(model_config)
    with torch.no_grad():  # outputs of the order of one
        for parameter in model.network.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) / parameter[0].numel() ** 0.5)
    file = temporary_folder() / "teacher.safetensors"
    save_model(file, model_config, model.network.state_dict())
    return file


def distilling(method: str, batch: int, size: Size, device: str, rank: int = 0) -> Trainer:
    """mmgen's own run."""
    changes = {
        "teacher.name": str(make_teacher(size)), "loss.method": method, "student.steps": STEPS, "student.lora": rank, "train.batch_size": batch,
        "run.batch_per_device": batch, "run.eval_num": 0, "run.teacher_steps": 0,
    }  # fmt: skip
    preset = configs.read_preset("digits-distill", "distill")
    teacher, config = find_teacher(resolve(preset, configs.nest(changes, DistillConfig)), torch.device(device))
    dataset = data.load("digits")
    model_config = student_model_config(config, teacher, dataset)

    def make_task(accelerator):
        return distill_task(config, teacher, model_config, dataset, Reporter(), accelerator)

    return trainer(config, dataset, make_task, device)


def ours(method: str, batch: int, steps: int, size: Size, device: str, rank: int = 0) -> Run:
    run = distilling(method, batch, size, device, rank)

    def runs() -> None:
        for _ in range(steps):
            run._step()

    return runs


def plain(method: str, batch: int, size: Size, device: str) -> Run:
    """The same data, the same initial weights."""
    run = distilling(method, batch, size, device)
    matching = next(iter(run.task.trained.values())).objective.matching
    (x_student, student), (x_teacher, teacher) = (copied(net) for net in (matching.student, matching.teacher))
    x_auxiliary, auxiliary = copied(matching.teacher)
    settings = run.optimizer
    of_student, of_auxiliary = plain_optimizer(settings, student), plain_optimizer(settings, auxiliary)

    def descend(loss: torch.Tensor, parameters: list[torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
        loss.backward()
        clip(parameters, settings.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    def once() -> None:
        batch = next(iter(run._batches(0)))
        x, _ = matching.inputs.images(batch)
        if method == "instant":
            first, second = (plain_.draw(x[i::2], batch.condition.classes[i::2], STEPS) for i in (0, 1))
            descend(plain_.instant_loss(x_student, x_teacher, teacher, first, second), student, of_student)
            return
        networks = x_student, x_auxiliary, x_teacher
        descend(plain_.auxiliary_loss(*networks, plain_.draw(x, batch.condition.classes, STEPS)), auxiliary, of_auxiliary)
        descend(plain_.student_loss(*networks, plain_.draw(x, batch.condition.classes, STEPS)), student, of_student)

    return once


def copied(model) -> tuple[plain_.Denoiser, list[torch.Tensor]]:
    """The textbook's x_hat of one of mmgen's denoisers, and its parameters."""
    names = [name for name, _ in model.network.named_parameters()]
    weights = {name: value.detach().clone().requires_grad_(name in names) for name, value in model.network.state_dict().items()}
    network = partial(unet, weights, model.config.network)
    return plain_.denoiser(network, model.settings.time_scale), [weights[name] for name in names]
