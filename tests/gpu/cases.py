"""A trainer of every method and network, on noise: tiny for numerics, as the preset has it for memory and speed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmgen.config import distill as distill_config
from mmgen.config import imm as imm_config
from mmgen.config import sections as configs
from mmgen.config import teacher as teacher_config
from mmgen.data import Dataset
from mmgen.methods.distill.method import distill_task, find_teacher, student_model_config
from mmgen.methods.imm.objective import imm_model_config, imm_task
from mmgen.methods.teacher.objective import teacher_model_config, teacher_task
from mmgen.models.build import build_model
from mmgen.models.files import save_model
from mmgen.training.loop import Trainer
from mmgen.training.start import with_texts
from mmgen.training.task import Reporter

from ..benchmarks.measuring import temporary_folder
from ..benchmarks.runs import noise_latents, trainer

QUIET = {"run.eval_num": 0, "run.batch_per_device": "auto"}
# One network of each kind, small: numerics only
TINY = {
    "unet": {"kind": "unet", "model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [8], "dropout": 0.0},
    "ncsnpp": {"kind": "unet", "model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [8],
               "dropout": 0.0, "embedding": "fourier", "encoder": "residual", "resample": "fir"},
    "adm": {"kind": "adm", "model_channels": 32, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [8],
            "dropout": 0.0},
    "dit": {"kind": "dit", "hidden_size": 64, "depth": 2, "num_heads": 2, "patch_size": 2},
    "uvit": {"kind": "uvit", "model_channels": 32, "channel_mult": [1, 2], "num_blocks": [1], "depth": 2, "channels_per_head": 32, "dropout": 0.0},
    "edm2": {"kind": "edm2", "model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [8],
             "channels_per_head": 16, "dropout": 0.0},
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """`make(device, precision, batch)` is a Trainer whose `_step()` is one step of the run."""

    name: str
    make: Callable[..., Trainer]


def noise_images(resolution: int, channels: int = 3, classes: int = 10, count: int = 256) -> Dataset:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (count, channels, resolution, resolution), dtype=np.uint8)
    labels = np.arange(count) % classes if classes else None
    return Dataset("noise", images, labels, None, "noise", "noise")


def data_for(config: Any) -> Any:
    """Noise of the shape that the config wants."""
    data = config.data
    if data.channels == 4:
        return noise_latents(data.num_classes or 10)
    if data.text:
        return captioned(noise_images(data.resolution or 16, data.channels or 3))
    return noise_images(data.resolution or 16, data.channels or 3, (data.num_classes or 10) if data.conditional else 0)


def captioned(dataset: Dataset) -> Dataset:
    import pyarrow

    texts = [[f"the image {label}", f"image {label} of {dataset.num_classes}"] for label in dataset.labels]
    return replace(dataset, labels=None, captions=pyarrow.array(texts))


def imm_case(preset: str, **changes: Any) -> Case:
    def make(device: str, precision: str = "tf32", batch: int | None = None, **more: Any) -> Trainer:
        fixed = {**QUIET, **changes, **more, "train.precision": precision} | sizes(batch)
        config = imm_config.resolve(configs.read_preset(preset, "train-imm"), configs.nest(fixed, imm_config.ImmConfig))
        dataset = data_for(config)
        model = imm_model_config(config, dataset.shape)
        dataset = with_texts(dataset, model.text, device, Reporter())
        return trainer(config, dataset, lambda accelerator: imm_task(config, model), device)

    return Case(preset, make)


def teacher_case(preset: str, **changes: Any) -> Case:
    def make(device: str, precision: str = "tf32", batch: int | None = None, **more: Any) -> Trainer:
        config, dataset, model = teacher_parts(preset, precision, batch, {**changes, **more})
        dataset = with_texts(dataset, model.text, device, Reporter())
        return trainer(config, dataset, lambda accelerator: teacher_task(config, model), device)

    return Case(preset, make)


def teacher_parts(preset: str, precision: str, batch: int | None, changes: dict[str, Any]) -> tuple[Any, Any, Any]:
    fixed = {**QUIET, **changes, "train.precision": precision} | sizes(batch)
    config = teacher_config.resolve(
        configs.read_preset(preset, "train-teacher"), configs.nest(fixed, teacher_config.TeacherConfig)
    )
    dataset = data_for(config)
    return config, dataset, teacher_model_config(config, dataset.shape)


def distill_case(preset: str, teacher_preset: str, method: str = "alternating", teacher: dict | None = None, **changes: Any) -> Case:
    def make(device: str, precision: str = "tf32", batch: int | None = None, **more: Any) -> Trainer:
        file = random_teacher(teacher_preset, teacher or {})
        fixed = {
            **QUIET, **changes, **more, "train.precision": precision, "teacher.name": str(file), "loss.method": method,
            "student.steps": 8, "run.teacher_steps": 0,
        } | sizes(batch)  # fmt: skip
        config = distill_config.resolve(
            configs.read_preset(preset, "distill"), configs.nest(fixed, distill_config.DistillConfig)
        )
        found, config = find_teacher(config, torch.device(device))
        dataset = data_for(replace(config, data=replace(
            config.data, resolution=found.model.config.resolution, channels=found.model.config.channels,
            num_classes=found.model.config.num_classes or None, conditional=bool(found.model.config.num_classes),
            text=found.model.config.text is not None,
        )))  # fmt: skip
        model = student_model_config(config, found, dataset)
        dataset = with_texts(dataset, model.text, device, Reporter())
        return trainer(
            config, dataset, lambda accelerator: distill_task(config, found, model, dataset, Reporter(), accelerator), device
        )

    return Case(f"{preset}, {method}", make)


def sizes(batch: int | None) -> dict[str, Any]:
    return {} if batch is None else {"train.batch_size": batch, "run.batch_per_device": batch}


def random_teacher(preset: str, changes: dict[str, Any]) -> Path:
    """A model file with random weights whose outputs are of the order of one."""
    _, _, model_config = teacher_parts(preset, "fp32", None, changes)
    torch.manual_seed(0)
    model = build_model(model_config)
    scramble(model.network)
    file = temporary_folder() / "teacher.safetensors"
    save_model(file, model_config, model.network.state_dict())
    return file


@torch.no_grad()
def scramble(network: torch.nn.Module) -> None:
    """Random weights, so that nothing is hidden by layers that begin at zero; the same on every device."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            value = torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5
            parameter.copy_(value.to(parameter.device))


