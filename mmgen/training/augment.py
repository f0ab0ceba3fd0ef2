"""Non-leaky augmentation: flips and random affine maps of the training images, told to the network by a 9-number label.

Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models" (EDM, 2022), appendix F.2, with the
image filtering of Karras et al., "Training Generative Adversarial Networks with Limited Data" (StyleGAN2-ADA, 2020),
appendix B. The label of an untouched image is zero; a network that is given the zero label when sampling draws
untouched images, so the transformations do not leak into what it makes.

Everything is a function of one key per image: the same image is transformed the same way in any batch, on any device.
No shape depends on a drawn value and nothing is read back to the host.
"""

from __future__ import annotations

import contextlib
import functools
import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..system import random
from ..errors import ConfigError

AUGMENT_DIM = 9  # xflip, yflip, scale, rotation (2), anisotropy (2), translation (2)

# The 12 low-pass taps of the orthogonal wavelet sym6, scaled to sum 1. At even lags the taps are uncorrelated, so that
# enlarging by them and reducing by the same taps is the identity.
_SYM6 = np.array([
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633, 0.4910559419267466,
    0.787641141030194, 0.3379294217276218, -0.07263752278646252, -0.021060292512300564, 0.04472490177066578,
    0.0017677118642428036, -0.007800708325034148,
])  # fmt: skip
_SYM6 = _SYM6 / _SYM6.sum()
_CENTRE = 5  # the tap that lies on the pixel: twice enlarged sample 2j shows pixel j
# The taps' centre of gravity lies a little off that tap. Sampling where it truly lies keeps rotations free of a drift
# of 0.05 pixels, which StyleGAN2-ADA has; the identity and whole-pixel shifts are the same either way.
_OFFSET = float(np.arange(12) @ _SYM6) - _CENTRE


@dataclass(frozen=True)
class AugmentSettings:
    """How often and how strongly each transformation acts; the defaults are EDM's for CIFAR-10.

    `probability` times a transformation's multiplier (`xflip` to `translate`) is its probability. A multiplier of 1e8
    is EDM's way to say "always": the flip then falls to a fair coin alone, whatever the probability. 0 turns one off.
    Raises ConfigError for a negative or infinite number.
    """

    probability: float = 0.12
    xflip: float = 1e8
    yflip: float = 1
    scale: float = 1
    rotate: float = 1
    aniso: float = 1
    translate: float = 1
    scale_std: float = 0.2  # of the base-2 logarithm of the factor
    rotate_max: float = 1.0  # times pi
    aniso_std: float = 0.2  # of the base-2 logarithm of the factor
    aniso_rotate_probability: float = 0.5  # otherwise the stretch is along an axis of the image
    translate_std: float = 0.125  # of the width and the height

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"augmentation: {field.name} must be a number of at least 0, not {value}")


class Transform(NamedTuple):
    """What is done to each image, as drawn: zeros mean untouched."""

    xflip: Tensor  # float32 [N], 0 or 1
    yflip: Tensor  # float32 [N], 0 or 1
    scale: Tensor  # float32 [N], standard normal; positive enlarges
    rotate: Tensor  # float32 [N], radians, counter-clockwise on the screen
    aniso: Tensor  # float32 [N], standard normal; positive stretches along the axis at `aniso_angle`
    aniso_angle: Tensor  # float32 [N], radians
    translate: Tensor  # float32 [N, 2], standard normal: to the right, down


def augment(images: Tensor, key: Tensor, settings: AugmentSettings | None = None) -> tuple[Tensor, Tensor]:
    """Transforms each image at random; an image that no transformation hits comes back bit for bit.

    Args:
        images: float32 [N, C, H, W] of any range, H and W at least 4; borders are continued by reflection.
        key: int64 [N], one stream per image, from `mmgen.system.random.keys`.
        settings: EDM's for CIFAR-10 if None.

    Returns:
        images like those given, and labels float32 [N, AUGMENT_DIM], zero for an untouched image.
    """
    settings = settings or AugmentSettings()
    drawn = draw(key, settings)
    images = torch.where(_per_image(drawn.xflip > 0), images.flip(3), images)
    images = torch.where(_per_image(drawn.yflip > 0), images.flip(2), images)
    moved = (drawn.scale != 0) | (drawn.rotate != 0) | (drawn.aniso != 0) | (drawn.translate != 0).any(1)
    warped = warp(images, inverse_matrices(drawn, settings, *images.shape[2:]))
    return torch.where(_per_image(moved), warped, images), labels(drawn)


