"""Settings of the families of pixels: ranges, noise levels, presets."""

from __future__ import annotations

import pytest
import torch
from families import ADM_FLAGS, CM_FLAGS, consistency_tensors, converted, edm2_tensors, found, network_of, pickled
from golden import arrays, state

from mmgen.errors import ConfigError, MmgenError, ModelError
from mmgen.formats import adm, edm, edm2
from mmgen.formats.family import ConvertOptions
from mmgen.models.config import ModelConfig
from mmgen.networks import build_network
from mmgen.networks.conditions import Labels


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
