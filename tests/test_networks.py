"""Networks against outputs of the original implementations, key by key, and the properties that training relies on."""

from __future__ import annotations

import dataclasses

import pytest
from network_tools import masks_are_the_seeds, randomised
import torch
from golden import DEVICE, arrays, settings, state
from torch import nn

from mmgen.formats import imm
from mmgen.diffusion.flow_map import FlowMapSettings
from mmgen.models.config import ModelConfig
from mmgen.models.flow_model import FlowModel
from mmgen.networks import DiTSettings, UNetSettings, build_network
from mmgen.networks.conditions import Labels
from mmgen.networks.dit import grid_embedding
from mmgen.networks.unet import downsample, upsample

# hidden size, depth and heads of the sizes in arXiv:2212.09748, table 1
DIT_SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}

IMM = [
    "imm_ddpmpp_simple_edm_fm",
    "imm_ddpmpp_simple_edm_cosine_stride",
    "imm_ddpmpp_identity_fm_cond",
    "imm_dit_euler_fm_stride",
]
EDM = ["edm_ddpmpp_cond", "edm_ncsnpp_cond"]
TINY_UNET = UNetSettings(model_channels=16, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), dropout=0.2)
TINY_DIT = DiTSettings(hidden_size=48, depth=2, num_heads=4)


def network_settings(given: dict) -> UNetSettings | DiTSettings:
    if "patch_size" in given:
        return DiTSettings(**{name: given[name] for name in ("hidden_size", "depth", "num_heads", "patch_size")})
    return UNetSettings(
        model_channels=given["model_channels"], channel_mult=tuple(given["channel_mult"]), num_blocks=given["num_blocks"],
        attn_resolutions=tuple(given["attn_resolutions"]), embedding=given.get("embedding", "positional"),
        encoder=given.get("encoder", "standard"), resample="fir" if given.get("resample_filter") else "box",
    )  # fmt: skip


def golden_network(name: str, second_time: bool) -> nn.Module:
    given = settings(name)
    network = build_network(
        network_settings(given), resolution=given["resolution"], channels=given["channels"], num_classes=given["num_classes"],
        augment_dim=given.get("augment_dim", 0), second_time=second_time,
    )  # fmt: skip
    config, official = ModelConfig(network.settings, FlowMapSettings(), given["resolution"], given["channels"]), state(name)
    network.load_state_dict({key: official.pop(imm.original_name(config, key)) for key in network.state_dict()})
    assert all(key.endswith("resample_filter") for key in official)  # nothing else is left
    return network.eval().to(DEVICE)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the error of the worst image, relative to the output's. Measured: 1e-5 at most."""
    rms = [v.double().flatten(1).pow(2).mean(1).sqrt() for v in (found.double() - expected, expected)]
    return (rms[0] / rms[1]).max().item()


@pytest.mark.parametrize("name", IMM)
@torch.no_grad()
def test_golden_imm(name):
    # Where DiT's error is, 4e-6, a GELU of the exact kind would be seen: 2e-5. The U-Nets' is 8e-6 at most.
    tolerance = 1e-5 if "dit" in name else 5e-5
    given, g = settings(name), arrays(name)
    flow = FlowMapSettings(
        given["schedule"], given["parametrization"], given["second_time"], given["sigma_data"], float(given["time_scale"]),
        given["eps"], given["T"],
    )  # fmt: skip
    network = golden_network(name, second_time=True)
    config = ModelConfig(network.settings, flow, given["resolution"], given["channels"], given["num_classes"])
    model = FlowModel(config, network)
    x, s, t = g["x"].double(), g["s"], g["t"]
    label = Labels(g["label"], given["num_classes"]) if "label" in g else None
    assert error(model.f(x, s, t, label), g["f"]) < tolerance
    if label is not None:
        assert error(model.f(x, s, t), g["f_uncond"]) < tolerance
        assert error(model.f(x, s, t, label, 0.0), g["f_uncond"]) < tolerance
        assert error(model.f(x, s, t, label.null()), g["f_uncond"]) < tolerance
        assert error(model.f(x, s, t, label, 1.5), g["f_cfg1.5"]) < tolerance
        assert error(g["f_uncond"], g["f"]) > 1e-2  # the label matters


@pytest.mark.parametrize("name", EDM)
@torch.no_grad()
def test_golden_edm(name):
    """EDM's preconditioning (Karras et al., table 1) around the same networks without a second time."""
    g, network = arrays(name), golden_network(name, second_time=False)
    sigma = g["sigma"].double()[:, None, None, None]
    root = (sigma**2 + 0.25).sqrt()

    def denoise(label):
        output = network((g["z"] / root).float(), g["sigma"].double().log() / 4, condition=label)
        return 0.25 / root**2 * g["z"] + 0.5 * sigma / root * output

    assert error(denoise(Labels(g["label"], network.num_classes)), g["x_pred"]) < 2e-5
    if "x_pred_uncond" in g:
        assert error(denoise(None), g["x_pred_uncond"]) < 2e-5


def test_position_is_the_published_one():
    official = arrays("imm_dit_euler_fm_stride")["kept/model.pos_embed"]
    torch.testing.assert_close(grid_embedding(48, 4).float(), official, rtol=0, atol=1e-6)  # float32 rounding


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def test_parameter_counts_of_cifar10():
    with torch.device("meta"):
        assert parameters(build_network(UNetSettings(), resolution=32, channels=3)) == 56_061_443
        assert parameters(build_network(UNetSettings(), resolution=32, channels=3, augment_dim=9)) == 56_062_595


