"""Golden outputs through `convert`, there and back bit by bit, and every tensor accounted for: EDM, EDM2, ADM, consistency
models and the official IMM pickles. Files themselves are read in test_reading; here their contents are given."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import original_files
import pytest
import torch
from golden import arrays, settings, state

from mmgen.formats import adm, edm, edm2, imm, reading, recognise
from mmgen.formats.family import Converted, ConvertOptions
from mmgen.formats.reading import Found
from mmgen.models.denoiser import Denoiser
from mmgen.errors import ConfigError, MmgenError, ModelError
from mmgen.models.model import Model, ModelConfig, load_model, save_model
from mmgen.networks import build_network
from mmgen.networks.conditions import Labels

IMM = {
    "imm_ddpmpp_simple_edm_fm": "SongUNet",
    "imm_ddpmpp_simple_edm_cosine_stride": "SongUNet",
    "imm_ddpmpp_identity_fm_cond": "SongUNet",
    "imm_dit_euler_fm_stride": "DiT",
}
EDM = {"edm_ddpmpp_cond": "SongUNet", "edm_ncsnpp_cond": "SongUNet", "edm_adm_cond": "DhariwalUNet"}
ADM_FLAGS = (
    "--image_size 8 --num_channels 32 --channel_mult 1,2 --num_res_blocks 1 --attention_resolutions 4 --num_head_channels 16 "
    "--use_scale_shift_norm True --resblock_updown True --use_new_attention_order True --class_cond True --learn_sigma True"
)
CM_FLAGS = ADM_FLAGS.replace("--use_new_attention_order True", "").replace("--learn_sigma True", "--training_mode ")
FAMILIES = {"edm": edm, "edm2": edm2, "adm": adm, "consistency": adm, "imm": imm}


def found(tensors: dict, arguments: dict | None = None) -> Found:
    return Found(Path("some/file.pkl"), "a test", tensors, arguments or {}, {}, "0" * 64)


def pickled(name: str, class_name: str, inner_class: str, tensors: dict | None = None, **own) -> Found:
    """What a pickle of a golden network holds. `own`: arguments of the wrapper alone."""
    g = settings(name)
    shape = {"img_resolution": g["resolution"], "img_channels": g["channels"], "label_dim": g["num_classes"]}
    channels = {"in_channels": g["channels"], "out_channels": g["channels"]}
    network = {key: g[key] for key in ("model_channels", "channel_mult", "num_blocks", "attn_resolutions", "augment_dim",
                                       "channel_mult_noise", "resample_filter", "depth", "hidden_size", "patch_size",
                                       "num_heads") if key in g}  # fmt: skip
    for ours, theirs in (("embedding", "embedding_type"), ("encoder", "encoder_type")):
        if ours in g:
            network[theirs] = g[ours]
    if "dit" not in name:
        network["dropout"] = 0.13
    inner = {"img_resolution": g["resolution"], "label_dim": g["num_classes"], **channels, **network}
    modules = {"model": {"class_name": inner_class, "init_kwargs": inner}}
    wrapper = {**shape, "model_type": inner_class, **network, **own}
    return found(tensors or state(name), {"class_name": class_name, "init_kwargs": wrapper, "modules": modules})


def official_imm(name: str) -> Found:
    g = settings(name)
    own = {
        "noise_schedule": g["schedule"], "f_type": g["parametrization"], "sigma_data": g["sigma_data"], "T": g["T"],
        "eps": g["eps"], "temb_type": {"s": "identity", "t-s": "stride"}[g["second_time"]], "time_scale": g["time_scale"],
    }  # fmt: skip
    return pickled(name, "IMMPrecond", IMM[name], **own)


def consistency_tensors() -> dict:
    """ADM's golden weights in the shapes of consistency_models, with the head of three channels."""
    tensors = {}
    for key, value in state("adm_unet_learn_sigma").items():
        wide = key.endswith(("qkv.weight", "proj_out.weight"))
        tensors[key] = value.unsqueeze(-1) if wide else value[:3] if key.startswith("out.2") else value
    return tensors


