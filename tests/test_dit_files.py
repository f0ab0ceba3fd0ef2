"""DiT, SiT and REPA files against outputs of the original implementations, and what is refused with which words."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from golden import arrays, settings, state

from mmgen.formats import dit
from mmgen.formats.family import Converted, ConvertOptions
from mmgen.formats.reading import Found, read
from mmgen.formats.recognise import family_of
from mmgen.diffusion.preconditioning import preconditioning
from mmgen.models.denoiser import Denoiser
from mmgen.errors import ConfigError, ModelError
from mmgen.models.files import load_model, save_model
from mmgen.networks.conditions import Labels
from mmgen.networks.dit import DiT, DiTSettings

HEADS = {"num_heads": 4}  # of the arrays' networks, whose 48 channels are of no published size
PLAIN = ConvertOptions()


def found(tensors: dict, **arguments) -> Found:
    return Found(Path("some.pt"), "torch .pt (zip)", tensors, {"args": arguments} if arguments else {}, {}, "")


def convert(name: str, type: str | None = None, **arguments) -> Converted:
    return dit.convert(found(state(name), **HEADS, **arguments), ConvertOptions(type=type))


def denoiser(converted: Converted) -> Denoiser:
    model = Denoiser(converted.config)
    model.network.load_state_dict(converted.state)
    return model.eval().requires_grad_(False)


ROUNDING = 5e-5  # of float32 on both sides, the file's and ours: ten times what is measured, for sums in another order


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the error of the worst image, relative to the output's. Measured: 5e-6 at most."""
    rms = [v.double().flatten(1).pow(2).mean(1).sqrt() for v in (found.double() - expected, expected)]
    return (rms[0] / rms[1]).max().item()


def test_dit():
    """The network itself, all eight channels; and x_hat of the noise that the first four are."""
    g, converted = arrays("dit_learn_sigma"), convert("dit_learn_sigma", "dit")
    model = denoiser(converted)
    assert converted.family == "dit" and converted.left_out == {}
    assert error(model.network(g["z"], g["timestep"].double(), condition=Labels(g["label"], 10)), g["out"]) < ROUNDING
    nothing = g["label"] == 10  # the null class
    without = model.network(g["z"][nothing], g["timestep"][nothing].double())
    assert error(without, g["out"][nothing]) < ROUNDING
    bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[g["timestep"], None, None, None]
    a, s = bar.sqrt(), (1 - bar).sqrt()
    found = model.denoise(g["z"].double() / a, (s / a).flatten(), Labels(g["label"], 10))
    assert error(found, (g["z"] - s * g["out"][:, :4]) / a) < ROUNDING


def test_sit():
    """x_hat = z + (1 - t) u of z = t x + (1 - t) e, where y = z / t and sigma = (1 - t) / t."""
    g, converted = arrays("sit_learn_sigma"), convert("sit_learn_sigma", path_type="Linear", prediction="velocity")
    model = denoiser(converted)
    assert converted.family == "sit"
    assert error(model.network(g["z"], g["timestep"].double(), condition=Labels(g["label"], 10))[:, :4], g["out"]) < ROUNDING
    inside = (g["timestep"] > 0) & (g["timestep"] < 1)
    z, t, label, u = g["z"][inside].double(), g["timestep"][inside].double(), Labels(g["label"][inside], 10), g["out"][inside]
    time = t[:, None, None, None]
    assert error(model.denoise(z / time, (1 - t) / t, label), z + (1 - time) * u) < ROUNDING


def repa_tensors() -> dict:
    """SiT's network with as many channels out as in, and the projectors that REPA keeps in its files."""
    tensors = state("sit_learn_sigma")
    rows = torch.arange(32).reshape(4, 8)[:, :4].flatten()  # of the last layer: patch x patch x 8 channels, the first 4
    tensors["final_layer.linear.weight"] = tensors["final_layer.linear.weight"][rows]
    tensors["final_layer.linear.bias"] = tensors["final_layer.linear.bias"][rows]
    return tensors | {f"projectors.{i}.{j}.weight": torch.ones(3, 3) for i in range(2) for j in (0, 2, 4)}


@pytest.mark.parametrize("arguments", [{}, {"path_type": "linear", "prediction": "v", "proj_coeff": 0.5}])
def test_repa(arguments):
    """Its time 1 is noise and its output e - x: z = (1 - t) x + t e gives x_hat = z - t output. The arrays' outputs, read so."""
    converted = dit.convert(found(repa_tensors(), **HEADS, **arguments), PLAIN)
    assert converted.family == "repa" and len(converted.left_out) == 6
    assert all("projector" in reason for reason in converted.left_out.values())
    assert not converted.config.network.learn_sigma
    g, model = arrays("sit_learn_sigma"), denoiser(converted)
    inside = (g["timestep"] > 0) & (g["timestep"] < 1)
    z, t, label, u = g["z"][inside].double(), g["timestep"][inside].double(), Labels(g["label"][inside], 10), g["out"][inside]
    time = t[:, None, None, None]
    assert error(model.denoise(z / (1 - time), t / (1 - t), label), z - time * u) < ROUNDING


