"""Wide 3 x 3 convolutions on a CPU with a quarter of the multiplications (Lavin & Gray, arXiv:1509.09308).

oneDNN's direct convolution already does what a core can, so that only another algorithm is faster: F(4 x 4, 3 x 3) has 36
multiplications in place of 144 for 16 pixels. Its rounding errors, 2.5e-6 of the result, are three times those of the direct one.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

TILE = 4  # side of the output that a tile computes; it reads 6 x 6 pixels
PART = 6 * 2**20  # numbers of a part's tiles, 24 MiB: what is larger than 32 MiB glibc fetches from the system anew, page by page
PIECE = 2**17  # numbers that are transformed at a time: 0.5 MiB, half of a core's second cache
LEAST_CHANNELS, LEAST_PIXELS = 128, 256  # below, moving the tiles costs more than is saved (tests/benchmarks/NOTES.md)

# d -> B d B^T, weights g -> G g G^T, and the output A m A^T, for the points 0, 1, -1, 2, -2 and infinity
_B = [[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0], [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0],
      [0, 4, 0, -5, 0, 1]]  # fmt: skip
_G = [[1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6], [1 / 24, 1 / 12, 1 / 6], [1 / 24, -1 / 12, 1 / 6],
      [0, 0, 1]]  # fmt: skip
_A = [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]


class Conv2d(nn.Conv2d):
    """torch's convolution, with its parameters; by Winograd's algorithm where that is faster: float32, on a CPU, wide, 3 x 3."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and not torch.compiler.is_compiling() and self._is_wide(x):
            return Winograd.apply(x, self.weight, self.bias)
        return super().forward(x)

    def _is_wide(self, x: Tensor) -> bool:
        height, width = x.shape[2:]
        return (
            self.kernel_size == (3, 3) and self.padding == (1, 1) and self.bias is not None and x.dtype == self.weight.dtype == torch.float32
            and min(self.in_channels, self.out_channels) >= LEAST_CHANNELS and height * width >= LEAST_PIXELS
            and height % TILE == width % TILE == 0 and not torch.is_autocast_enabled("cpu")
        )  # fmt: skip


class Winograd(torch.autograd.Function):
    """A 3 x 3 convolution with padding 1: x float32 [N, C, H, W], weight [K, C, 3, 3], bias [K] -> [N, K, H, W].

    H and W are multiples of TILE. Differentiable once, in both directions.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return _convolution(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.save_for_forward(*inputs[:2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = _convolution(gradient, weight.flip(2, 3).transpose(0, 1))
        if ctx.needs_input_grad[1]:
            k, c = weight.shape[:2]
            product = x.new_zeros(36, c, k)
            for part in _parts(x, max(c, k)):
                product.baddbmm_(_tiles(x[part]).transpose(1, 2), _spread(gradient[part]))
            of_weight = (_matrix("G").T @ product.view(36, -1)).view(3, 3, c, k).permute(3, 2, 0, 1).contiguous()
        return of_x, of_weight, gradient.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None

    @staticmethod
    def jvp(ctx: Any, along_x: Tensor | None, along_weight: Tensor | None, along_bias: Tensor | None) -> Tensor:
        x, weight = ctx.saved_tensors
        total = 0 if along_bias is None else along_bias[:, None, None]
        total = total if along_x is None else total + _convolution(along_x, weight)
        return total if along_weight is None else total + _convolution(x, along_weight)


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """[N, C, H, W], [K, C, 3, 3] and [K] -> [N, K, H, W], channels last in memory."""
    n, _, height, width = x.shape
    k, c = weight.shape[:2]
    high, wide = height // TILE, width // TILE
    points = (_matrix("G") @ weight.permute(2, 3, 1, 0).reshape(9, -1)).view(36, c, k)
    out = x.new_empty(n, high, TILE, wide, TILE, k)
    for part in _parts(x, max(c, k)):
        product = torch.bmm(_tiles(x[part]), points).view(36, -1, high, wide * k)
        for image, rows in _pieces(product.shape[1], high, 36 * wide * k):
            pixels = (_matrix("A") @ product[:, image, rows].reshape(36, -1)).view(TILE, TILE, -1, wide, k)
            torch.add(pixels.permute(2, 0, 3, 1, 4), bias, out=out[part][image, rows])
    return out.view(n, height, width, k).permute(0, 3, 1, 2)


def _tiles(x: Tensor) -> Tensor:
    """The transformed 6 x 6 tiles of x [N, C, H, W], each four pixels from the last: [36, N H/4 W/4, C]."""
    n, c, height, width = x.shape
    high, wide = height // TILE, width // TILE
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)).contiguous()
    each, row, column, channel = padded.stride()
    tiles = padded.as_strided((6, 6, n, high, wide, c), (row, column, each, TILE * row, TILE * column, channel))
    out = x.new_empty(36, n, high, wide * c)
    for image, rows in _pieces(n, high, 36 * wide * c):
        torch.mm(_matrix("B"), tiles[:, :, image, rows].reshape(36, -1), out=out[:, image, rows].view(36, -1))
    return out.view(36, -1, c)


def _spread(gradient: Tensor) -> Tensor:
    """The transpose of the output's transformation, of its gradient [N, K, H, W], channels last: [36, N H/4 W/4, K]."""
    n, k, height, width = gradient.shape
    high, wide = height // TILE, width // TILE
    pixels = gradient.permute(0, 2, 3, 1).view(n, high, TILE, wide, TILE, k).permute(2, 4, 0, 1, 3, 5)
    out = gradient.new_empty(36, n, high, wide * k)
    for image, rows in _pieces(n, high, 36 * wide * k):
        torch.mm(_matrix("A").T, pixels[:, :, image, rows].reshape(TILE**2, -1), out=out[:, image, rows].view(36, -1))
    return out.view(36, -1, k)


def _parts(x: Tensor, channels: int) -> list[slice]:
    """Images of x [N, C, H, W] to be convolved at a time: equal parts whose tiles of so many channels are within PART numbers."""
    n, _, height, width = x.shape
    count = -(-36 * n * height * width * channels // TILE**2 // PART)
    step = -(-n // max(1, count))
    return [slice(first, first + step) for first in range(0, n, step)]


def _pieces(images: int, rows: int, size: int) -> list[tuple[int, slice]]:
    """Image and rows of tiles, of `size` numbers each, to be transformed at a time, so that they stay in the cache."""
    step = max(1, PIECE // size)
    return [(image, slice(row, row + step)) for image in range(images) for row in range(0, rows, step)]


@lru_cache(maxsize=3)
def _matrix(name: str) -> Tensor:
    """One of the three transformations on both axes at once, float32."""
    with torch.inference_mode(False):  # a cached tensor must serve in and out of inference mode
        one = torch.tensor({"A": _A, "B": _B, "G": _G}[name], dtype=torch.float64, device="cpu")
        return torch.kron(one, one).float()
