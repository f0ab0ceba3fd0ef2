"""The ADM U-Net: sizes as published, attention and embedding against plain formulas, what each setting does. Golden outputs are
in test_families_pixels."""

from __future__ import annotations

import dataclasses
import math

import pytest
from network_tools import randomised
import torch
from torch import nn

from mmgen.errors import ConfigError
from mmgen.networks import ADMSettings, build_network
from mmgen.networks.adm import Block
from mmgen.networks.conditions import Labels

TINY = ADMSettings(model_channels=16, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), channels_per_head=8, dropout=0.2)


def tiny(num_classes: int = 5, augment_dim: int = 0, second_time: bool = False, **options) -> nn.Module:
    settings = dataclasses.replace(TINY, **options)
    network = build_network(
        settings, resolution=8, channels=3, num_classes=num_classes, augment_dim=augment_dim, second_time=second_time
    )
    return randomised(network)


def inputs(count: int = 6) -> tuple[torch.Tensor | Labels, ...]:
    generator = torch.Generator().manual_seed(1)
    times = 1000 * torch.rand(2, count, dtype=torch.float64, generator=generator)
    return torch.randn(count, 3, 8, 8, generator=generator), times[0], times[1], Labels(torch.arange(count) % 5, 5)


def test_size_of_edms_imagenet64():
    """296 million parameters, as published."""
    with torch.device("meta"):
        network = build_network(ADMSettings(), resolution=64, channels=3, num_classes=1000, second_time=False)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(296, abs=0.5)


@pytest.mark.parametrize("order", ["edm", "legacy", "new"])
def test_attention(order):
    """Against loops over images, heads and positions in float64, with q, k and v picked out of the channels one by one."""
    settings = dataclasses.replace(TINY, qkv_order=order, channels_per_head=4)
    block = randomised(Block(16, 16, 8, settings, attention=True)).double()
    x = torch.randn(2, 16, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    heads, depth = 4, 4
    channel = {
        "edm": lambda head, what, c: (head * depth + c) * 3 + what,
        "legacy": lambda head, what, c: (head * 3 + what) * depth + c,
        "new": lambda head, what, c: (what * heads + head) * depth + c,
    }[order]
    with torch.no_grad():
        qkv = block.qkv(block.norm2(x)).flatten(2)
        expected = torch.zeros(2, 16, 9, dtype=torch.float64)
        for image in range(2):
            for head in range(heads):
                q, k, v = (torch.stack([qkv[image, channel(head, what, c)] for c in range(depth)]) for what in range(3))
                for position in range(9):
                    scores = [float(q[:, position] @ k[:, other]) / math.sqrt(depth) for other in range(9)]
                    weights = [math.exp(score) for score in scores]
                    for c in range(depth):
                        value = sum(w * float(v[c, other]) for other, w in enumerate(weights)) / sum(weights)
                        expected[image, head * depth + c, position] = value
        torch.testing.assert_close(block._attend(x), block.proj(expected.reshape(2, 16, 3, 3)), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scale_shift", [True, False])
@torch.no_grad()
def test_block(scale_shift):
    """The residual block in plain formulas, float64: group norms by hand, the embedding scaling and shifting, or added."""
    settings = dataclasses.replace(TINY, scale_shift_norm=scale_shift, channels_per_group=1)
    block = randomised(Block(8, 16, 8, settings, resampling="down")).double().eval()
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64, generator=generator)
    emb = torch.randn(2, 8, dtype=torch.float64, generator=generator)

    def group_norm(values, layer, groups):
        v = values.reshape(2, groups, -1)
        v = (v - v.mean(2, keepdim=True)) / (v.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return v.reshape(values.shape) * layer.weight[:, None, None] + layer.bias[:, None, None]

    def silu(v):
        return v / (1 + (-v).exp())

    def halved(v):
        return (v[..., ::2, ::2] + v[..., 1::2, ::2] + v[..., ::2, 1::2] + v[..., 1::2, 1::2]) / 4

    hidden = block.conv0(halved(silu(group_norm(x, block.norm0, 8))))
    condition = (emb @ block.affine.weight.t() + block.affine.bias)[:, :, None, None]
    if scale_shift:
        hidden = group_norm(hidden, block.norm1, 16) * (1 + condition[:, :16]) + condition[:, 16:]
    else:
        hidden = group_norm(hidden + condition, block.norm1, 16)
    expected = block.conv1(silu(hidden)) + block.skip(halved(x))
    torch.testing.assert_close(block(x, emb), expected, rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_every_input_has_an_effect():
    network, (x, t, s, label) = tiny(augment_dim=9, second_time=True).eval(), inputs()
    augment = torch.zeros(6, 9)
    output = network(x, t, s, label, augment)
    assert torch.equal(output, network(x, t, s, label))  # no augmentation is zero
    given = (x, t, s, label, augment)
    for position, change in enumerate((x.flip(0), t + 20, s + 20, Labels((label.classes + 1) % 5, 5), augment + 1)):
        changed = [*given[:position], change, *given[position + 1 :]]
        assert (network(*changed) - output).abs().mean() > 1e-3 * output.abs().mean(), position
    with pytest.raises(ValueError, match="augment"):
        tiny()(x, t, None, label, augment)


@torch.no_grad()
def test_images_do_not_influence_each_other():
    network, (x, t, _, label) = tiny().eval(), inputs()
    together = network(x, t, condition=label)
    alone = torch.cat([network(x[i : i + 1], t[i : i + 1], condition=label[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_null_class():
    """In EDM's form the null class is no label; in the others it is refused, however it is asked for."""
    x, t, _, label = inputs()
    network, strict, plain = tiny().eval(), tiny(null_class=False).eval(), tiny(num_classes=0).eval()
    null = Labels(torch.full((6,), 5), 5)
    assert torch.equal(network(x, t, condition=null), network(x, t)) and network.settings.null_class
    assert torch.equal(strict(x, t, condition=label), network(x, t, condition=label)) and not strict.settings.null_class
    for wrong in (None, null, Labels(torch.tensor([0, 1, 2, 3, 4, 5]), 5)):
        with pytest.raises(ConfigError, match="no null class"):
            strict(x, t, condition=wrong)
    assert torch.equal(plain(x, t, condition=label), plain(x, t))


def test_learned_variance_doubles_the_channels():
    x, t, _, label = inputs()
    assert tiny(learn_sigma=True)(x, t, condition=label).shape == (6, 6, 8, 8)


def test_gradient_checkpointing_changes_no_gradient():
    results = []
    for checkpointing in (False, True):
        network = tiny(gradient_checkpointing=checkpointing, second_time=True)
        torch.manual_seed(3)
        network(*inputs()).pow(2).mean().backward()
        results.append([p.grad for p in network.parameters()])
    assert all(gradient is not None for gradient in results[0])
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-5, atol=1e-8)


def test_initial_output_is_zero():
    x, t, _, label = inputs()
    network = build_network(TINY, resolution=8, channels=3, num_classes=5, second_time=False)
    assert (network(x, t, condition=label) == 0).all()


def test_impossible_heads_are_refused():
    for options in ({"channels_per_head": 64}, {"num_heads": 5}):
        with pytest.raises(ConfigError, match="heads"):
            tiny(**options)
    assert tiny(num_heads=4).decoder["4x4_in0"].heads == 4
