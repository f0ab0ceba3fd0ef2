"""Whose checkpoint a file is, and what is said of it."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from original_files import golden_settings, golden_state, write_diffusers, write_edm2_pickle, write_edm_pickle, write_pt

from mmgen.formats.reading import read
from mmgen.formats.recognise import FAMILIES, convert, describe, family_of
from mmgen.errors import ConfigError, ModelError

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2), "b.weight": torch.full((2,), 0.5).half()}


def edm_arguments(name: str) -> dict:
    given = golden_settings(name)
    arguments = {"img_resolution": 8, "img_channels": 3, "label_dim": 10, "model_channels": 32, "channel_mult": [1, 2],
                 "num_blocks": 1, "attn_resolutions": [4]}  # fmt: skip
    if "adm" not in name:
        arguments |= {"model_type": "SongUNet", "augment_dim": given.get("augment_dim", 0)}
        arguments |= {"embedding_type": given.get("embedding", "positional"), "encoder_type": given.get("encoder", "standard")}
        arguments |= {"channel_mult_noise": given.get("channel_mult_noise", 1)}
        arguments |= {"resample_filter": given.get("resample_filter", [1, 1])}
    return arguments


def test_families(tmp_path):
    args = {"dit": {"model": "DiT-XL/2"}, "sit": {"model": "SiT-XL/2", "path_type": "Linear"}, "repa": {"proj_coeff": 0.5}}
    for family, namespace in args.items():
        path = write_pt(tmp_path / "a.pt", golden_state("dit_learn_sigma"), wrap="ema", namespace=namespace)
        assert family_of(read(path)) == family
    assert family_of(read(write_pt(tmp_path / "a.pt", golden_state("dit_learn_sigma")))) == "dit"
    assert "DiT or SiT" in describe(read(tmp_path / "a.pt"))["family"]
    assert family_of(read(write_pt(tmp_path / "a.pt", golden_state("adm_unet_learn_sigma")))) == "adm"
    narrow = {
        key: value[:3] if key.startswith("out.2.") else value for key, value in golden_state("adm_unet_learn_sigma").items()
    }
    assert family_of(read(write_pt(tmp_path / "a.pt", narrow))) == "consistency"
    for name in ("edm_ddpmpp_cond", "edm_ncsnpp_cond", "edm_adm_cond"):
        assert family_of(read(write_edm_pickle(tmp_path / "a.pkl", golden_state(name), init_kwargs=edm_arguments(name)))) == "edm"
    for name in ("imm_ddpmpp_simple_edm_fm", "imm_dit_euler_fm_stride"):
        assert family_of(read(write_edm_pickle(tmp_path / "a.pkl", golden_state(name), "IMMPrecond"))) == "imm"
    edm2 = {"unet.emb_fourier.freqs": torch.ones(4), "unet.enc.8x8_conv.weight": torch.ones(1, 1, 1, 1)}
    assert family_of(read(write_edm2_pickle(tmp_path / "a.pkl", edm2))) == "edm2"
    for kind, family in [("UNet2DModel", "diffusers-unet2d"), ("DiTTransformer2DModel", "diffusers-dit")]:
        assert family_of(read(write_diffusers(tmp_path / kind, STATE, {"_class_name": kind}))) == family
    assert family_of(read(write_pt(tmp_path / "a.pt", STATE))) is None
    with pytest.raises(ModelError, match="of no family that mmgen knows"):
        convert(read(tmp_path / "a.pt"))
    for name, family in FAMILIES.items():
        assert name == "mmgen" or callable(family.module.convert)


def test_describing(tmp_path):
    path = write_edm_pickle(
        tmp_path / "a.pkl", golden_state("edm_ncsnpp_cond"), init_kwargs=edm_arguments("edm_ncsnpp_cond"), mark=tmp_path / "mark"
    )
    rows = describe(read(path))
    assert rows["container"] == "EDM pickle" and rows["family"].startswith("EDM ") and rows["class"] == "EDMPrecond, SongUNet"
    assert rows["numbers in them"] == sum(value.numel() for value in golden_state("edm_ncsnpp_cond").values())
    assert rows["draws"] == "3 x 8 x 8, 10 classes" and rows["precision"] == "float32"
    assert any(text.startswith("convert it to a denoiser") for text in rows["mmgen can"])
    adm = describe(read(write_pt(tmp_path / "b.pt", golden_state("adm_unet_learn_sigma"))))
    assert "--preset" in adm["mmgen can"][0]
    assert "nothing" in describe(read(write_pt(tmp_path / "b.pt", STATE)))["mmgen can"][0]
    mixed = describe(read(tmp_path / "b.pt"))
    assert mixed["precision"] == "float32 (2), float16 (1)" and mixed["left out"] == []


@pytest.mark.slow
@pytest.mark.parametrize("name, kind", [("edm_ddpmpp_cond", "EDMPrecond"), ("imm_ddpmpp_simple_edm_fm", "IMMPrecond")])
def test_arguments_that_cannot_be(name, kind, tmp_path):
    """A file may say anything of its network: what its family never says is one sentence, and quickly."""
    path = write_edm_pickle(tmp_path / "a.pkl", golden_state(name), kind, edm_arguments("edm_ddpmpp_cond"))
    found = read(path)
    inner, refused = found.arguments["modules"]["model"]["init_kwargs"], 0
    for arguments in (found.arguments["init_kwargs"], inner):
        for key in list(arguments):
            for wrong in (None, "text", -1, {"a": 1}, 10**30, [10**9]):
                changed = copy.deepcopy(found.arguments)
                (changed["init_kwargs"] if arguments is not inner else changed["modules"]["model"]["init_kwargs"])[key] = wrong
                try:
                    convert(dataclasses.replace(found, arguments=changed))
                except (ModelError, ConfigError) as error:
                    refused += 1
                    assert "\n" not in str(error)
    assert refused > 30