@pytest.mark.parametrize("name, type", [("dit_learn_sigma", "dit"), ("sit_learn_sigma", "sit")])
def test_there_and_back(tmp_path, name, type):
    """Every tensor of the file is in the model, and comes back with its bits; the model file gives the same output."""
    original, converted = state(name), convert(name, type)
    back = dit.original_state(converted.config, converted.state)
    assert back.keys() == original.keys()
    assert all(torch.equal(back[key], original[key]) for key in original)
    save_model(tmp_path / "m.safetensors", converted.config, converted.state)
    loaded = load_model(tmp_path / "m.safetensors")
    assert loaded.config == converted.config
    y, sigma = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.tensor([0.5, 2.0], dtype=torch.float64)
    label = Labels(torch.tensor([1, 10]), 10)
    assert torch.equal(loaded.denoise(y, sigma, label), denoiser(converted).denoise(y, sigma, label))


@pytest.mark.parametrize("layout", ["flat", "ema"])
def test_files(tmp_path, layout):
    """As the original code stores them: flat, or averaged and plain weights beside the optimizer and argparse's settings."""
    tensors, args = state("sit_learn_sigma"), argparse.Namespace(path_type="Linear", prediction="velocity", num_heads=4)
    plain = {key: torch.zeros_like(value) for key, value in tensors.items()}
    nested = {"model": plain, "ema": tensors, "opt": {"state": {}, "param_groups": []}, "args": args}
    torch.save(tensors if layout == "flat" else nested, tmp_path / "some.pt")
    given = read(tmp_path / "some.pt")
    assert dit.family(given) and family_of(given) == ("dit" if layout == "flat" else "sit")
    if layout == "flat":  # whose heads nobody knows, and type
        given = Found(given.path, given.container, given.tensors, {"args": HEADS}, {}, "")
        with pytest.raises(ConfigError, match="some.pt can be DiT's or SiT's"):
            dit.convert(given, PLAIN)
    converted = dit.convert(given, ConvertOptions(type="sit"))
    back = dit.original_state(converted.config, converted.state)
    assert all(torch.equal(back[key], value) for key, value in tensors.items()) and back.keys() == tensors.keys()


def test_half_precision_is_kept():
    tensors = {key: value.half() for key, value in state("dit_learn_sigma").items()}
    file = found(tensors, model="DiT-XL/2", **HEADS)
    assert {v.dtype for v in dit.convert(file, PLAIN).state.values()} == {torch.float16}
    assert {v.dtype for v in dit.convert(file, ConvertOptions(precision="fp32")).state.values()} == {torch.float32}


