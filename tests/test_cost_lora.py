"""What --dry-run says of LoRA and of optimisers without a first moment, against networks and optimisers that are there."""

from dataclasses import replace

import pytest
from real_pipelines import ATTENTION, ATTENTION_OF_TEXT, real_model
from test_checkpointing import NETWORKS
from test_lora import UNET2D

from mmgen.config.sections import TrainSettings
from mmgen.errors import ConfigError
from mmgen.models.config import ModelConfig
from mmgen.models.denoiser import DenoiserSettings
from mmgen.networks import DiffusersUNetSettings, build_network
from mmgen.networks.lora import LoraBase
from mmgen.training.batches import BatchSplit
from mmgen.training.cost import ALTERNATING, INSTANT, Adapters, PassCost, estimate, pass_cost

KINDS = {**NETWORKS, "diffusers": DiffusersUNetSettings(config=UNET2D.replace('"num_class_embeds": 10, ', ""))}


def model(kind):
    return ModelConfig(network=KINDS[kind], flow=None, denoiser=DenoiserSettings(), resolution=8, channels=3)


@pytest.mark.parametrize("kind", ["dit", "unet", "uvit", "diffusers"])
def test_adapters_are_counted_and_frozen_weights_are_no_activations(kind):
    network = build_network(KINDS[kind], resolution=8, channels=3, second_time=False)
    base = LoraBase(network)
    weights = sum(p.numel() for p in network.parameters())
    sizes = tuple(sum(p.numel() for p in base.add(name, rank).parameters()) for name, rank in (("a", 4), ("b", 2)))
    plain, lora = (pass_cost(model(kind), "fp32", adapters=adapters) for adapters in (None, Adapters((4, 2))))
    assert lora.parameters == plain.parameters == weights and lora.adapters == sizes
    assert plain.flops < lora.flops < 2.5 * plain.flops
    assert lora.bytes < 1.6 * plain.bytes


def test_bytes_of_a_distillation_by_lora():
    one = pass_cost(model("dit"), "fp32", adapters=Adapters((4, 2)))
    cost = estimate(TrainSettings(ema_betas=(0.9,)), model("dit"), BatchSplit(8, 1, 1), ALTERNATING, one=one, moments=1, adapters=Adapters((4, 2)))
    first, second = one.adapters
    assert cost.trained == first + second
    assert cost.weights == 4 * (one.parameters + first + second + first)  # the base once, adapters, a gradient
    assert cost.optimizer == 4 * (first + second) and cost.averages == 4 * first
    instant = estimate(TrainSettings(ema_betas=()), model("dit"), BatchSplit(8, 1, 1), INSTANT, one=one, moments=1, adapters=Adapters((4, 2)))
    assert instant.optimizer == 4 * first  # the auxiliary's adapter only says where the direction lies ...
    assert instant.weights == 4 * (one.parameters + first + second + first + 2 * second)  # ... its gradient and the direction are there


def test_half_precision_copies():
    """Autocast keeps those of weights with a gradient for the time of a pass; of frozen ones what the graph holds."""
    full, lora = (pass_cost(model("dit"), "bf16", adapters=adapters) for adapters in (None, Adapters((4, 2))))
    train, parts = TrainSettings(precision="bf16", ema_betas=()), BatchSplit(8, 1, 1)
    assert estimate(train, model("dit"), parts, ALTERNATING, one=full).copies == 2 * 2 * full.parameters
    assert estimate(train, model("dit"), parts, ALTERNATING, one=lora, adapters=Adapters((4, 2))).copies == 2 * lora.parameters
    assert estimate(train, model("dit"), parts, ALTERNATING, checkpointing=True, one=lora, adapters=Adapters((4, 2))).copies == 0


def test_gradient_checkpointing_of_adapters_keeps_less():
    without, with_it = (pass_cost(model("unet"), "fp32", checkpointing, Adapters((4, 4))) for checkpointing in (False, True))
    assert with_it.bytes < 0.6 * without.bytes


@pytest.mark.slow
@pytest.mark.parametrize(("name", "weights", "attention", "gib"), [
    ("sd15", 859.5, 12.8, 1.20), ("sdxl", 2567.5, 92.9, 8.47), ("pixart", 610.9, 33.0, 1.94), ("sd3", 2028.3, 37.6, 8.26),
])  # fmt: skip
def test_sizes_of_known_models(name, weights, attention, gib):
    """Millions of parameters, of a LoRA of rank 64 in the attention, and GiB of activations an image in half precision."""
    targets = ATTENTION + ATTENTION_OF_TEXT * (name == "sd3")
    plain = pass_cost(real_model(name), "bf16")
    lora = pass_cost(real_model(name), "bf16", checkpointing=True, adapters=Adapters((64, 64), targets))
    assert plain.parameters / 1e6 == pytest.approx(weights, abs=0.06) and lora.adapters[0] / 1e6 == pytest.approx(attention, abs=0.06)
    assert plain.bytes / 2**30 == pytest.approx(gib, rel=0.02)
    assert lora.bytes < 0.3 * plain.bytes


def test_memory_of_stable_diffusion():
    """In full, alternating: weights of three networks, a gradient, two moments each: 25.6 GiB, and 19.2 without Adam's first."""
    one = PassCost(859_520_964, 0.8e12, 1.2 * 2**30)
    train, parts = TrainSettings(ema_betas=()), BatchSplit(1, 1, 1)
    found = [estimate(train, model("dit"), parts, ALTERNATING, one=one, moments=kept) for kept in (2, 1)]
    assert [(cost.total - cost.activations) / 2**30 for cost in found] == pytest.approx([25.6, 19.2], abs=0.05)
    lora = replace(one, adapters=(12_754_944,) * 2)
    by_lora = estimate(train, model("dit"), parts, ALTERNATING, one=lora, moments=1, adapters=Adapters((64, 64)))
    assert (by_lora.total - by_lora.activations) / 2**30 == pytest.approx(3.44, abs=0.01)


def test_a_network_without_layers_for_adapters_is_refused():
    with pytest.raises(ConfigError, match="kind 'edm2' has no plain linear or convolution layers"):
        pass_cost(model("edm2"), "fp32", adapters=Adapters((4, 4)))
