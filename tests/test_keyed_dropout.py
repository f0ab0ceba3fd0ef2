"""Dropout by keys: the right share, the same image in any batch, and torch's own dropout outside."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from mmgen.networks.keyed_dropout import dropouts, keyed_dropout
from mmgen.networks import ADMSettings, UNetSettings, UViTSettings, build_network
from mmgen.system.random import keys

UNET = UNetSettings(model_channels=16, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), dropout=0.2)
ADM = ADMSettings(model_channels=16, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), channels_per_head=16, dropout=0.2)
UVIT = UViTSettings(
    model_channels=16, channel_mult=(1, 2), num_blocks=(1,), depth=1, channels_per_head=16, emb_channels=16, dropout=0.2
)


def make(settings) -> nn.Module:
    torch.manual_seed(0)
    network = build_network(settings, resolution=8, channels=3, second_time=False)
    for weight in network.parameters():
        nn.init.normal_(weight, std=0.2)
    return network


def inputs(count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 8, 8, generator=generator), torch.linspace(0, 900, count, dtype=torch.float64)


def test_share_and_scale():
    """A million numbers each: the share dropped to five standard errors, the rest divided by 1 - p."""
    for p in (0.1, 0.5, 0.9):
        layer, x = nn.Dropout(p), torch.ones(100, 10_000)
        with keyed_dropout(layer, keys(0, range(100))):
            found = layer(x)
        dropped = (found == 0).double().mean().item()
        assert dropped == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / 1e6))
        torch.testing.assert_close(found[found != 0].unique(), torch.tensor([1 / (1 - p)]))
        halves = found[:, ::2] == 0, found[:, 1::2] == 0  # which share their random words
        both = (halves[0] & halves[1]).double().mean().item()
        assert both == pytest.approx(p**2, abs=5 * math.sqrt(p**2 * (1 - p**2) / 5e5))


def test_masks_differ_between_images_modules_and_keys():
    layers, x = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.0), nn.Dropout(0.5)), torch.ones(4, 64)
    with keyed_dropout(layers, keys(0, range(4))):
        first, last = layers[0](x), layers[2](x)
        assert torch.equal(layers[1](x), x)
    with keyed_dropout(layers, keys(1, range(4))):
        other = layers[0](x)
    masks = torch.cat([first, last, other]).unique(dim=0)
    assert len(masks) == 12 and dropouts(layers) == 2


@pytest.mark.parametrize("settings", [UNET, ADM, UVIT], ids=["unet", "adm", "uvit"])
def test_an_image_is_the_same_in_any_batch_and_mode(settings):
    network, (x, t), key = make(settings), inputs(), keys(3, range(6))
    with torch.no_grad():
        plain = network.eval()(x, t)
        with keyed_dropout(network, key):
            whole = network(x, t)
            trained = network.train()(x, t)
        network.eval()
        for part in ([4], [5, 0, 2]):
            with keyed_dropout(network, key[part]):
                torch.testing.assert_close(network(x[part], t[part]), whole[part], rtol=1e-4, atol=1e-4)
        assert torch.equal(trained, whole) and (whole - plain).abs().mean() > 0.02
        with keyed_dropout(network, torch.cat([key, key])):  # as guidance doubles it
            doubled = network(torch.cat([x, x]), torch.cat([t, t]))
        torch.testing.assert_close(doubled, torch.cat([whole, whole]), rtol=1e-4, atol=1e-4)
        assert torch.equal(network(x, t), plain)  # and it is over


def test_torchs_own_dropout_is_what_is_left_outside():
    """Also after an error inside, and after one in another."""
    layer, x = nn.Dropout(0.5), torch.ones(2, 50)
    with pytest.raises(ValueError, match="3 keys for 2 images"), keyed_dropout(layer, keys(0, range(3))):
        layer(x)
    with keyed_dropout(layer, keys(0, range(2))):
        outer = layer(x)
        with keyed_dropout(layer, keys(1, range(2))):
            assert not torch.equal(layer(x), outer)
        assert torch.equal(layer(x), outer)
    torch.manual_seed(0)
    expected = nn.functional.dropout(x, 0.5, True)
    torch.manual_seed(0)
    assert torch.equal(layer(x), expected) and torch.equal(layer.eval()(x), x)


def test_a_compiled_network_knows_it_again():
    """Other keys are no other network: it is traced once, and gives what it gives uncompiled."""
    traced = []

    def backend(graph, inputs):
        traced.append(graph)
        return graph.forward

    network = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8))
    compiled, x = torch.compile(network, backend=backend), torch.randn(4, 8)
    for seed in range(12):
        with keyed_dropout(network, keys(seed, range(4))):
            expected = network(x)
        with keyed_dropout(compiled, keys(seed, range(4))):
            assert torch.equal(compiled(x), expected)
    assert len(traced) == 1


@pytest.mark.parametrize("settings", [UNET, ADM, UVIT], ids=["unet", "adm", "uvit"])
def test_gradient_checkpointing_draws_the_same_masks_again(settings):
    """The backward pass is outside of the context, as it is in training."""
    from dataclasses import replace

    (x, t), key, found = inputs(), keys(0, range(6)), []
    for checkpointing in (False, True):
        network = make(replace(settings, gradient_checkpointing=checkpointing)).train()
        with keyed_dropout(network, key):
            output = network(x, t)
        output.square().sum().backward()
        found.append([output.detach(), *(p.grad for p in network.parameters())])
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