def edm2_tensors(dtype: torch.dtype = torch.float16) -> tuple[dict, dict]:
    """(tensors, arguments) of a small EDM2 pickle with random weights."""
    inner = {"img_resolution": 8, "img_channels": 3, "label_dim": 10, "model_channels": 16, "channel_mult": [1, 2],
             "num_blocks": 1, "attn_resolutions": [4], "channels_per_head": 8, "dropout": 0.1}  # fmt: skip
    small = edm2.EDM2Settings(model_channels=16, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), channels_per_head=8)
    torch.manual_seed(0)
    network = build_network(small, resolution=8, channels=3, num_classes=10, second_time=False)
    tensors = {f"unet.{key}": (value + 0.3 * (value.ndim == 0)).to(dtype) for key, value in network.state_dict().items()}
    tensors |= {"logvar_fourier.freqs": torch.randn(128).to(dtype), "logvar_fourier.phases": torch.rand(128).to(dtype),
                "logvar_linear.weight": torch.randn(1, 128).to(dtype)}  # fmt: skip
    wrapper = {**inner, "use_fp16": True, "sigma_data": 0.5}
    return tensors, {"class_name": "Precond", "init_kwargs": wrapper,
                     "modules": {"unet": {"class_name": "UNet", "init_kwargs": inner}}}  # fmt: skip


def iddpm() -> Found:
    """The golden ADM as a network that learns its variance, with the table of noise levels."""
    tensors = state("edm_adm_cond")
    tensors |= {f"model.out_conv.{k}": torch.cat([tensors[f"model.out_conv.{k}"]] * 2) for k in ("weight", "bias")}
    given = pickled("edm_adm_cond", "iDDPMPrecond", "DhariwalUNet", {**tensors, "u": edm.noise_levels()}, C_1=0.001)
    given.arguments["modules"]["model"]["init_kwargs"]["out_channels"] = 6
    return given


FILES = {
    **{name: functools.partial(official_imm, name) for name in IMM},
    **{name: functools.partial(pickled, name, "EDMPrecond", inner) for name, inner in EDM.items()},
    "vp": lambda: pickled("edm_ddpmpp_cond", "VPPrecond", "SongUNet"),
    "ve": lambda: pickled("edm_ncsnpp_cond", "VEPrecond", "SongUNet"),
    "iddpm": iddpm,
    "edm2": lambda: found(*edm2_tensors()),
    "adm": lambda: found(state("adm_unet_learn_sigma")),
    "consistency": lambda: found(consistency_tensors()),
    "edm of consistency_models": lambda: found(consistency_tensors()),
}
PRESET = {
    "adm": ADM_FLAGS,
    "consistency": CM_FLAGS + "consistency_training",
    "edm of consistency_models": CM_FLAGS + "edm",
}


def family_of(given: Found):
    """The one family that recognises a file."""
    matching = [module for module in (edm, edm2, adm, imm) if module.matches(given)]
    assert len(matching) == 1
    return matching[0]


def converted(name: str, given: Found | None = None) -> Converted:
    given = given or FILES[name]()
    return family_of(given).convert(given, ConvertOptions(preset=PRESET.get(name)))


def network_of(result: Converted) -> Model | Denoiser:
    model = (Model if result.config.flow else Denoiser)(result.config)
    model.network.load_state_dict(result.state)
    return model.eval()


