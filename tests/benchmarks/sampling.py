"""Images from a model to PNG files, end to end: what `mmgen sample` does against drawing, then saving one by one."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from mmgen import data
from mmgen.models.files import save_model
from mmgen.models.flow_model import FlowModel
from mmgen.sampling.folder import write_png
from mmgen.sampling.record import Origin
from mmgen.sampling.drawing import SampleSettings, draw
from mmgen.system.processes import ProcessGroup
from mmgen.methods.imm.objective import imm_model_config

from .measuring import Case, Row, Run, Size, compared, seconds, temporary_folder
from .plain_imm import jump
from .plain_unet import unet
from .runs import imm_config, noise_images

BATCH = 128
# preset -> changes of its network, and how many images
SIZES = {
    "tiny": {"digits-imm": ({"network.model_channels": 8}, 16)},
    "quick": {"digits-imm": ({}, 1024), "cifar10-imm": ({"network.model_channels": 32, "network.num_blocks": 1}, 256)},
    "full": {"digits-imm": ({}, 4096), "cifar10-imm": ({}, 32)},
}


def cases(size: Size, device: str) -> list[Case]:
    found = []
    for preset, (changes, num) in SIZES[size].items():
        arguments = preset, changes, num, device
        found.append(
            Case(
                f"sampling to PNG, {preset}, {num} images, {size}",
                "images",
                num,
                partial(ours, *arguments),
                partial(plain, *arguments),
                1 if size == "tiny" else 3,
                partial(share, *arguments),
            )  # fmt: skip
        )
    return found


def rows(size: Size, device: str) -> Iterator[Row]:
    for one in cases(size, device):
        yield compared("sampling", one, size, device)


def make_model(preset: str, changes: dict, device: str) -> tuple[FlowModel, Path]:
    config = imm_config(preset, **changes)
    dataset = data.load("digits") if preset == "digits-imm" else noise_images(32)
    torch.manual_seed(0)
    model = FlowModel(imm_model_config(config, dataset.shape)).to(device).eval().requires_grad_(False)
    folder = temporary_folder()
    save_model(folder / "model.safetensors", model.config, model.network.state_dict())
    return model, folder


def new_folder(within: Path) -> Path:
    """Not one that was emptied just before: ext4 takes up to ten times as long for a file where many were deleted seconds ago."""
    return Path(tempfile.mkdtemp(dir=within))


def ours(preset: str, changes: dict, num: int, device: str) -> Run:
    model, folder = make_model(preset, changes, device)
    origin, settings = Origin.of(folder), SampleSettings(steps=2, batch_size=BATCH)

    def once() -> None:
        write_png(model, new_folder(folder), num, settings, origin, process_group=ProcessGroup())

    return once


def share(preset: str, changes: dict, num: int, device: str, rate: float) -> str:
    """How much of the time of end to end the drawing takes by itself."""
    model, _ = make_model(preset, changes, device)
    drawing = min(seconds(lambda: draw(model, SampleSettings(steps=2, batch_size=BATCH), range(num))) for _ in range(2))
    return f"{drawing * rate / num:.0%} of it is the network"


def plain(preset: str, changes: dict, num: int, device: str) -> Run:
    """Two jumps, with the images in float64 and noise from torch's generator; PIL saves each image."""
    model, folder = make_model(preset, changes, device)
    config, flow = imm_config(preset, **changes), model.config.flow
    network = partial(unet, dict(model.network.state_dict()), replace(config.network, dropout=0.0))
    middle = 1.4 / (1 + 1.4)  # eta = 1.4

    def once() -> None:
        samples = new_folder(folder)
        images = torch.cat([batch(min(BATCH, num - start)) for start in range(0, num, BATCH)])
        for number, image in enumerate(images.cpu().numpy()):
            picture = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
            Image.fromarray(picture).save(samples / f"{number:06d}.png")

    @torch.no_grad()
    def batch(count: int) -> torch.Tensor:
        x = flow.sigma_data * torch.randn(count, *model.image_shape, dtype=torch.float64, device=device)
        classes = model.config.num_classes
        label = torch.randint(classes, (count,), device=device) if classes else None
        for t, s in ((flow.t_max, middle), (middle, flow.t_min)):
            times = (torch.full((count,), time, dtype=torch.float64, device=device) for time in (s, t))
            x = jump(config, network, x, *times, label, None)
        return (x * 127.5 + 128).clamp(0, 255).to(torch.uint8)

    return once
