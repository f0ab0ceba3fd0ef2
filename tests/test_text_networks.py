"""Text in networks: what reaches the output, what is zero at first, and that networks without text are what they were."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import torch

from mmgen.diffusion.preconditioning import DenoiserSettings
from mmgen.errors import ConfigError
from mmgen.models.conditions import example
from mmgen.models.config import ModelConfig
from mmgen.models.denoiser import Denoiser
from mmgen.models.files import load_model, save_model
from mmgen.models.guidance import guided
from mmgen.networks import ADMSettings, DiTSettings, UNetSettings, UViTSettings, build_network
from mmgen.networks.conditions import Labels, Text, concatenate
from mmgen.networks.text import CrossAttention, TextSettings, byte_ids, byte_text

NETWORKS = {
    "unet": UNetSettings(model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), dropout=0.0),
    "dit": DiTSettings(hidden_size=16, depth=2, num_heads=2),
    "uvit": UViTSettings(model_channels=8, channel_mult=(1, 2), num_blocks=(1,), depth=1, channels_per_head=8, emb_channels=16),
}
BYTES = TextSettings(length=12, width=16, depth=1, heads=2)
FROZEN = TextSettings(encoder="folder", length=4, width=6, pooled=5, heads=2)
EACH = pytest.mark.parametrize("kind", list(NETWORKS))


def build(kind, text=BYTES, awake=True):
    torch.manual_seed(0)
    network = build_network(NETWORKS[kind], resolution=8, channels=1, second_time=False, text=text).eval()
    with torch.no_grad():
        for parameter in network.parameters() if awake else ():
            if parameter.abs().max() < 1e-3:
                torch.nn.init.normal_(parameter, std=0.3)
    return network


def features(count=3):
    torch.manual_seed(1)
    empty = Text(torch.randn(1, 4, 6), torch.tensor([[True, False, False, False]]), torch.randn(1, 5))
    mask = torch.tensor([[True, True, True, False]]).expand(count, 4)
    return Text(torch.randn(count, 4, 6), mask, torch.randn(count, 5), empty=empty)


def inputs(count=3):
    torch.manual_seed(2)
    return torch.randn(count, 1, 8, 8), torch.full((count,), 0.5, dtype=torch.float64), None


ROUNDING = 5e-5  # of float32, where a batch of another size adds up in another order: 2e-6 measured


@EACH
@pytest.mark.parametrize("text, condition", [(BYTES, byte_text(["a thin seven", "", "bold"], 12)[0]), (FROZEN, features())])
def test_each_image_has_its_own_text_and_padding_has_no_say(kind, text, condition):
    network = build(kind, text)
    whole = network(*inputs(), condition)
    assert (whole[0] - network(*inputs(), condition[[2, 1, 0]])[0]).abs().max() > 1e-3  # another text, another image
    for i in range(3):  # alone as in a batch
        x, t, _ = inputs()
        alone = network(x[i : i + 1], t[i : i + 1], None, condition[i : i + 1])
        assert torch.allclose(alone[0], whole[i], atol=ROUNDING)
    hidden = torch.where(condition.mask.reshape(*condition.mask.shape, *[1] * (condition.tokens.ndim - 2)), condition.tokens, 7)
    assert torch.allclose(network(*inputs(), replace(condition, tokens=hidden)), whole, atol=ROUNDING)


@EACH
@pytest.mark.parametrize("text", [BYTES, FROZEN], ids=["bytes", "frozen"])
def test_no_condition_is_the_null_of_the_model_file(kind, text):
    network, given = build(kind, text), features()
    if text is FROZEN:
        network.text.set_null(given.empty)
        assert torch.equal(network.state_dict()["text.null_tokens"], given.empty.tokens)
    else:
        given = byte_text(["x", "y", "z"], 12)[0]
    assert torch.allclose(network(*inputs(), None), network(*inputs(), given.null()), atol=ROUNDING)
    hidden = given.hidden(torch.tensor([True, False, True]))
    both = network(*inputs(), hidden)
    assert torch.allclose(both[0], network(*inputs(), None)[0], atol=ROUNDING)
    assert torch.allclose(both[1], network(*inputs(), given)[1], atol=ROUNDING)
    w = guided(network, *inputs(), given, 3.0)
    u, c = network(*inputs(), None), network(*inputs(), given)
    assert torch.allclose(w, u + 3 * (c - u), atol=1e-4)


@EACH
def test_attention_to_the_text_is_zero_at_first_and_learns(kind):
    network = build(kind, awake=False)
    crosses = [module for module in network.modules() if isinstance(module, CrossAttention)]
    assert crosses and not any(module.proj.weight.any() or module.proj.bias.any() for module in crosses)
    network = build(kind)
    network(*inputs(), byte_text(["a", "b", "c"], 12)[0]).square().sum().backward()
    crosses = [module for module in network.modules() if isinstance(module, CrossAttention)]
    assert all(module.proj.weight.grad.any() and module.key_value.weight.grad.any() for module in crosses)
    assert network.text.embed.weight.grad[2 + ord("a")].any() and not network.text.embed.weight.grad[2 + ord("q")].any()


# Of these networks before they knew text, 10 classes and 8 x 8 grey, with seed 0: the keys, and a weighted sum of the weights
BEFORE = {"unet": ("30768f6cb7a94f45", -28.844857), "dit": ("735ac9872f1d8408", -2.228371), "uvit": ("06d9623c9ce91bb0", -16.798375)}


def summary(state):
    weights = torch.cat([value.double().flatten() for value in state.values()])
    keys = hashlib.sha256(" ".join(state).encode()).hexdigest()[:16]
    return keys, float(weights @ torch.cos(torch.arange(len(weights), dtype=torch.float64)))


@EACH
def test_without_text_the_weights_are_what_they_were(kind):
    torch.manual_seed(0)
    network = build_network(NETWORKS[kind], resolution=8, channels=1, num_classes=10, second_time=True)
    keys, total = summary(network.state_dict())
    assert keys == BEFORE[kind][0] and total == pytest.approx(BEFORE[kind][1], rel=1e-4)


def test_bytes_are_utf8_cut_at_the_length_and_counted():
    ids, mask, cut = byte_ids(["", "é", "abcd"], 4)
    assert ids.tolist() == [[1, 0, 0, 0], [1, 197, 171, 0], [1, 99, 100, 101]] and cut == 1
    assert mask.sum(1).tolist() == [1, 3, 4]


def test_the_sizes_of_sdxl_stay_and_the_pooled_vector_does_not():
    given = replace(features(), sizes=torch.arange(18.0).reshape(3, 6))
    null = given.null()
    assert torch.equal(null.sizes, given.sizes) and torch.equal(null.pooled[2], given.empty.pooled[0])
    assert len(concatenate([null, given])) == 6 and given.to("meta").empty.pooled.device.type == "meta"
    with pytest.raises(ValueError, match="no null"):
        replace(given, empty=None).null()


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ConfigError, match="on text or on classes"):
        build_network(NETWORKS["dit"], resolution=8, channels=1, num_classes=3, text=BYTES)
    with pytest.raises(ConfigError, match="takes no text"):
        build_network(ADMSettings(), resolution=32, channels=1, text=BYTES)
    with pytest.raises(ConfigError, match="conditioned on text, not on Labels"):
        build("dit")(*inputs(), Labels(torch.tensor([0, 1, 2]), 3))
    with pytest.raises(ConfigError, match="takes texts of"):
        build("dit")(*inputs(), byte_text(["a"] * 3, 5)[0])
    with pytest.raises(ConfigError, match="text.width 10 must be a multiple"):
        build("dit", replace(BYTES, width=10, heads=4))


@pytest.mark.parametrize("text", [BYTES, FROZEN], ids=["bytes", "frozen"])
def test_a_model_file_is_complete(tmp_path, text):
    config = ModelConfig(NETWORKS["unet"], None, 8, 1, text=text, captions=["a seven"], denoiser=DenoiserSettings())
    model = Denoiser(config, build("unet", text)).eval()
    condition = byte_text(["a thin seven"] * 2, 12)[0] if text is BYTES else features(2)
    if text is FROZEN:
        model.network.text.set_null(condition.empty)
    save_model(tmp_path / "m.safetensors", config, model.network.state_dict())
    again = load_model(tmp_path / "m.safetensors")
    assert again.config == config
    y, sigma = torch.randn(2, 1, 8, 8), torch.full((2,), 0.7, dtype=torch.float64)
    for given in (condition, None):
        assert torch.equal(again.denoise(y, sigma, given), model.denoise(y, sigma, given))
    assert len(example(config, 3, "cpu")) == 3
