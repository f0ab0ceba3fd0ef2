"""What --dry-run says of LoRA and of optimisers without a first moment, against networks and optimisers that are there."""

import pytest
from test_checkpointing import NETWORKS
from test_lora import UNET2D

from mmgen.config.sections import TrainSettings
from mmgen.errors import ConfigError
from mmgen.models.config import ModelConfig
from mmgen.models.denoiser import DenoiserSettings
from mmgen.networks import DiffusersUNetSettings, build_network
from mmgen.networks.lora import LoraBase
from mmgen.training.batches import Parts
from mmgen.training.cost import ALTERNATING, INSTANT, Adapters, estimate, pass_cost

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
    cost = estimate(TrainSettings(ema_betas=(0.9,)), model("dit"), Parts(8, 1, 1), ALTERNATING, one=one, moments=1, adapters=Adapters((4, 2)))
    first, second = one.adapters
    assert cost.trained == first + second
    assert cost.weights == 4 * (one.parameters + first + second + first)  # the base once, adapters, a gradient
    assert cost.optimizer == 4 * (first + second) and cost.averages == 4 * first
    instant = estimate(TrainSettings(ema_betas=()), model("dit"), Parts(8, 1, 1), INSTANT, one=one, moments=1, adapters=Adapters((4, 2)))
    assert instant.optimizer == 4 * first  # the auxiliary's adapter only says where the direction lies ...
    assert instant.weights == 4 * (one.parameters + first + second + first + 2 * second)  # ... its gradient and the direction are there


def test_half_precision_copies():
    """Autocast keeps those of weights with a gradient for the time of a pass; of frozen ones what the graph holds."""
    full, lora = (pass_cost(model("dit"), "bf16", adapters=adapters) for adapters in (None, Adapters((4, 2))))
    train, parts = TrainSettings(precision="bf16", ema_betas=()), Parts(8, 1, 1)
    assert estimate(train, model("dit"), parts, ALTERNATING, one=full).copies == 2 * 2 * full.parameters
    assert estimate(train, model("dit"), parts, ALTERNATING, one=lora, adapters=Adapters((4, 2))).copies == 2 * lora.parameters
    assert estimate(train, model("dit"), parts, ALTERNATING, checkpointing=True, one=lora, adapters=Adapters((4, 2))).copies == 0


def test_gradient_checkpointing_of_adapters_keeps_less():
    without, with_it = (pass_cost(model("unet"), "fp32", checkpointing, Adapters((4, 4))) for checkpointing in (False, True))
    assert with_it.bytes < 0.6 * without.bytes


def test_a_network_without_layers_for_adapters_is_refused():
    with pytest.raises(ConfigError, match="kind 'edm2' has no plain linear or convolution layers"):
        pass_cost(model("edm2"), "fp32", adapters=Adapters((4, 4)))