def draw(key: Tensor, settings: AugmentSettings) -> Transform:
    """Draws the transformation of each image (EDM, appendix F.2, table 6); key int64 [N]."""
    uniform_key, normal_key = random.bits(key, (2,)).unbind(1)  # two ends, two streams: the same one would correlate
    coin_x, gate_x, coin_y, gate_y, gate_s, turn, gate_r, turn_a, gate_ar, gate_a, gate_t = (
        random.uniform(uniform_key, (11,)).float().unbind(1)
    )
    scale, aniso, translate_x, translate_y = random.normal(normal_key, (4,)).unbind(1)

    def kept(value: Tensor, gate: Tensor, multiplier: float) -> Tensor:
        return torch.where(gate < multiplier * settings.probability, value, torch.zeros_like(value))

    angle = (2 * turn_a - 1) * math.pi
    return Transform(
        xflip=kept((coin_x < 0.5).float(), gate_x, settings.xflip),
        yflip=kept((coin_y < 0.5).float(), gate_y, settings.yflip),
        scale=kept(scale, gate_s, settings.scale),
        rotate=kept((2 * turn - 1) * (math.pi * settings.rotate_max), gate_r, settings.rotate),
        aniso=kept(aniso, gate_a, settings.aniso),
        aniso_angle=torch.where(gate_ar < settings.aniso_rotate_probability, angle, torch.zeros_like(angle)),
        translate=torch.stack([kept(w, gate_t, settings.translate) for w in (translate_x, translate_y)], dim=1),
    )


def labels(drawn: Transform) -> Tensor:
    """The network's condition, float32 [N, AUGMENT_DIM]; angles as points on the circle, so that pi and -pi agree."""
    return torch.stack(
        [
            drawn.xflip,
            drawn.yflip,
            drawn.scale,
            drawn.rotate.cos() - 1,
            drawn.rotate.sin(),
            drawn.aniso * drawn.aniso_angle.cos(),
            drawn.aniso * drawn.aniso_angle.sin(),
            drawn.translate[:, 0],
            drawn.translate[:, 1],
        ],
        dim=1,
    )


def inverse_matrices(drawn: Transform, settings: AugmentSettings, height: int, width: int) -> Tensor:
    """The map from output to input coordinates of each image (flips apart), float32 [N, 3, 3] on columns (x, y, 1).

    In pixels, x to the right, y down, origin at the centre of the image. Each further transformation multiplies on the
    right, as in StyleGAN2-ADA, so a point goes through translation, stretch, rotation and scale in this order.
    """
    shrink = torch.exp2(-drawn.scale * settings.scale_std)
    squeeze = torch.exp2(-drawn.aniso * settings.aniso_std)
    shift = drawn.translate * settings.translate_std
    steps = (
        _scaling(shrink, shrink),
        _rotation(drawn.rotate),
        _rotation(-drawn.aniso_angle),
        _scaling(squeeze, 1 / squeeze),
        _rotation(drawn.aniso_angle),
        _translation(-shift[:, 0] * width, -shift[:, 1] * height),
    )
    return functools.reduce(_product, steps)


def warp(images: Tensor, inverse: Tensor) -> Tensor:
    """Resamples images under affine maps, with low-pass filters before and after (StyleGAN2-ADA, appendix B).

    Reflects the image to three times its size, enlarges it twice by sym6, interpolates bilinearly, reduces it twice by
    sym6 and crops; beyond three times its size the enlarged image is reflected once more. The identity returns the
    image up to rounding, a shift by whole pixels the shifted image. Needs 36 times the memory of the images meanwhile.

    Args:
        images: float32 [N, C, H, W], H and W at least 4.
        inverse: float32 [N, 3, 3]: where an output point (x, y, 1) lies in the input, in pixels from the centre.

    Returns:
        float32 [N, C, H, W]; differentiable in the images.

    Raises ConfigError for smaller images.
    """
    height, width = images.shape[2:]
    if min(height, width) < 4:  # the reflected border would be narrower than the filter
        raise ConfigError(f"augmentation needs images of at least 4 x 4 pixels, not {height} x {width}")
    with _no_autocast(images.device.type):  # bfloat16 products would cost the image some of its 8 bits
        large = _enlarging(height, images.device) @ (images @ _enlarging(width, images.device).T)
        grid = _grid(inverse, height, width)
        large = F.grid_sample(large, grid, mode="bilinear", padding_mode="reflection", align_corners=True)
        return _reducing(height, images.device) @ (large @ _reducing(width, images.device).T)


