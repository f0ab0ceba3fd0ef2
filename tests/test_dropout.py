"""Dropout with cheap masks: the right share, the same mean, one mask for value and gradient, and torch's seed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmgen.networks.dropout import Dropout, drop


@pytest.mark.parametrize("p", [0.1, 0.13, 0.5, 0.999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_share_and_scale(p, dtype):
    torch.manual_seed(0)
    count = 1_000_003  # not a multiple of four
    out = drop(torch.ones(count, dtype=dtype), p)
    kept = (out != 0).double()
    assert kept.mean().item() == pytest.approx(1 - p, abs=5 * (p * (1 - p) / count) ** 0.5 + 2**-17)
    assert set(out.unique().tolist()) == {0.0, torch.tensor(65536 / (65536 - round(p * 65536)), dtype=dtype).item()}
    neighbours = kept - kept.mean()  # numbers of one word are as independent as any others
    for apart in (1, 2, 3, 4):
        assert abs((neighbours[apart:] * neighbours[:-apart]).mean()) < 5 * p * (1 - p) / count**0.5


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_gradient_has_the_values_mask(layout):
    x = torch.rand(2, 6, 5, 3).add(1).to(memory_format=layout).requires_grad_()
    torch.manual_seed(1)
    out = drop(x, 0.3)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert out.is_contiguous(memory_format=layout)
    assert torch.allclose(out, x * gradient) and 0 < (gradient == 0).sum() < gradient.numel()
    torch.manual_seed(1)
    assert torch.equal(drop(x, 0.3), out)
    assert not torch.equal(drop(x, 0.3), out)


def test_a_view_with_gaps():
    x = torch.ones(8, 10)[:, ::2].expand(3, 8, 5)
    out = drop(x, 0.5)
    assert out.shape == x.shape and set(out.unique().tolist()) == {0.0, 2.0}


def test_the_module_is_torchs_otherwise():
    x = torch.rand(4, 7)
    assert isinstance(Dropout(0.1), nn.Dropout)
    assert torch.equal(Dropout(0.5).eval()(x), x) and torch.equal(Dropout(0.0)(x), x) and not Dropout(1.0)(x).any()
    assert (Dropout(0.5)(x) == 0).any()
