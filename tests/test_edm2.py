"""EDM2's network against a second reading of the paper's equations, written here in float64 and without the first one's layers.

No outputs of NVIDIA's own networks were at hand: this shows that two readings agree, that the sizes are the published ones, and
that magnitudes are preserved, which is what the equations are for.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mmgen.errors import ConfigError
from mmgen.networks import EDM2Settings, build_network
from mmgen.networks.conditions import Labels

TINY = EDM2Settings(model_channels=16, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), channels_per_head=8)


def network(settings: EDM2Settings = TINY, resolution: int = 8, channels: int = 3, num_classes: int = 5):
    torch.manual_seed(0)
    result = build_network(settings, resolution=resolution, channels=channels, num_classes=num_classes, second_time=False)
    with torch.no_grad():
        for name, p in result.named_parameters():
            if p.ndim == 0:  # gains start as zero, which would hide what is behind them
                p.fill_(0.4 + 0.1 * (len(name) % 5))
    return result.eval()


# The second reading. Arrays are float64 [C, H, W] of one image, lists of weights are NVIDIA's names.


def unit(w: np.ndarray) -> np.ndarray:
    """Eq. 47 and 66: each output's weights to norm one, the magnitude taken with 1e-4 beside it."""
    flat = w.reshape(len(w), -1)
    size = np.sqrt((flat**2).sum(1, keepdims=True))
    count = flat.shape[1]
    return (flat / (1e-4 + size / math.sqrt(count)) / math.sqrt(count)).reshape(w.shape)