def _grid(inverse: Tensor, height: int, width: int) -> Tensor:
    """Where to read the enlarged images, in `grid_sample`'s units: float32 [N, 2H+10, 2W+10, 2].

    Enlarged sample k lies at pixel (k - _OFFSET) / 2; the enlarged input starts at k = -2(size-1) and has 6(size-1)+1
    samples, the enlarged output starts at k = -_CENTRE.
    """
    x, y = (
        (torch.arange(2 * size + 10, device=inverse.device) - (_CENTRE + _OFFSET)) / 2 - (size - 1) / 2
        for size in (width, height)
    )
    # The affine map, then the change of units, axis by axis: a [N, 1, W] and a [N, H, 1] part that broadcast.
    axes = []
    for row, size in ((0, width), (1, height)):
        a, b, c = (part[:, None, None] for part in inverse[:, row].unbind(1))
        pixel = (a * x) + (b * y[:, None] + c) + (size - 1) / 2
        index = 2 * pixel + (_OFFSET + 2 * (size - 1))
        axes.append(index * (2 / (6 * (size - 1))) - 1)
    return torch.stack(axes, dim=3)


@functools.lru_cache(maxsize=16)
def _enlarging(size: int, device: torch.device) -> Tensor:
    """Reflection and enlargement by two of one axis, as one matrix float32 [6(size-1)+1, size].

    A matrix, because for the small images this is made for, two dense products are faster than the padding and the
    convolutions of the padded image.
    """
    period = 2 * (size - 1)
    matrix = np.zeros((3 * period + 1, size))
    for row in range(3 * period + 1):
        k = row - period
        for tap, value in enumerate(_SYM6):
            pixel, odd = divmod(k + _CENTRE - tap, 2)
            if not odd:
                pixel %= period
                matrix[row, min(pixel, period - pixel)] += 2 * value  # half of the taps meet a pixel: weigh them twice
    return _constant(matrix, device)


@functools.lru_cache(maxsize=16)
def _reducing(size: int, device: torch.device) -> Tensor:
    """Reduction by two of one axis and the crop, as one matrix float32 [size, 2 size + 10]."""
    matrix = np.zeros((size, 2 * size + 10))
    for row in range(size):
        matrix[row, 2 * row : 2 * row + 12] = _SYM6
    return _constant(matrix, device)


def _constant(matrix: np.ndarray, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a cached tensor must serve in and out of inference mode
        return torch.tensor(matrix, dtype=torch.float32, device=device)


def _no_autocast(device: str) -> contextlib.AbstractContextManager:
    available = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if available else contextlib.nullcontext()


def _per_image(flags: Tensor) -> Tensor:
    return flags[:, None, None, None]


def _matrix(rows: tuple[tuple[Tensor, ...], ...]) -> Tensor:
    return torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for [N, 3, 3], in float32 also where matrix products are set to TF32 or bfloat16: these are coordinates."""
    return (a[:, :, :, None] * b[:, None, :, :]).sum(2)


def _scaling(x: Tensor, y: Tensor) -> Tensor:
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    return _matrix(((x, zero, zero), (zero, y, zero), (zero, zero, one)))


def _rotation(angle: Tensor) -> Tensor:
    """Turns the x axis towards the y axis by an angle [N]."""
    zero, one = torch.zeros_like(angle), torch.ones_like(angle)
    cos, sin = angle.cos(), angle.sin()
    return _matrix(((cos, -sin, zero), (sin, cos, zero), (zero, zero, one)))


def _translation(x: Tensor, y: Tensor) -> Tensor:
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    return _matrix(((one, zero, x), (zero, one, y), (zero, zero, one)))
