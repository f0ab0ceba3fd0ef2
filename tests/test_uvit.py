"""The UViT: its blocks against the formulas written out in NumPy's float64, and the properties that training relies on."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from network_tools import masks_are_the_seeds
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmgen.errors import ConfigError
from mmgen.networks.conditions import Labels
from mmgen.networks.keyed_dropout import keyed_dropout
from mmgen.networks import UViTSettings, build_network, widen_input
from mmgen.networks.uvit import ConvBlock, TransformerBlock, UViT
from mmgen.system.random import keys
from mmgen.system.schema import from_dict

TINY = UViTSettings(
    model_channels=8, channel_mult=(1, 2, 4), num_blocks=(1, 2), depth=2, channels_per_head=8, emb_channels=24, dropout=0.2,
    dropout_resolution=4,
)  # fmt: skip
CLASSES = 5


def randomised(network: nn.Module, seed: int = 0) -> nn.Module:
    """Weights of an ordinary size everywhere, as layers that start as zero would hide what is behind them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / max(p[0].numel(), 16) ** 0.5)
    return network


def tiny(num_classes: int = CLASSES, second_time: bool = True, extra_channels: int = 0, **changes) -> UViT:
    settings = dataclasses.replace(TINY, **changes)
    return randomised(UViT(settings, 8, 3, num_classes, second_time=second_time, extra_channels=extra_channels))


def inputs(count: int = 6, channels: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, channels, 8, 8, generator=generator)
    t, s = 1000 * torch.rand(2, count, dtype=torch.float64, generator=generator)
    return x, t, s, Labels(torch.arange(count) % (CLASSES + 1), CLASSES)


# The blocks, written out


def conv(x: np.ndarray, layer: nn.Conv2d) -> np.ndarray:
    """3 x 3, zeros around: the sum over nine shifted images. x [C, H, W]."""
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    height, width = x.shape[1:]
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
    shifted = {(i, j): padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)}
    products = [np.einsum("oc,chw->ohw", weight[:, :, i, j], image) for (i, j), image in shifted.items()]
    return sum(products) + bias[:, None, None]


def linear(x: np.ndarray, layer: nn.Linear) -> np.ndarray:
    return x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def group_norm(x: np.ndarray, layer: nn.GroupNorm) -> np.ndarray:
    grouped = x.reshape(layer.num_groups, -1)
    normalised = (grouped - grouped.mean(1, keepdims=True)) / np.sqrt(grouped.var(1, keepdims=True) + 1e-6)
    weight, bias = (v.detach().numpy()[:, None, None] for v in (layer.weight, layer.bias))
    return normalised.reshape(x.shape) * weight + bias