def conv(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    w, k = unit(w), w.shape[-1]
    padded = np.pad(x, ((0, 0), (k // 2, k // 2), (k // 2, k // 2)))
    out = np.zeros((len(w), *x.shape[1:]))
    for i in range(x.shape[1]):
        for j in range(x.shape[2]):
            out[:, i, j] = (w * padded[None, :, i : i + k, j : j + k]).sum((1, 2, 3))
    return out


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x)) / 0.596


def add(a: np.ndarray, b: np.ndarray, t: float) -> np.ndarray:
    return ((1 - t) * a + t * b) / math.sqrt((1 - t) ** 2 + t**2)


def block(p: dict, prefix: str, x: np.ndarray, emb: np.ndarray, encoder: bool, heads: int) -> np.ndarray:
    w = {key.removeprefix(prefix): value for key, value in p.items() if key.startswith(prefix)}
    if prefix.endswith("_down."):
        x = (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4
    if prefix.endswith("_up."):
        x = x.repeat(2, axis=1).repeat(2, axis=2)
    if encoder:
        if "conv_skip.weight" in w:
            x = conv(x, w["conv_skip.weight"])
        x = x / (1e-4 + np.sqrt((x**2).mean(0)))
    scale = 1 + w["emb_gain"] * (unit(w["emb_linear.weight"]) @ emb)
    y = conv(silu(conv(silu(x), w["conv_res0.weight"]) * scale[:, None, None]), w["conv_res1.weight"])
    if not encoder and "conv_skip.weight" in w:
        x = conv(x, w["conv_skip.weight"])
    x = add(x, y, 0.3)
    if "attn_qkv.weight" in w:
        c, h, side = x.shape
        qkv = conv(x, w["attn_qkv.weight"])
        out = np.zeros((c, h * side))
        depth = c // heads
        for head in range(heads):
            q, k, v = (np.stack([qkv[(head * depth + d) * 3 + i].ravel() for d in range(depth)]) for i in range(3))
            q, k, v = (a / (1e-4 + np.sqrt((a**2).mean(0))) for a in (q, k, v))
            scores = np.exp(q.T @ k / math.sqrt(depth))
            out[head * depth : (head + 1) * depth] = v @ (scores / scores.sum(1, keepdims=True)).T
        x = add(x, conv(out.reshape(x.shape), w["attn_proj.weight"]), 0.3)
    return np.clip(x, -256, 256)


def reference(p: dict, x: np.ndarray, t: float, label: int | None, classes: int, per_head: int) -> np.ndarray:
    emb = unit(p["emb_noise.weight"]) @ (math.sqrt(2) * np.cos(p["emb_fourier.freqs"] * t + p["emb_fourier.phases"]))
    one_hot = np.zeros(classes)
    if label is not None:
        one_hot[label] = math.sqrt(classes)
    emb = silu(add(emb, unit(p["emb_label.weight"]) @ one_hot, 0.5))
    x = np.concatenate([x, np.ones((1, *x.shape[1:]))])
    skips = []
    for name in ["8x8_conv", "8x8_block0", "4x4_down", "4x4_block0"]:
        heads = 32 // per_head
        x = conv(x, p["enc.8x8_conv.weight"]) if name == "8x8_conv" else block(p, f"enc.{name}.", x, emb, True, heads)
        skips.append(x)
    for name in ["4x4_in0", "4x4_in1", "4x4_block0", "4x4_block1", "8x8_up", "8x8_block0", "8x8_block1"]:
        if "block" in name:  # eq. 103 with weight one half: both inputs with the same share of the magnitude
            skip = skips.pop()
            a, b = len(x), len(skip)
            x = np.concatenate([x * math.sqrt((a + b) / (2 * a)), skip * math.sqrt((a + b) / (2 * b))])
        x = block(p, f"dec.{name}.", x, emb, False, 32 // per_head)
    return p["out_gain"] * conv(x, p["out_conv.weight"])


@torch.no_grad()
def test_against_the_equations():
    """Measured: 1e-6, float32 against float64."""
    ours = network()
    p = {key: value.double().numpy() for key, value in ours.state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(4, 3, 8, 8, generator=generator), torch.tensor([-1.5, -0.3, 0.4, 1.1], dtype=torch.float64)
    label = Labels(torch.tensor([0, 3, 4, 5]), 5)
    output = ours(x, t, condition=label)
    expected = np.stack(
        [reference(p, x[i].double().numpy(), t[i].item(), (0, 3, 4, None)[i], 5, TINY.channels_per_head) for i in range(4)]
    )
    wrong = np.sqrt(((output.double().numpy() - expected) ** 2).mean() / (expected**2).mean())
    assert wrong < 1e-5
    assert torch.equal(ours(x, t), ours(x, t, condition=label.null()))


@pytest.mark.parametrize("width, millions", [(128, 125), (192, 280), (256, 498), (320, 777), (384, 1119), (448, 1523)])
def test_published_sizes(width, millions):
    """EDM2-XS to EDM2-XXL on ImageNet-512's latents, in millions of parameters."""
    with torch.device("meta"):
        result = build_network(EDM2Settings(model_channels=width), resolution=64, channels=4, num_classes=1000, second_time=False)
    assert sum(p.numel() for p in result.parameters()) / 1e6 == pytest.approx(millions, abs=0.6)


@torch.no_grad()
def test_magnitudes_are_preserved():
    """From unit Gaussian images, with fresh weights, every block gives magnitude one within a quarter."""
    wide = EDM2Settings(model_channels=64, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(8,))
    torch.manual_seed(0)
    ours = build_network(wide, resolution=16, channels=3, num_classes=5, second_time=False).eval()
    sizes = {}
    for name, module in [(f"{part}.{name}", m) for part in ("enc", "dec") for name, m in getattr(ours, part).items()]:
        module.register_forward_hook(lambda _, __, out, name=name: sizes.update({name: out.square().mean().sqrt().item()}))
    ours(torch.randn(4, 3, 16, 16), torch.zeros(4, dtype=torch.float64), condition=Labels(torch.arange(4), 5))
    assert len(sizes) == 11 and all(0.75 < size < 1.25 for size in sizes.values()), sizes
    assert (ours(torch.randn(1, 3, 16, 16), torch.zeros(1)) == 0).all()  # out_gain starts as zero


@torch.no_grad()
def test_size_of_stored_weights_is_of_no_effect():
    ours, x = network(), torch.randn(2, 3, 8, 8)
    t = torch.zeros(2, dtype=torch.float64)
    before = ours(x, t)
    for p in ours.parameters():
        if p.ndim:
            p.mul_(3)
    # The 1e-4 beside each magnitude is what is left
    assert (ours(x, t) - before).square().mean().sqrt() < 1e-3 * before.square().mean().sqrt()


def test_other_inputs_are_refused():
    ours, x, t = network(), torch.zeros(1, 3, 8, 8), torch.zeros(1)
    with pytest.raises(ValueError, match="second time"):
        ours(x, t, t)
    with pytest.raises(ConfigError, match="second time"):
        build_network(TINY, resolution=8, channels=3)
    with pytest.raises(ConfigError, match="augmentation"):
        build_network(TINY, resolution=8, channels=3, augment_dim=9, second_time=False)
    with pytest.raises(ConfigError, match="heads"):
        network(EDM2Settings(model_channels=16, channel_mult=(1, 2)))
