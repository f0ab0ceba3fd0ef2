"""A CLIP in open_clip's layout: a folder with open_clip_config.json and open_clip_model.safetensors, as on the hub."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from ..errors import ConfigError, ModelError, shortened
from ..system.files import read_json, sha256_of
from .towers import Towers

OPEN_CLIP = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"
VIT_G_14 = {"embed_dim": 1024, "layers": 40, "width": 1408, "patch_size": 14}  # the CLIP of most published text-to-image scores


def open_clip_towers(folder: Path, device: torch.device | str = "cpu") -> Towers:
    """Images are prepared as open_clip prepares them, by Pillow; texts are cut at the model's length.

    Raises ConfigError where open_clip is missing, ModelError where the folder cannot be read.
    """
    try:
        import open_clip
    except ImportError as error:
        raise ConfigError(f"{folder} is a CLIP of open_clip: pip install open_clip_torch") from error
    if not (folder / WEIGHTS).is_file():
        raise ModelError(f"{folder} holds no {WEIGHTS}: weights are read as safetensors only")
    with _quiet(), _readable(folder):
        from safetensors.torch import load_file

        name = f"local-dir:{folder.absolute()}"
        model, _, prepare = open_clip.create_model_and_transforms(name, load_weights=False, pretrained_text=False)
        model.load_state_dict(load_file(folder / WEIGHTS))
        tokenizer = open_clip.get_tokenizer(name)
        model = model.float().eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def images(batch: Tensor) -> Tensor:
        pictures = [Image.fromarray(image) for image in batch.cpu().permute(0, 2, 3, 1).numpy()]
        return model.encode_image(torch.stack([prepare(picture) for picture in pictures]).to(device))

    @torch.no_grad()
    def texts(batch: list[str]) -> Tensor:
        return model.encode_text(tokenizer(batch).to(device))

    width = texts(["a"]).shape[1]
    return Towers(_title(folder), sha256_of(folder / WEIGHTS), True, width, images, texts)


def _title(folder: Path) -> str:
    """The folder's name, and ViT-g-14 where the sizes are that network's."""
    config = read_json(folder / OPEN_CLIP)["model_cfg"]
    sizes = {"embed_dim": config.get("embed_dim"), **(config.get("vision_cfg") or {})}
    known = "ViT-g-14 of open_clip, " if all(sizes.get(key) == value for key, value in VIT_G_14.items()) else ""
    return known + folder.resolve().name


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise ModelError(f"cannot load {folder} as a CLIP of open_clip: {shortened(error, 300)}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without open_clip's log lines: that no weights are loaded yet, for one."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
