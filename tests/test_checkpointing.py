"""Gradient checkpointing: less memory, and the same numbers to the last bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from toy_task import Quiet

from mmgen.models.denoiser import DenoiserSettings
from mmgen.errors import ConfigError
from mmgen.diffusion.flow_map import FlowMapSettings
from mmgen.config.imm import resolve
from mmgen.losses.moment_matching import forward_derivative, teacher_gradient
from mmgen.models.config import ModelConfig
from mmgen.networks import ADMSettings, DiTSettings, EDM2Settings, UNetSettings, UViTSettings, build_network, checkpoint_blocks
from mmgen.training.batches import BatchSplit
from mmgen.training.cost import DENOISING, estimate, pass_cost
from mmgen.methods.imm.objective import imm_task
from mmgen.methods import IMM
from mmgen.methods.run import train

NETWORKS = {
    "dit": DiTSettings(hidden_size=32, depth=3, num_heads=2),
    "unet": UNetSettings(model_channels=16, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), dropout=0.3),
    "adm": ADMSettings(
        model_channels=16, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), channels_per_head=16, dropout=0.3
    ),
    "edm2": EDM2Settings(
        model_channels=16, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), channels_per_head=16, dropout=0.3
    ),
    "uvit": UViTSettings(
        model_channels=16, channel_mult=(1, 2), num_blocks=(1,), depth=2, channels_per_head=16, emb_channels=16, dropout=0.3
    ),
}


def make(kind: str) -> nn.Module:
    torch.manual_seed(0)
    network = build_network(NETWORKS[kind], resolution=8, channels=3, second_time=False)
    for weight in network.parameters():
        nn.init.normal_(weight, std=0.2)
    return network.train()


def inputs(count: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 8, 8, generator=generator), torch.linspace(0, 900, count, dtype=torch.float64)


@pytest.mark.parametrize("kind", NETWORKS)
def test_loss_and_gradients_are_the_same_bit_for_bit(kind):
    """With dropout, whose masks are drawn again; and less is kept for the backward pass."""
    found, kept = [], []
    for checkpointing in (False, True):
        network = make(kind)
        names = list(network.state_dict())
        if checkpointing:
            checkpoint_blocks(network)
        assert list(network.state_dict()) == names
        sizes = []
        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            loss = network(*inputs()).square().sum()
        after = torch.rand(1)
        loss.backward()
        found.append([loss.detach(), after, *(p.grad for p in network.parameters())])
        kept.append(sum(sizes))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert kept[1] < kept[0] / 2


def test_a_run_trains_the_same_weights(tmp_path, own_cache):
    """Of IMM, whose two passes have the same dropout masks."""
    weights = []
    for checkpointing in (False, True):
        config = resolve({
            "network": {"kind": "unet", "model_channels": 8, "channel_mult": [1], "num_blocks": 1, "dropout": 0.2},
            "data": {"conditional": True}, "optimizer": {"lr": 1e-3},
            "train": {"batch_size": 16, "max_images": 48, "precision": "fp32"},
            "run": {"batch_per_device": 8, "eval_num": 0, "eval_steps": [1], "gradient_checkpointing": checkpointing},
        })  # fmt: skip
        out = tmp_path / str(checkpointing)
        train(IMM, config, out, Quiet(), device="cpu")
        weights.append(load_file(out / "checkpoints/000000000048/network.safetensors"))
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_a_teacher_that_recomputes_its_blocks_has_the_gradients_of_one_that_does_not(kind):
    """The instant method differentiates by parameters that are put in the place of the network's own, and in forward mode."""
    found = []
    x, t = inputs()
    for checkpointing in (False, True):
        network = make(kind).eval().requires_grad_(False)
        if checkpointing:
            checkpoint_blocks(network)
        parameters = {name: value.detach() for name, value in network.named_parameters()}
        moved = {name: value + 0.01 for name, value in parameters.items()}  # a gradient at others than the network's own

        def function(values):
            return torch.func.functional_call(network, values, (x, t))  # noqa: B023

        gradient = teacher_gradient(function, moved, torch.zeros_like(x), torch.ones(len(x), dtype=torch.float64))
        along = forward_derivative(function, moved, parameters)
        found.append([*gradient.values(), *along])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_network_that_cannot_is_refused():
    network = nn.Linear(1, 1)
    network.settings = type("Settings", (), {"kind": "diffusers_unet2d"})()
    with pytest.raises(ConfigError, match="diffusers_unet2d.*leave it out"):
        checkpoint_blocks(network)


def test_the_estimate_knows_it():
    """Memory: what goes into each block and the inside of one. Arithmetic: what torch counts in a backward pass."""
    settings = DiTSettings(hidden_size=64, depth=12, num_heads=4)
    config = ModelConfig(network=settings, flow=None, denoiser=DenoiserSettings(), resolution=16, channels=3)
    plain, less = pass_cost(config, "fp32"), pass_cost(config, "fp32", True)
    tokens = 4 * 64 * 64  # bytes of what goes into a block: 64 tokens of 64 numbers
    assert plain.flops == less.flops and plain.parameters == less.parameters
    one_block = plain.bytes - pass_cost(replace(config, network=replace(settings, depth=11)), "fp32").bytes
    assert 12 * tokens + 0.8 * one_block < less.bytes < 14 * tokens + 1.3 * one_block
    assert pass_cost(replace(config, network=replace(settings, gradient_checkpointing=True)), "fp32") == less
    assert less.bytes / 2 < pass_cost(config, "bf16", True).bytes < less.bytes  # layer norms stay in float32: see test_meta_autocast.py

    network = build_network(settings, resolution=16, channels=3, second_time=False)
    checkpoint_blocks(network)
    x, t = torch.randn(2, 3, 16, 16), torch.rand(2, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # torch 2.6 counts no other on a CPU
        network(x, t).sum().backward()
    train = resolve({"train": {"batch_size": 2}}, {"loss": {"group_size": 1}}).train
    cost = estimate(train, config, BatchSplit(2, 1, 1), DENOISING, checkpointing=True)
    assert cost.flops_per_step == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_settings_reach_the_network():
    config = resolve({"network": {"kind": "dit", "hidden_size": 32, "depth": 1, "num_heads": 2}})
    model = ModelConfig(network=config.network, flow=FlowMapSettings(), resolution=8, channels=1)
    network = imm_task(config, model).trained["model"].network
    assert not network.settings.gradient_checkpointing
    checkpoint_blocks(network)
    assert network.settings.gradient_checkpointing and not model.network.gradient_checkpointing