# Of every case: what tiny networks are trained on
NOISE = {"data.name": "noise", "data.resolution": 16, "data.channels": 3, "data.conditional": True, "data.num_classes": 10,
         "data.augment": 0.0, "optimizer.grad_clip": 0.0}  # fmt: skip
TEXT = {"data.conditional": False, "data.num_classes": None, "data.text": True, "text.length": 24, "text.width": 16, "text.pooled": 16,
        "text.depth": 1, "text.heads": 2}  # fmt: skip
DISTILLATIONS = {"alternating": ("alternating", {}), "instant, forward": ("instant", {"loss.jvp": "forward"}),
                 "instant, finite": ("instant", {"loss.jvp": "finite"})}  # fmt: skip


def tiny_settings(name: str) -> dict[str, Any]:
    """Of a tiny network and its data; name: of TINY, or text: a U-Net with a text encoder of its own."""
    network = TINY["unet" if name == "text" else name]
    return {f"network.{key}": value for key, value in network.items()} | NOISE | (TEXT if name == "text" else {})


def tiny_case(method: str, name: str, **more: Any) -> Case:
    """method: imm, teacher, or of DISTILLATIONS."""
    settings = tiny_settings(name)
    if method in DISTILLATIONS:
        kind, changes = DISTILLATIONS[method]
        case = distill_case("cifar10-distill", "cifar10-teacher", kind, teacher=settings, **{"data.name": "noise"} | changes | more)
    elif method == "imm":
        case = imm_case("cifar10-imm", **settings | more)
    else:
        case = teacher_case("cifar10-teacher", **settings | more)
    return replace(case, name=f"{method}, {name}")


def tiny_cases() -> Iterator[Case]:
    """Both methods that train from scratch with every network that they can have; every kind of distillation, of two networks."""
    for name in TINY:
        if name != "edm2":  # which has no second time
            yield tiny_case("imm", name)
        yield tiny_case("teacher", name)
    yield tiny_case("imm", "text")
    yield tiny_case("teacher", "text")
    for method in DISTILLATIONS:
        yield tiny_case(method, "unet")
    yield tiny_case("alternating", "text")