@pytest.mark.parametrize("size, count", [("S", 33_203_728), ("B", 131_288_080), ("L", 459_399_184), ("XL", 676_735_504)])
def test_parameter_counts_of_imagenet(size, count):
    hidden, depth, heads = DIT_SIZES[size]
    with torch.device("meta"):
        network = build_network(DiTSettings("dit", hidden, depth, heads), resolution=32, channels=4, num_classes=1000)
    assert parameters(network) + network.position.numel() == count  # the original counts the position, which is fixed
    assert len(network.state_dict()) == 16 + 10 * depth


# Properties


def tiny(kind: str, num_classes: int = 5, **options) -> nn.Module:
    chosen = dataclasses.replace(TINY_UNET if kind == "unet" else TINY_DIT, **options)
    return randomised(build_network(chosen, resolution=8, channels=3, num_classes=num_classes))


def inputs(count: int = 6):
    generator = torch.Generator().manual_seed(1)
    x, times = (
        torch.randn(count, 3, 8, 8, generator=generator),
        torch.rand(2, count, dtype=torch.float64, generator=generator),
    )
    return x, 1000 * times[0], 1000 * times[1], Labels(torch.arange(count) % 6, 5)


both = pytest.mark.parametrize("kind", ["unet", "dit"])


@both
@torch.no_grad()
def test_images_do_not_influence_each_other(kind):
    """Alone or in a batch: the same to rounding, 1e-6 of outputs of order 1."""
    network, given = tiny(kind).eval(), inputs()
    together = network(*given)
    alone = torch.cat([network(*(v[i : i + 1] for v in given)) for i in range(6)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(network(*(v[order] for v in given)), together[order], rtol=1e-4, atol=1e-5)


@both
@torch.no_grad()
def test_every_input_has_an_effect(kind):
    """Each of x, t, s and the label, by far more than rounding."""
    network, given = tiny(kind).eval(), inputs()
    output = network(*given)
    for position, change in ((0, given[0].flip(0)), (1, given[1] + 20), (2, given[2] + 20), (3, Labels((given[3].classes + 1) % 6, 5))):
        changed = [*given[:position], change, *given[position + 1 :]]
        assert (network(*changed) - output).abs().mean() > 1e-3 * output.abs().mean(), position


@both
@torch.no_grad()
def test_null_label(kind):
    """The null class is no label; and a network without classes takes no notice of labels."""
    network, (x, t, s, _) = tiny(kind).eval(), inputs()
    assert torch.equal(network(x, t, s, inputs()[3].null()), network(x, t, s, None))
    unconditional = tiny(kind, num_classes=0).eval()
    assert torch.equal(unconditional(x, t, s, inputs()[3]), unconditional(x, t, s))


@both
@torch.no_grad()
def test_close_times_are_told_apart(kind):
    """t - r = 1e-6 on the scale of 1000 t is below float32's resolution at 994; the float64 embedding still moves."""
    network, (x, t, s, label) = tiny(kind).eval(), inputs()
    embedded = []
    for module in (network.time_mlp,):
        module.register_forward_pre_hook(lambda _, arguments: embedded.append(arguments[0]))
    network(x, torch.full_like(t, 994.0), s, label)
    network(x, torch.full_like(t, 994.0 + 2e-6), s, label)
    assert (embedded[0] != embedded[1]).any()


@torch.no_grad()
def test_dropout_masks_follow_the_seed():
    """What the loss relies on: the same torch seed before two passes gives the same masks."""
    network, given = tiny("unet"), inputs()
    masks_are_the_seeds(network, given)


@both
def test_gradient_checkpointing_changes_no_gradient(kind):
    """Dropout included, as the masks are drawn again from the same state."""
    results = []
    for checkpointing in (False, True):
        network = tiny(kind, gradient_checkpointing=checkpointing)
        torch.manual_seed(3)
        network(*inputs()).pow(2).mean().backward()
        results.append([p.grad for p in network.parameters()])
    assert all(gradient is not None for gradient in results[0])
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("resample", ["box", "fir"])
def test_resampling(resample):
    """Sides halve and double; constants stay (away from the border, which the wider filter sees as zero); the two are adjoint,
    up to the factor 4 of the area."""
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    small, large = downsample(x, resample), upsample(x, resample)
    assert small.shape == (2, 3, 4, 4) and large.shape == (2, 3, 16, 16)
    ones = torch.ones_like(x)
    torch.testing.assert_close(downsample(ones, resample)[:, :, 1:-1, 1:-1], torch.ones(2, 3, 2, 2, dtype=torch.float64))
    torch.testing.assert_close(upsample(ones, resample)[:, :, 1:-1, 1:-1], torch.ones(2, 3, 14, 14, dtype=torch.float64))
    y = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(4 * (small * y).sum(), (x * upsample(y, resample)).sum(), rtol=1e-12, atol=0)


def test_initial_outputs():
    """DiT starts as exactly zero, the U-Net as 1e-5 of its input."""
    given = inputs()
    assert (build_network(TINY_DIT, resolution=8, channels=3, num_classes=5)(*given) == 0).all()
    unet = build_network(TINY_UNET, resolution=8, channels=3, num_classes=5)(*given)
    assert 0 < unet.abs().max() < 1e-3


def test_augment_label():
    """None is the label of images that were not augmented, zero; DiT has no such input."""
    network = randomised(build_network(TINY_UNET, resolution=8, channels=3, augment_dim=9)).eval()
    x, t, s, _ = inputs()
    with torch.no_grad():
        assert torch.equal(network(x, t, s), network(x, t, s, None, torch.zeros(6, 9)))
        assert not torch.allclose(network(x, t, s), network(x, t, s, None, torch.ones(6, 9)), rtol=1e-3)
    with pytest.raises(ValueError, match="augment"):
        tiny("dit")(x, t, s, None, torch.zeros(6, 9))