def error(output: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the error of the worst image, relative to the output's."""
    rms = [v.double().flatten(1).pow(2).mean(1).sqrt() for v in (output.double() - expected, expected)]
    return (rms[0] / rms[1]).max().item()


# Golden outputs. Measured: 8e-6 at most


@pytest.mark.parametrize("name", EDM)
@torch.no_grad()
def test_golden_edm(name):
    g, model = arrays(name), network_of(converted(name))
    assert model.settings.precondition == "edm" and model.range == (0.002, 80.0)
    sigma = g["sigma"].double()
    for z in (g["z"], g["z"].double()):
        assert error(model.denoise(z, sigma, Labels(g["label"], 10)), g["x_pred"]) < 2e-5
    if "x_pred_uncond" in g:
        assert error(model.denoise(g["z"], sigma, Labels(g["label"], 10).null()), g["x_pred_uncond"]) < 2e-5
        assert model.config.augment_dim == 9  # the weights of the augmentation label are kept


@torch.no_grad()
def test_golden_adm():
    g, model = arrays("adm_unet_learn_sigma"), network_of(converted("adm"))
    output = model.network(g["z"], g["timestep"].double(), condition=Labels(g["label"], 10))
    assert output.shape == (6, 6, 8, 8) and error(output, g["out"]) < 2e-5
    # x_hat by the definition of the noise, with alpha-bar of the linear betas; y = z / a, sigma = s / a
    bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[g["timestep"]][:, None, None, None]
    expected = ((g["z"] - (1 - bar).sqrt() * g["out"][:, :3]) / bar.sqrt()).clamp(-1, 1)
    sigma = ((1 - bar) / bar).sqrt()
    assert error(model.denoise(g["z"] / bar.sqrt(), sigma.flatten(), Labels(g["label"], 10)), expected) < 2e-4


@torch.no_grad()
def test_golden_weights_as_a_consistency_model():
    """The golden ADM outputs belong to these weights too: same order of the attention, half of the head."""
    g, model = arrays("adm_unet_learn_sigma"), network_of(converted("consistency"))
    output = model.network(g["z"], g["timestep"].double(), condition=Labels(g["label"], 10))
    assert error(output, g["out"][:, :3]) < 2e-5


@pytest.mark.parametrize("name", IMM)
@torch.no_grad()
def test_golden_imm(name):
    # Where DiT's error is, 4e-6, a GELU of the exact kind would be seen: 2e-5. The U-Nets' is 8e-6 at most.
    tolerance = 1e-5 if "dit" in name else 5e-5
    g, model, given = arrays(name), network_of(converted(name)), settings(name)
    x, s, t = g["x"].double(), g["s"], g["t"]
    label = Labels(g["label"], given["num_classes"]) if "label" in g else None
    assert error(model.f(x, s, t, label), g["f"]) < tolerance
    if label is not None:
        assert error(model.f(x, s, t), g["f_uncond"]) < tolerance
        assert error(model.f(x, s, t, label.null()), g["f_uncond"]) < tolerance
        assert error(model.f(x, s, t, label, 1.5), g["f_cfg1.5"]) < tolerance
    flow = model.config.flow
    assert (flow.schedule, flow.parametrization) == (given["schedule"], given["parametrization"])
    assert (flow.t_min, flow.t_max, flow.second_time) == (given["eps"], given["T"], given["second_time"])


# There and back


@pytest.mark.parametrize("name", FILES)
def test_there_and_back_is_bit_identical(name):
    given = FILES[name]()
    result = converted(name, given)
    back = FAMILIES[result.family].original_state(result.config, result.state)
    kept = {key: value for key, value in given.tensors.items() if not key.startswith("logvar_")}
    assert back.keys() == kept.keys()
    for key, value in kept.items():
        assert back[key].dtype == value.dtype and torch.equal(back[key], value), key
    # Nothing is in two places, nothing in none
    placed = len(result.state) + len(result.left_out)
    assert placed == len(given.tensors) and all(result.left_out.values())
    assert set(result.left_out) <= given.tensors.keys()


@pytest.mark.parametrize("name", FILES)
def test_through_a_model_file(name, tmp_path):
    """Config and weights survive the file, and the model in it draws images of the right shape."""
    result = converted(name)
    save_model(tmp_path / "m.safetensors", result.config, result.state)
    model = load_model(tmp_path / "m.safetensors")
    assert dataclasses.asdict(model.config) == dataclasses.asdict(result.config)
    for key, value in model.network.state_dict().items():
        assert torch.equal(value, result.state[key].to(value.dtype)), key
    if result.config.latents is not None:  # IMM's DiT: its autoencoder is not at hand
        assert (result.config.latents.vae, result.config.latents.resolution) == ("stabilityai/sd-vae-ft-ema", 64)
        return
    images = model.sample(2, steps=2, seed=0)
    assert images.shape == (2, *model.image_shape) and images.dtype == torch.uint8


@pytest.mark.parametrize("name", FILES)
def test_from_files(name, tmp_path):
    """As written by the original code, traps included, and recognised by content. The weights of a .pt are all that it holds."""
    given, mark = FILES[name](), tmp_path / "mark"
    a = given.arguments
    if not a:
        path = original_files.write_pt(tmp_path / "x", given.tensors)
    else:
        inner = "unet" if "unet" in a["modules"] else "model"
        module = a["modules"][inner]
        network = original_files.persistent_network(
            given.tensors, a["class_name"], a["init_kwargs"], inner=inner, inner_class=module["class_name"],
            inner_kwargs=module["init_kwargs"], mark=mark,
        )  # fmt: skip
        path = original_files.write_pickle(tmp_path / "x", {"ema": network})
    result = recognise.convert(reading.read(path), ConvertOptions(preset=PRESET.get(name)))
    expected = converted(name)
    assert (result.config, result.family, result.left_out) == (expected.config, expected.family, expected.left_out)
    assert all(torch.equal(value, expected.state[key]) for key, value in result.state.items()) and not mark.exists()


# Refusals, by name


def broken(name: str, change) -> str:
    given = FILES[name]()
    change(given.tensors)
    with pytest.raises(ModelError) as caught:
        converted(name, given)
    assert "file.pkl" in str(caught.value)
    return str(caught.value)


def lose(key):
    return lambda tensors: tensors.pop(key)


def put(key, value):
    return lambda tensors: tensors.update({key: value})


@pytest.mark.parametrize(
    "name, key",
    [
        ("edm_ddpmpp_cond", "model.enc.8x8_block0.conv1.weight"),
        ("edm_ddpmpp_cond", "model.enc.4x4_down.skip.resample_filter"),
        ("edm_adm_cond", "model.out_norm.bias"),
        ("edm2", "unet.dec.4x4_in0.attn_qkv.weight"),
        ("iddpm", "u"),
        ("adm", "middle_block.1.qkv.bias"),
        ("imm_ddpmpp_simple_edm_fm", "model.map_layer1_s.bias"),
        ("imm_dit_euler_fm_stride", "model.blocks.1.attn.qkv.bias"),
    ],
)  # fmt: skip
def test_tensors_that_are_missing_unknown_or_misshaped_are_named(name, key):
    assert key in broken(name, lose(key))
    wrong = torch.zeros(3, 7)
    message = broken(name, put(key, wrong))
    assert key in message and "[3, 7]" in message
    assert "strange.weight" in broken(name, put("strange.weight", torch.zeros(3)))


def test_filters_and_noise_levels_have_to_be_the_published_ones():
    for name, key in (("edm_ncsnpp_cond", "model.enc.4x4_aux_residual.resample_filter"), ("iddpm", "u")):
        value = FILES[name]().tensors[key]
        assert key in broken(name, put(key, value * 1.01))
    for taps in ([1.0, 1.0], [0.25, 0.75], [0.25, 0.5, 0.25], [0.125, 0.375, 0.375, 0.125]):
        kernel = torch.tensor(taps).outer(torch.tensor(taps))[None, None]
        assert "conv0.resample_filter" in broken("edm_adm_cond", put("model.enc.4x4_down.conv0.resample_filter", kernel))


def test_arguments_that_are_not_ours_are_refused():
    def inner(given, **changed):
        given.arguments["modules"]["model"]["init_kwargs"].update(changed)
        return given

    song = pickled("edm_ddpmpp_cond", "EDMPrecond", "SongUNet")
    for changed, words in [
        ({"decoder_type": "skip"}, "decoder_type"),
        ({"encoder_type": "skip"}, "encoder_type"),
        ({"channel_mult_emb": 2}, "channel_mult_emb"),
        ({"resample_filter": [1, 2, 1]}, "resample_filter"),
        ({"attn_resolution": [4]}, "did you mean 'attn_resolutions'"),
        ({"label_dim": 9}, "different"),
        ({"num_blocks": 10**9}, "num_blocks = 1000000000"),
        ({"channel_mult": [1] * 99}, "channel_mult"),
        ({"model_channels": 6}, "no network can be built"),
        ({"img_resolution": None}, "img_resolution = None"),
    ]:
        with pytest.raises(ModelError, match=words):
            edm.convert(
                inner(dataclasses.replace(pickled("edm_ddpmpp_cond", "EDMPrecond", "SongUNet")), **changed), ConvertOptions()
            )
    for changed, words in (({"class_name": "MyPrecond"}, "MyPrecond"), ({"modules": {}}, "snapshot")):
        with pytest.raises(ModelError, match=words):
            edm.convert(dataclasses.replace(song, arguments={**song.arguments, **changed}), ConvertOptions())
    with pytest.raises(ModelError, match="beta_d"):
        edm.convert(pickled("edm_ddpmpp_cond", "VPPrecond", "SongUNet", beta_d=10.0), ConvertOptions())
    for own, words in (
        ({"f_type": "euler"}, "f_type.*euler_fm"),
        ({"noise_schedule": "vp"}, "vp_cosine"),
        ({"temb_type": "s"}, "temb"),
    ):
        with pytest.raises(ModelError, match=words):
            imm.convert(pickled("imm_ddpmpp_simple_edm_fm", "IMMPrecond", "SongUNet", **own), ConvertOptions())
    with pytest.raises(ModelError, match="what flow map"):
        imm.convert(found(state("imm_ddpmpp_simple_edm_fm")), ConvertOptions())
    tensors, arguments = edm2_tensors()
    arguments["modules"]["unet"]["init_kwargs"]["resample_filter"] = [1, 3, 3, 1]
    with pytest.raises(ModelError, match="resample_filter"):
        edm2.convert(found(tensors, arguments), ConvertOptions())


# What the arguments and presets mean


def test_ranges_of_edms_preconditioners():
    """From the classes of arXiv:2206.00364: beta_d 19.9, epsilon_t 1e-5 for VP; u_0 and u_999 for iDDPM."""
    expected = {"vp": (1.0e-3, 152.2), "ve": (0.02, 100.0), "iddpm": (0.0064, 2.0e4)}
    for name, (low, high) in expected.items():
        denoiser = converted(name).config.denoiser
        assert denoiser.precondition == name
        assert denoiser.sigma_min == pytest.approx(low, rel=0.01) and denoiser.sigma_max == pytest.approx(high, rel=0.03)


def test_noise_levels_are_those_of_the_denoiser():
    """EDM's float32 recursion against the denoiser's in float64."""
    from mmgen.diffusion.preconditioning import preconditioning

    table = preconditioning(converted("iddpm").config.denoiser).table(torch.device("cpu"))
    torch.testing.assert_close(edm.noise_levels()[:-1].flip(0).double(), table, rtol=2e-3, atol=0)


@torch.no_grad()
def test_precision():
    """As in the file, or as told; EDM2's float16 weights compute in float32."""
    given = found(*edm2_tensors())
    kept, wide = (edm2.convert(given, ConvertOptions(precision=word)) for word in (None, "fp32"))
    assert {v.dtype for v in kept.state.values()} == {torch.float16}
    assert {v.dtype for v in wide.state.values()} == {torch.float32}
    x, sigma = torch.randn(2, 3, 8, 8), torch.tensor([0.5, 3.0], dtype=torch.float64)
    assert torch.equal(*(network_of(result).denoise(x, sigma, Labels(torch.tensor([1, 10]), 10)) for result in (kept, wide)))
    song = pickled("edm_ddpmpp_cond", "EDMPrecond", "SongUNet")
    assert {v.dtype for v in edm.convert(song, ConvertOptions(precision="fp16")).state.values()} == {torch.float16}
    song.tensors["model.map_label.bias"] = torch.full((32,), 1e5)
    with pytest.raises(ModelError, match="label_embed.bias.*float16"):
        edm.convert(song, ConvertOptions(precision="fp16"))


@torch.no_grad()
def test_class_models_of_adm_have_no_null_class():
    g, model = arrays("adm_unet_learn_sigma"), network_of(converted("adm"))
    sigma = torch.ones(6, dtype=torch.float64)
    for label, guidance in ((None, 1.0), (Labels(g["label"], 10).null(), 1.0), (Labels(g["label"], 10), 1.5)):
        with pytest.raises(MmgenError, match="null class"):
            model.denoise(g["z"], sigma, label, guidance)


@pytest.mark.parametrize("name", adm.PRESETS)
def test_presets_are_the_published_models(name):
    """Sizes in millions of parameters as published by Dhariwal & Nichol: a file of each preset, on the
    meta device, is recognised, and refused under another one."""
    flags = adm.read_flags(name)
    published = {
        64: 296, 128: 422, 256: 554 if flags.class_cond else 552, 512: 559,
    }[flags.image_size]  # fmt: skip
    given = preset_tensors(flags)
    config = adm.convert(found(given), ConvertOptions(preset=name)).config
    count = sum(value.numel() for value in given.values()) / 1e6
    if flags.use_scale_shift_norm:
        assert count == pytest.approx(published, abs=1.0)
    assert config.resolution == flags.image_size and config.num_classes == (1000 if flags.class_cond else 0)
    assert config.denoiser.clip
    expected = {"adm": "discrete", "lsun": "discrete", "edm": "edm_cm", "cd": "cm", "ct": "cm"}[name.split("-")[0]]
    assert config.denoiser.precondition == expected
    assert (config.denoiser.betas == "cosine") == (name == "adm-imagenet64")
    other = "adm-imagenet128" if name != "adm-imagenet128" else "adm-imagenet256"
    with pytest.raises(ModelError, match=other):
        adm.convert(found(given), ConvertOptions(preset=other))


def preset_tensors(flags: adm.Flags) -> dict:
    """Original keys and shapes of the model that flags describe, without values."""
    mult = adm._MULT[flags.image_size]
    network = adm.ADMSettings(
        model_channels=flags.num_channels, channel_mult=mult, num_blocks=flags.num_res_blocks, attn_resolutions=(32, 16, 8),
        scale_shift_norm=flags.use_scale_shift_norm, channels_per_group=1, null_class=False, learn_sigma=flags.learn_sigma,
    )  # fmt: skip
    kind = "edm_cm" if flags.training_mode else "discrete"
    config = ModelConfig(network, None, flags.image_size, 3, 1000 if flags.class_cond else 0, denoiser=adm.DenoiserSettings(kind))
    with torch.device("meta"):
        state_dict = build_network(
            network, resolution=config.resolution, channels=3, num_classes=config.num_classes, second_time=False
        ).state_dict()
    return adm.original_state(config, state_dict)


def test_what_a_preset_has_to_be():
    given = found(state("adm_unet_learn_sigma"))
    for preset, words in [
        (None, "--preset.*adm-imagenet64"),
        ("adm-imagnet64", "did you mean 'adm-imagenet64'"),
        ("--image_sise 8", "did you mean '--image_size'"),
        ("--image_size", "pairs"),
        ("--class_cond maybe", "class_cond"),
        ("--image_size 8 --resblock_updown True", "channel_mult"),
        (ADM_FLAGS + " --image_size 7", "cannot be halved"),
        (ADM_FLAGS + " --num_head_channels 0 --num_heads 0", "num_heads"),
        (ADM_FLAGS + " --noise_schedule sqrt", "linear, cosine"),
        (ADM_FLAGS + " --predict_xstart True", "predict_xstart"),
        (ADM_FLAGS.replace("updown True", "updown False"), "resblock_updown"),
        (CM_FLAGS + "progdist", "progdist"),
    ]:
        with pytest.raises(ConfigError, match=words):
            adm.convert(
                given if "training_mode" not in str(preset) else found(consistency_tensors()), ConvertOptions(preset=preset)
            )
    for change, words in [
        (("num_channels 32", "num_channels 64"), "num_channels 32"),
        (("num_res_blocks 1", "num_res_blocks 2"), "num_res_blocks 1"),
        (("channel_mult 1,2", "channel_mult 1,3"), "32, 64"),
        (("attention_resolutions 4", "attention_resolutions 8"), "attention at levels 1 of 2"),
        (("class_cond True", "class_cond False"), "class_cond True"),
        (("learn_sigma True", "learn_sigma False"), "learn_sigma True"),
        (("norm True", "norm False"), "use_scale_shift_norm True"),
    ]:
        with pytest.raises(ModelError, match=words):
            adm.convert(given, ConvertOptions(preset=ADM_FLAGS.replace(*change)))
    by_number = ADM_FLAGS.replace("--num_head_channels 16", "--num_heads 2")
    assert adm.convert(given, ConvertOptions(preset=by_number)).config.network.num_heads == 2
    with pytest.raises(ModelError, match=r"qkv.weight is \[192, 64, 1, 1\] and not \[192, 64, 1\]"):
        wide = {k: v.unsqueeze(-1) if k.endswith(("qkv.weight", "out.weight")) else v for k, v in given.tensors.items()}
        adm.convert(found(wide), ConvertOptions(preset=ADM_FLAGS))


def test_other_files_of_guided_diffusion():
    tensors = state("adm_unet_learn_sigma")
    classifier = {k: v for k, v in tensors.items() if not k.startswith("output_blocks.")}
    with pytest.raises(ModelError, match="classifier"):
        adm.convert(found(classifier), ConvertOptions(preset=ADM_FLAGS))
    tensors["input_blocks.0.0.weight"] = torch.zeros(32, 6, 3, 3)
    with pytest.raises(ModelError, match="enlarges"):
        adm.convert(found(tensors), ConvertOptions(preset=ADM_FLAGS))