@pytest.mark.parametrize("letter, hidden, depth, heads, count", [("S", 384, 12, 6, None), ("XL", 1152, 28, 16, 675_129_632)])
def test_published_sizes(letter, hidden, depth, heads, count):
    """Of DiT-XL/2 the number of parameters is published; the shapes alone say the rest."""
    names = dit.original_names(depth)
    shapes = {
        "patch_embed.weight": (hidden, 4, 2, 2),
        "time_mlp.linear0.weight": (hidden, 256), "time_mlp.linear1.weight": (hidden, hidden),
        "label_embed.weight": (1001, hidden), "out.weight": (32, hidden), "out_modulation.weight": (2 * hidden, hidden),
        "position": (1, 256, hidden),
    }  # fmt: skip
    block = {"qkv": (3, 1), "proj": (1, 1), "fc1": (4, 1), "fc2": (1, 4), "modulation": (6, 1)}
    for i in range(depth):
        shapes |= {f"blocks.{i}.{key}.weight": (a * hidden, b * hidden) for key, (a, b) in block.items()}
    shapes |= {
        key.replace("weight", "bias"): shape[:1] for key, shape in shapes.items() if key not in ("position", "label_embed.weight")
    }
    tensors = {names[key]: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    converted = dit.convert(found(tensors, model=f"DiT-{letter}/2", image_size=256, num_classes=1000, vae="mse"), PLAIN)
    config = converted.config
    assert (config.network.num_heads, config.network.depth, config.network.patch_size) == (heads, depth, 2)
    assert (config.resolution, config.channels, config.num_classes) == (32, 4, 1000)
    assert config.latents.vae == "stabilityai/sd-vae-ft-mse" and config.latents.resolution == 256
    assert 1 / config.latents.std[0] * config.latents.target_std == pytest.approx(0.18215, rel=1e-12)
    if count:
        assert sum(value.numel() for value in tensors.values()) == count


def test_pixels_have_no_autoencoder():
    tensors = state("dit_learn_sigma")
    tensors["x_embedder.proj.weight"] = tensors["x_embedder.proj.weight"][:, :3].clone()
    tensors["final_layer.linear.weight"], tensors["final_layer.linear.bias"] = torch.zeros(12, 48), torch.zeros(12)
    config = dit.convert(found(tensors, **HEADS), ConvertOptions(type="dit")).config
    assert config.latents is None and config.channels == 3 and not config.network.learn_sigma


def test_matches():
    tensors = state("dit_learn_sigma")
    assert dit.family(found(tensors)) and dit.family(found(repa_tensors()))
    assert not dit.family(found(tensors | {"s_embedder.mlp.0.weight": torch.zeros(1)}))
    assert not dit.family(found({"model." + key: value for key, value in tensors.items()}))
    assert not dit.family(found({"input_blocks.0.0.weight": torch.zeros(1)}))


REFUSED = [
    ({}, None, {}, ConfigError, "--type dit or --type sit"),
    ({}, "dti", {}, ConfigError, "did you mean 'dit'"),
    ({}, "dit", {"path_type": "Linear"}, ConfigError, "says itself that it is of type sit, not dit"),
    ({}, "sit", {"model": "DiT-XL/2"}, ConfigError, "of type dit, not sit"),
    ({"projectors.0.0.weight": torch.ones(2)}, "dit", {}, ConfigError, "of type repa, not dit"),
    ({}, None, {"path_type": "GVP"}, ModelError, "path GVP"),
    ({}, "sit", {"path_type": "VP", "prediction": "score"}, ModelError, "path VP"),
    ({}, None, {"path_type": "Linear", "prediction": "noise"}, ModelError, "predict the noise"),
    ({}, "dit", {"num_heads": 5}, ModelError, "48 channels, which 5 attention heads do not divide"),
    ({}, "dit", {"num_heads": None}, ConfigError, "attention heads its 48 channels have: give --heads"),
    ({}, "dit", {"num_classes": 12}, ModelError, "11 class embeddings, which are not those of 12 classes"),
    ({}, "dit", {"vae": "flux"}, ModelError, "'flux'"),
    ({"blocks.0.attn.q_norm.weight": torch.ones(12)}, "dit", {}, ModelError, "unknown blocks.0.attn.q_norm.weight"),
    ({"blocks.1.mlp.fc1.bias": None}, "dit", {}, ModelError, "lacks blocks.1.mlp.fc1.bias"),
    ({"blocks.1.mlp.fc1.bias": torch.ones(5)}, "dit", {}, ModelError, r"blocks.1.mlp.fc1.bias is \[5\] and not \[192\]"),
    ({"pos_embed": None}, "dit", {}, ModelError, "lacks pos_embed"),
    ({"pos_embed": torch.zeros(1, 15, 48)}, "dit", {}, ModelError, "square"),
    ({"final_layer.linear.weight": torch.zeros(48, 48)}, "dit", {}, ModelError, "4 channels in and 12 out"),
]


@pytest.mark.parametrize("changes, type, arguments, kind, message", REFUSED)
def test_refusals(changes, type, arguments, kind, message):
    tensors = {key: value for key, value in {**state("dit_learn_sigma"), **changes}.items() if value is not None}
    with pytest.raises(kind, match=message):
        dit.convert(found(tensors, **{**HEADS, **arguments}), ConvertOptions(type=type))


@pytest.mark.parametrize("option", ["learn_sigma", "reversed_flow"])
def test_a_flow_map_has_one_output(option):
    with pytest.raises(ConfigError, match="settings of denoisers"):
        DiT(DiTSettings(hidden_size=48, depth=1, num_heads=4, **{option: True}), 8, 4, second_time=True)


def test_settings_of_the_goldens():
    """What the shapes say is what the arrays were made with, the discrete schedule DiT's."""
    given, config = settings("dit_learn_sigma"), convert("dit_learn_sigma", "dit").config
    assert config.network.learn_sigma and config.network.mlp_ratio == 4
    assert (config.resolution, config.num_classes, config.network.depth) == (
        given["resolution"],
        given["num_classes"],
        given["depth"],
    )
    table = preconditioning(config.denoiser).table(torch.device("cpu"))
    assert table[0].item() == pytest.approx(0.0100005, rel=1e-5) and table[-1].item() == pytest.approx(157.4, rel=1e-3)
