"""Protocols of published tables, each under one name that sets every choice: `mmgen fid --protocol coco30k`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from ..errors import ConfigError
from .image_sets import ImageSet


@dataclass(frozen=True)
class Protocol:
    """What a published score depends on."""

    name: str
    num: int  # images, one for each of the first captions
    side: int  # of all images, after a square crop
    mode: str  # of Inception
    prefix: str  # before each caption, for CLIP
    clip: str  # the network of published scores, as `Towers.name` begins
    where: str  # who publishes so

    @property
    def crop(self) -> str:
        return f"centre crop to the short side, LANCZOS to {self.side}"


# As in DMD2's code (arXiv:2405.14867), which follows GigaGAN's evaluation (arXiv:2303.05511)
COCO30K = Protocol(
    "coco30k", 30_000, 256, "clean", "A photo depicts ", "ViT-g-14", "GigaGAN, DMD2 and those who compare with them; --ref is val2014"
)
PROTOCOLS = {protocol.name: protocol for protocol in (COCO30K,)}


def cropped(images: ImageSet, protocol: Protocol) -> ImageSet:
    """The same images, each as the protocol has it before any network sees it: uint8 [C, side, side]."""
    fingerprint: Callable[[], str] | None = None
    if images.fingerprint is not None:

        def fingerprint() -> str:
            return f"{images.fingerprint()} {protocol.crop}"


    def read(start: int, stop: int, colour: bool) -> np.ndarray:
        return np.stack([square(image, protocol.side) for image in images.read(start, stop, colour)])

    telling = images.telling and (lambda tell: cropped(images.telling(tell), protocol))
    return replace(images, read=read, fingerprint=fingerprint, telling=telling, description=f"{images.description}, {protocol.crop}")


def square(image: np.ndarray, side: int) -> np.ndarray:
    """uint8 [C, H, W] -> [C, side, side]: the centre crop of torchvision (half a pixel is rounded to even), then Pillow's LANCZOS."""
    _, height, width = image.shape
    short = min(height, width)
    top, left = round((height - short) / 2), round((width - short) / 2)
    part = image[:, top : top + short, left : left + short].transpose(1, 2, 0)
    picture = Image.fromarray(np.ascontiguousarray(part[..., 0] if part.shape[2] == 1 else part))
    resized = np.asarray(picture.resize((side, side), Image.Resampling.LANCZOS))
    return np.ascontiguousarray(resized.reshape(side, side, -1).transpose(2, 0, 1))


def check_protocol(settings: object) -> None:
    """Raises ConfigError for an option of `FidSettings` that the protocol sets itself, or that it needs and lacks."""
    protocol = PROTOCOLS[settings.protocol]
    for option, value, own in (
        ("--mode", settings.mode, protocol.mode), ("--features", None if settings.features == "auto" else settings.features, "inception"),
        ("--resolution", settings.resolution, None), ("--channels", settings.channels, None), ("--repeat", settings.repeat, 1),
    ):  # fmt: skip
        if value not in (None, own):
            raise ConfigError(f"{option} {value} is not of the protocol {protocol.name}, which sets that itself: leave one of them out")
    if settings.ref is None and settings.save_stats is None:
        raise ConfigError(f"the protocol {protocol.name} compares with given images: give --ref val2014/, the images of COCO")
    if settings.clip is None and settings.ref is not None:
        raise ConfigError(
            f"the protocol {protocol.name} gives FID and CLIP as a pair: give --clip PLACE, a folder with {protocol.clip} "
            "(hf download laion/CLIP-ViT-g-14-laion2B-s12B-b42K --local-dir PLACE)"
        )
