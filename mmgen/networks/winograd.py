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
            self.kernel_size == (3, 3) and self.padding == (1, 1) and x.dtype == self.weight.dtype == torch.float32
            and min(self.in_channels, self.out_channels) >= LEAST_CHANNELS and height * width >= LEAST_PIXELS
            and height % TILE == width % TILE == 0 and not torch.is_autocast_enabled("cpu")
        )  # fmt: skip


class Winograd(torch.autograd.Function):
    """A 3 x 3 convolution with padding 1: x float32 [N, C, H, W], weight [K, C, 3, 3], bias [K] -> [N, K, H, W].

    H and W are multiples of TILE. Differentiable once, in both directions.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return _convolution(x, weight).add_(bias[:, None, None])

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
            n, k, height, width = gradient.shape
            spread = gradient.permute(0, 2, 3, 1).reshape(n, height // TILE, TILE, width // TILE, TILE, k)
            spread = _matrix("A").T @ spread.permute(2, 4, 0, 1, 3, 5).reshape(TILE**2, -1)
            product = torch.bmm(_tiles(x).transpose(1, 2), spread.view(36, -1, k))  # [36, C, K]
            of_weight = (_matrix("G").T @ product.view(36, -1)).view(3, 3, -1, k).permute(3, 2, 0, 1).contiguous()
        return of_x, of_weight, gradient.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None

    @staticmethod
    def jvp(ctx: Any, along_x: Tensor | None, along_weight: Tensor | None, along_bias: Tensor | None) -> Tensor:
        x, weight = ctx.saved_tensors
        total = 0 if along_bias is None else along_bias[:, None, None]
        total = total if along_x is None else total + _convolution(along_x, weight)
        return total if along_weight is None else total + _convolution(x, along_weight)


def _convolution(x: Tensor, weight: Tensor) -> Tensor:
    """[N, C, H, W] and [K, C, 3, 3] -> [N, K, H, W], channels last in memory."""
    n, _, height, width = x.shape
    k, c = weight.shape[:2]
    points = (_matrix("G") @ weight.permute(2, 3, 1, 0).reshape(9, -1)).view(36, c, k)
    product = torch.bmm(_tiles(x), points)  # [36, tiles, K]
    out = (_matrix("A") @ product.view(36, -1)).view(TILE, TILE, n, height // TILE, width // TILE, k)
    return out.permute(2, 3, 0, 4, 1, 5).reshape(n, height, width, k).permute(0, 3, 1, 2)


def _tiles(x: Tensor) -> Tensor:
    """The transformed 6 x 6 tiles of x [N, C, H, W], each four pixels from the last: [36, N H/4 W/4, C]."""
    n, c, height, width = x.shape
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)).contiguous()
    image, row, column, channel = padded.stride()
    shape = (6, 6, n, height // TILE, width // TILE, c)
    tiles = padded.as_strided(shape, (row, column, image, TILE * row, TILE * column, channel))
    return (_matrix("B") @ tiles.reshape(36, -1)).view(36, -1, c)


@lru_cache(maxsize=3)
def _matrix(name: str) -> Tensor:
    """One of the three transformations on both axes at once, float32."""
    with torch.inference_mode(False):  # a cached tensor must serve in and out of inference mode
        one = torch.tensor({"A": _A, "B": _B, "G": _G}[name], dtype=torch.float64, device="cpu")
        return torch.kron(one, one).float()