@pytest.mark.parametrize("skip", [False, True])
@torch.no_grad()
def test_convolutional_block_is_the_formula(skip):
    block = randomised(ConvBlock(16, 24, 0.2, skip=skip).double()).eval()
    generator = torch.Generator().manual_seed(1)
    x, kept = torch.randn(2, 3, 16, 4, 4, generator=generator, dtype=torch.float64)
    emb = torch.randn(3, 24, generator=generator, dtype=torch.float64)
    found = block(x, emb, kept) if skip else block(x, emb)
    for image, given, condition, output in zip(x.numpy(), kept.numpy(), emb.numpy(), found.numpy(), strict=True):
        hidden = group_norm(image, block.norm0)
        if skip:
            hidden = (hidden + group_norm(given, block.norm_skip)) / math.sqrt(2)
        hidden = conv(silu(hidden), block.conv0)
        scale, shift = np.split(linear(condition, block.affine), 2)
        hidden = group_norm(hidden, block.norm1) * (1 + scale[:, None, None]) + shift[:, None, None]
        np.testing.assert_allclose(output, image + conv(silu(hidden), block.conv1), rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_transformer_block_is_the_formula():
    """Head by head and query by query."""
    settings = dataclasses.replace(TINY, mlp_ratio=3.0)
    block = randomised(TransformerBlock(32, 24, settings).double()).eval()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 9, 32, generator=generator, dtype=torch.float64)
    emb = torch.randn(2, 24, generator=generator, dtype=torch.float64)
    gains = [gain.numpy() for gain in (block.query_gain, block.key_gain)]
    assert block.heads == 4 and block.fc1.out_features == 96

    def layer_norm(v):
        return (v - v.mean(1, keepdims=True)) / np.sqrt(v.var(1, keepdims=True) + 1e-6)

    for tokens, condition, output in zip(x.numpy(), emb.numpy(), block(x, emb).numpy(), strict=True):
        scale1, shift1, scale2, shift2 = np.split(linear(condition, block.affine), 4)
        q, k, v = np.split(linear(layer_norm(tokens) * (1 + scale1) + shift1, block.qkv), 3, axis=1)
        attended = np.zeros_like(tokens)
        for head in range(4):
            part = slice(8 * head, 8 * head + 8)
            queries, keys = (
                u[:, part] / np.sqrt((u[:, part] ** 2).mean(1, keepdims=True) + 1e-6) * gain
                for u, gain in zip((q, k), gains, strict=True)
            )
            for i, query in enumerate(queries):
                weights = np.exp(keys @ query / math.sqrt(8))
                attended[i, part] = weights @ v[:, part] / weights.sum()
        hidden = tokens + linear(attended, block.proj)
        inner = linear(layer_norm(hidden) * (1 + scale2) + shift2, block.fc1)
        inner = inner / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
        np.testing.assert_allclose(output, hidden + linear(inner, block.fc2), rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_skips_pair_the_levels_and_end_where_they_began():
    """The last block of the way up gets what the first block of the way down gave, at every level."""
    network, kept, used = tiny(second_time=False).eval(), [], []
    for name, module in network.encoder.items():
        if "_block" in name:
            module.register_forward_hook(lambda _, arguments, output: kept.append(output))
    for name, module in network.decoder.items():
        if "_block" in name:
            module.register_forward_pre_hook(lambda _, arguments: used.append(arguments[2]))
    network(*inputs()[:2])
    assert len(kept) == 3 and all(a is b for a, b in zip(kept, reversed(used), strict=True))


# Properties


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("second_time", [True, False])
@torch.no_grad()
def test_shapes(patch_size, second_time):
    mult, blocks = ((1, 2, 4), (1, 2)) if patch_size == 1 else ((2, 4), (1,))
    network = tiny(
        second_time=second_time, extra_channels=2, patch_size=patch_size, channel_mult=mult, num_blocks=blocks
    ).eval()  # fmt: skip
    x, t, s, label = inputs(channels=5)
    output = network(x, t, s if second_time else None, label)
    assert output.shape == (6, 3, 8, 8) and output.dtype == torch.float32
    assert network.position.shape == (1, 4, 32)
    changed = torch.cat([x[:, :3], x[:, 3:] + 1], dim=1)
    assert (network(changed, t, s if second_time else None, label) - output).abs().mean() > 1e-2 * output.abs().mean()


@torch.no_grad()
def test_patches_are_put_back_where_they_were():
    """Only the pixels of one patch see a change of the weights that make one pixel of it."""
    network = tiny(patch_size=2, channel_mult=(2, 4), num_blocks=(1,)).eval()
    before = network(*inputs())
    network.out_conv.bias[7] += 1  # channel 1 of 3, row 1 and column 1 of the patch: 1 * 4 + 1 * 2 + 1
    difference = network(*inputs()) - before
    expected = torch.zeros_like(difference)
    expected[:, 1, 1::2, 1::2] = 1
    torch.testing.assert_close(difference, expected, rtol=0, atol=1e-5)


def test_built_by_name():
    settings = from_dict(UViTSettings, {"kind": "uvit", "model_channels": 8, "channel_mult": [1, 4], "num_blocks": [2],
                                        "depth": 1, "channels_per_head": 8})  # fmt: skip
    network = build_network(settings, resolution=8, channels=3, num_classes=3, second_time=False)
    assert isinstance(network, UViT) and network.settings is settings and network.second_time_mlp is None
    with pytest.raises(ConfigError, match="'uvit' takes no augmentation label"):
        build_network(settings, resolution=8, channels=3, augment_dim=9)
    with pytest.raises(ValueError, match="no augmentation label"):
        network(*inputs()[:2], augment=torch.zeros(6, 9))


def test_starts_as_zero():
    """The output as zero, and every block as the identity."""
    network = UViT(TINY, 8, 3, CLASSES)
    assert (network(*inputs()) == 0).all()
    x, emb = torch.randn(2, 4, 32), torch.randn(2, 24)
    assert all(torch.equal(block(x, emb), x) for block in network.transformer)
    x, kept = torch.randn(2, 2, 8, 8, 8)
    assert torch.equal(network.encoder["8x8_block0"](x, emb), x)
    assert torch.equal(network.decoder["8x8_block0"](x, emb, kept), x)


def test_every_parameter_gets_a_gradient():
    network = tiny()
    network(*inputs()).pow(2).mean().backward()
    for name, p in network.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


@torch.no_grad()
def test_images_do_not_influence_each_other():
    """Alone, in a batch, or in another order: the same to rounding."""
    network, given = tiny().eval(), inputs()
    together = network(*given)
    alone = torch.cat([network(*(v[i : i + 1] for v in given)) for i in range(6)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(network(*(v[order] for v in given)), together[order], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_every_input_has_an_effect():
    """Each of x, t, s and the label, by far more than rounding."""
    network, given = tiny().eval(), inputs()
    output = network(*given)
    for position, change in ((0, given[0].flip(0)), (1, given[1] + 20), (2, given[2] + 20), (3, Labels((given[3].classes + 1) % 6, CLASSES))):
        changed = [*given[:position], change, *given[position + 1 :]]
        assert ((network(*changed) - output).abs().flatten(1).mean(1) > 1e-3 * output.abs().mean()).all(), position


@torch.no_grad()
def test_every_pixel_sees_every_pixel():
    """Through the transformer; without it (its blocks being the identity) the far corner is out of reach."""
    reach = []
    for blocks in (True, False):
        network, (x, t, s, label) = tiny(channel_mult=(1, 4), num_blocks=(1,)).double().eval(), inputs(1)
        if not blocks:
            network.transformer = nn.ModuleList()
        for module in network.modules():  # group norms see the whole image: taken out
            if isinstance(module, nn.GroupNorm):
                module.forward = lambda v: v
        changed = x.clone()
        changed[:, :, 0, 0] += 1
        reach.append((network(changed.double(), t, s, label) - network(x.double(), t, s, label))[..., -1, -1].abs().max().item())
    assert reach[0] > 1e-6 and reach[1] == 0


@torch.no_grad()
def test_null_label():
    """The null class is no label; and a network without classes takes no notice of labels."""
    network, (x, t, s, label) = tiny().eval(), inputs()
    null = network(x, t, s, label.null())
    assert torch.equal(null, network(x, t, s, None))
    assert not torch.allclose(network(x, t, s, label)[:5], null[:5], rtol=1e-2)
    unconditional = tiny(num_classes=0).eval()
    assert torch.equal(unconditional(x, t, s, label), unconditional(x, t, s))


@torch.no_grad()
def test_float32_is_float64_to_rounding():
    network, (x, t, s, label) = tiny().eval(), inputs()
    single = network(x, t, s, label)
    double = network.double()(x.double(), t, s, label)
    assert double.dtype == torch.float64
    error = (single - double).pow(2).mean().sqrt() / double.pow(2).mean().sqrt()
    assert 1e-9 < error < 1e-5


def test_bfloat16_autocast():
    """Half precision is what it is trained in: close to float32, gradients in float32."""
    network, given = tiny().eval(), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        half = network(*given)
        half.float().pow(2).mean().backward()
    with torch.no_grad():
        full = network(*given)
    assert (half.float() - full).pow(2).mean().sqrt() < 0.05 * full.pow(2).mean().sqrt()
    assert all(p.grad.dtype == torch.float32 for p in network.parameters())


@torch.no_grad()
def test_dropout_is_in_the_low_levels_only():
    """At sides up to dropout_resolution, and in modules that a student's own masks can be given to."""
    network, given = tiny(), inputs()
    rates = {name: module.p for name, module in network.named_modules() if isinstance(module, nn.Dropout)}
    assert len(rates) == 3 + 3 + 2
    assert all(rate == (0 if "8x8" in name else 0.2) for name, rate in rates.items()), rates
    masks_are_the_seeds(network, given)


def test_gradient_checkpointing_changes_no_gradient():
    """Dropout included, as the masks are drawn again from the same state."""
    results = []
    for checkpointing in (False, True):
        network = tiny(gradient_checkpointing=checkpointing)
        torch.manual_seed(3)
        network(*inputs()).pow(2).mean().backward()
        results.append([p.grad for p in network.parameters()])
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-5, atol=1e-8)


def test_a_students_own_masks_with_gradient_checkpointing():
    """Masks by key: the same with and without checkpoints, forward and backward, and other ones for other keys."""
    results = []
    for checkpointing, seed in ((False, 0), (True, 0), (True, 1)):
        network = tiny(gradient_checkpointing=checkpointing).eval()
        with keyed_dropout(network, keys(seed, torch.arange(6), 0)):
            output = network(*inputs())
        output.pow(2).mean().backward()
        results.append([output.detach(), *(p.grad for p in network.parameters())])
    for plain, checkpointed in zip(*results[:2], strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-5, atol=1e-8)
    assert not torch.allclose(results[2][0], results[0][0], rtol=1e-2)


@pytest.mark.parametrize("patch_size", [1, 2])
@torch.no_grad()
def test_extra_channels_that_were_put_in_later_change_nothing(patch_size):
    """A student with a noise input begins as its teacher, whatever the noise; patches keep the order of the channels."""
    changes = {"channel_mult": (2, 4), "num_blocks": (1,), "patch_size": patch_size}
    teacher, student = tiny(**changes).eval(), tiny(extra_channels=2, **changes).eval()
    student.load_state_dict(widen_input(teacher.state_dict(), student))
    x, *rest = inputs(channels=5)
    torch.testing.assert_close(student(x, *rest), teacher(x[:, :3], *rest), rtol=1e-5, atol=1e-6)


def test_forward_mode_derivative():
    """What the instant method takes of a teacher: a Jacobian-vector product in the parameters, against finite differences.

    The attention in its plain form, as the fused one has no forward derivative.
    """
    network, (x, t, s, label) = tiny().double().eval(), inputs(2)
    parameters = {name: p.detach() for name, p in network.named_parameters()}
    torch.manual_seed(0)
    direction = {name: torch.randn_like(p) for name, p in parameters.items()}

    def output(values):
        return torch.func.functional_call(network, values, (x.double(), t, s, label))

    with sdpa_kernel(SDPBackend.MATH):
        _, found = torch.func.jvp(output, (parameters,), (direction,))
        sides = [output({name: p + h * direction[name] for name, p in parameters.items()}) for h in (1e-6, -1e-6)]
    difference = (sides[0] - sides[1]) / 2e-6
    assert (found - difference).abs().max() < 1e-6 * difference.abs().max()


def parameters(settings: UViTSettings, resolution: int) -> tuple[int, int]:
    """Of the network, and of its transformer."""
    with torch.device("meta"):
        network = UViT(settings, resolution, 3, 1000, second_time=False)
    return tuple(sum(p.numel() for p in part.parameters()) for part in (network, network.transformer))


def test_parameter_counts():
    """The default has about 2 billion, nearly all in 36 transformer blocks of width 2048, which are counted by hand."""
    d, e, heads = 2048, 1024, 128
    block = (e + 1) * 4 * d + (d + 1) * 3 * d + (d + 1) * d + 2 * heads + (d + 1) * 4 * d + (4 * d + 1) * d
    total, transformer = parameters(UViTSettings(), 128)
    assert transformer == 36 * block
    assert 2.0e9 < total < 2.3e9 and total - transformer < 0.05 * total

    smaller = dataclasses.replace(UViTSettings(), model_channels=256, channel_mult=(1, 2, 4), num_blocks=(3, 3), depth=22)
    total, _ = parameters(smaller, 64)
    assert 4.0e8 < total < 4.4e8


@pytest.mark.parametrize(
    "changes, resolution, words",
    [
        ({"num_blocks": (1,)}, 8, "num_blocks"),
        ({"num_blocks": (1, 0)}, 8, "num_blocks"),
        ({"channel_mult": (4,), "num_blocks": ()}, 8, "at least 2 levels"),
        ({}, 10, "multiple of 4, not 10"),
        ({"patch_size": 4}, 8, "multiple of 16, not 8"),
        ({"channels_per_head": 12}, 8, "heads of 12"),
        ({"model_channels": 9, "channels_per_head": 9}, 8, "groups"),
    ],
)
def test_impossible_settings(changes, resolution, words):
    with pytest.raises(ConfigError, match=words):
        UViT(dataclasses.replace(TINY, **changes), resolution, 3)
