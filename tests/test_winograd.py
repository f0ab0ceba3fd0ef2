"""Winograd's convolution against the direct one in float64: values, gradients, derivatives forward, and when it is used."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn import functional as F

from mmgen.networks import winograd
from mmgen.networks.winograd import Conv2d, Winograd


def inputs(channels=5, out=7, height=8, width=12):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(*shape, generator=generator).requires_grad_()
        for shape in ((3, channels, height, width), (out, channels, 3, 3), (out,))
    )
    return x, weight, bias


def exact(x, weight, bias):
    return F.conv2d(x.double(), weight.double(), bias.double(), padding=1)


def near(a, b, tolerance=1e-5):
    assert (a.double() - b.double()).norm() < tolerance * b.double().norm()


@pytest.mark.parametrize("piece", [1, 2**17])  # each row of tiles by itself, or whole images
@pytest.mark.parametrize("part, parts", [(1, 3), (3000, 2), (6 * 2**20, 1)])  # the three images one by one, two and one, at once
def test_values_and_gradients_are_those_of_the_direct_convolution(monkeypatch, piece, part, parts):
    monkeypatch.setattr(winograd, "PIECE", piece)
    monkeypatch.setattr(winograd, "PART", part)
    assert len(winograd._parts(inputs()[0], 7)) == parts
    parts = inputs()
    out, expected = Winograd.apply(*parts), exact(*parts)
    near(out, expected)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    ours, theirs = torch.autograd.grad(out, parts, weights), torch.autograd.grad(expected, parts, weights.double())
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        near(a, b)


def test_the_derivative_along_a_direction_is_too():
    parts = inputs()
    along = [torch.randn(p.shape, generator=torch.Generator().manual_seed(2 + i)) for i, p in enumerate(parts)]
    with torch.no_grad(), forward_ad.dual_level():
        duals = [forward_ad.make_dual(p.detach(), a) for p, a in zip(parts, along, strict=True)]
        found = forward_ad.unpack_dual(Winograd.apply(*duals)).tangent
    x, weight, bias = parts
    expected = exact(along[0], weight, along[2]) + exact(x, along[1], torch.zeros_like(bias))
    near(found, expected)


@pytest.mark.parametrize("channels, side, used", [(128, 16, True), (64, 16, False), (128, 8, False), (128, 18, False)])
def test_it_is_used_where_it_is_faster(monkeypatch, channels, side, used):
    calls, original = [], winograd._convolution
    monkeypatch.setattr(winograd, "_convolution", lambda *inputs: calls.append(1) or original(*inputs))
    layer = Conv2d(channels, 128, 3, padding=1)
    x = torch.randn(1, channels, side, side)
    with torch.no_grad():
        near(layer(x), exact(x, layer.weight, layer.bias))
        assert bool(calls) == used
        calls.clear()
        layer.double()(x.double())
    assert not calls
