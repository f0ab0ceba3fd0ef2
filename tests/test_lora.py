"""Adapters in one frozen network: what they begin as, whose gradient is whose, what they come to when they are merged."""

import pytest
import torch
from test_checkpointing import NETWORKS, inputs
from torch import nn
from torch.nn import functional as F

from mmgen.errors import ConfigError
from mmgen.networks import DiffusersUNetSettings, build_network, checkpoint_blocks
from mmgen.networks.conditions import Labels
from mmgen.networks.lora import LoraBase, merged, product, target_names
from mmgen.networks.winograd import Conv2d

LABELS = Labels(torch.arange(4), 10)
UNET2D = (
    '{"act_fn": "silu", "block_out_channels": [8, 16], "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "in_channels": 3, '
    '"layers_per_block": 1, "norm_num_groups": 4, "num_class_embeds": 10, "out_channels": 3, "sample_size": 8, '
    '"up_block_types": ["AttnUpBlock2D", "UpBlock2D"], "attention_head_dim": 4}'
)
KINDS = {**{kind: settings for kind, settings in NETWORKS.items() if kind != "edm2"}, "diffusers": DiffusersUNetSettings(config=UNET2D)}


def make(kind):
    torch.manual_seed(0)
    network = build_network(KINDS[kind], resolution=8, channels=3, num_classes=10, second_time=False).eval()
    for weight in network.parameters():
        nn.init.normal_(weight, std=0.2)
    return network


def random_weights(module, std=0.1):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_begin_as_the_base_and_disabled_they_are_the_base(kind):
    network, (x, t) = make(kind), inputs()
    with torch.no_grad():
        before = network(x, t, None, LABELS)
        base = LoraBase(network)
        student, auxiliary = base.add("student", 4), base.add("auxiliary", 2)
        for view in (student, auxiliary, base.itself()):
            assert torch.equal(view(x, t, None, LABELS), before)
        random_weights(student)
        changed = student(x, t, None, LABELS)
        assert (changed - before).abs().max() > 1e-3 * before.abs().max()
        for view in (auxiliary, base.itself()):
            assert torch.equal(view(x, t, None, LABELS), before)
        assert torch.equal(student(x, t, None, LABELS), changed)


@pytest.mark.parametrize("kind", KINDS)
def test_every_adapted_layer_has_a_gradient_and_nothing_else_has(kind):
    network, (x, t) = make(kind), inputs()
    base = LoraBase(network)
    student, auxiliary = base.add("student", 4), base.add("auxiliary", 4)
    random_weights(student)
    loss = student(x, t, None, LABELS).square().mean()
    with torch.no_grad():  # between a pass and its backward pass, as in the objectives
        auxiliary(x, t, None, LABELS), base.itself()(x, t, None, LABELS)
    loss.backward()
    assert len(list(student.parameters())) == 2 * len(base.names) > 20
    assert all(p.grad is not None and p.grad.any() for p in student.parameters())
    own = {id(p) for p in student.parameters()}
    assert all(p.grad is None for p in network.parameters() if id(p) not in own)
    assert all(p.requires_grad for view in (student, auxiliary) for p in view.parameters())


@pytest.mark.parametrize("kind", ["dit", "unet", "uvit"])
def test_recomputed_blocks_have_the_adapter_of_their_pass(kind):
    """Gradient checkpointing: in the backward pass blocks run again, after other adapters were used."""
    found = []
    for checkpointing in (False, True):
        base = LoraBase(make(kind))
        torch.manual_seed(1)
        student, auxiliary = base.add("student", 4), base.add("auxiliary", 4)
        random_weights(student), random_weights(auxiliary)
        if checkpointing:
            checkpoint_blocks(student)
            assert base.network.settings.gradient_checkpointing
        x, t = inputs()
        loss = student(x, t, None, LABELS).square().mean()
        with torch.no_grad():
            auxiliary(x, t, None, LABELS), base.itself()(x, t, None, LABELS)
        loss.backward()
        found.append([p.grad for p in student.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_are_the_adapted_network(kind):
    network, (x, t) = make(kind), inputs()
    original = {key: value.clone() for key, value in network.state_dict().items()}
    base = LoraBase(network)
    student = base.add("student", 4)
    random_weights(student)
    whole = merged(network, student.state_dict())
    assert whole.keys() == original.keys()
    changed = {key for key, value in whole.items() if not torch.equal(value, original[key])}
    assert changed == {f"{name}.weight" for name in base.names}
    plain = make(kind)
    plain.load_state_dict(whole)
    with torch.no_grad():
        ours, theirs = student(x, t, None, LABELS), plain(x, t, None, LABELS)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-5 * theirs.abs().max().item())  # float32: W x + B A x, (W + B A) x


def test_a_convolutions_product_is_one_convolution_after_another():
    a, b, x = torch.randn(3, 5, 3, 3), torch.randn(7, 3, 1, 1), torch.randn(2, 5, 8, 8)
    torch.testing.assert_close(F.conv2d(x, product(a, b), padding=1), F.conv2d(F.conv2d(x, a, padding=1), b), rtol=1e-4, atol=1e-4)
    a, b, x = torch.randn(3, 5), torch.randn(7, 3), torch.randn(2, 5)
    torch.testing.assert_close(x @ product(a, b).T, x @ a.T @ b.T, rtol=1e-4, atol=1e-5)


def test_a_wide_convolution_without_bias_as_an_adapter_of_high_rank_has_it():
    layer = Conv2d(128, 128, 3, padding=1, bias=False)
    x = torch.randn(1, 128, 16, 16)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight, padding=1))


def test_targets():
    network = make("dit")
    everything = target_names(network)
    assert "patch_embed" in everything and "time_mlp.linear0" in everything and "label_embed" not in everything  # an nn.Embedding
    fc1 = target_names(network, ("fc1",))
    assert fc1 == [name for name in everything if name.endswith(".fc1")] and len(fc1) == 3
    with pytest.raises(ConfigError, match="'nothing' is the end of no linear or convolution layer's name"):
        target_names(network, ("fc1", "nothing"))
    with pytest.raises(ConfigError, match="kind 'edm2' has no plain linear or convolution layers"):
        target_names(build_network(NETWORKS["edm2"], resolution=8, channels=3, second_time=False))
    of_diffusers = target_names(make("diffusers"))
    assert any(name.endswith("to_out.0") for name in of_diffusers) and any(name.endswith("conv1") for name in of_diffusers)
    assert "unet.conv_in" not in of_diffusers
    with_augment = build_network(NETWORKS["unet"], resolution=8, channels=3, augment_dim=9, second_time=False)
    assert "augment_embed" not in target_names(with_augment)  # a student never calls it
