"""Autoencoders: against diffusers' own, called directly, and the normalisation against its formula in float64."""

import json
import re
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_vae import write_vae

from mmgen.encoders import vae as module
from mmgen.errors import ConfigError, ModelError
from mmgen.models.latents import LatentSettings
from mmgen.system.random import keys
from mmgen.encoders.vae import IMM_MEAN, IMM_STD, decoder, denormalise, draw_latents, load_vae, normalise

WEIGHTS = "diffusion_pytorch_model.safetensors"
IMM = LatentSettings(vae="x", vae_sha256="0" * 64, mean=IMM_MEAN, std=IMM_STD)


@pytest.fixture(autouse=True)
def nothing_kept():
    yield
    module._load.cache_clear()


def images(count=3, side=16):
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def settings_of(vae, **changes):
    values = dict(vae=vae.source, vae_sha256=vae.sha256, kind=vae.kind, mean=(0.1,) * 4, std=(2.0,) * 4, resolution=16)
    return LatentSettings(**{**values, **changes})


@torch.no_grad()
def test_kl_is_diffusers_own(tmp_path):
    from diffusers import AutoencoderKL

    vae = load_vae(write_vae(tmp_path / "v"))
    assert (vae.kind, vae.channels, vae.factor) == ("kl", 4, 2)
    own = AutoencoderKL.from_pretrained(tmp_path / "v")
    moments = own.quant_conv(own.encoder(images() / 127.5 - 1))
    mean, std = vae.encode(images())
    assert mean.shape == (3, 4, 8, 8) and mean.dtype == std.dtype == torch.float32
    torch.testing.assert_close(mean, moments[:, :4])
    torch.testing.assert_close(std, (moments[:, 4:].clamp(-30, 20) / 2).exp())
    raw = 3 * torch.randn(5, 4, 8, 8)
    expected = (own.decode(raw).sample * 127.5 + 128).clamp(0, 255).to(torch.uint8)
    assert vae.decode(raw.double()).dtype == torch.uint8
    assert (vae.decode(raw.double()).int() - expected.int()).abs().max() <= 1


@torch.no_grad()
def test_tiny_is_diffusers_own_and_has_no_deviation(tmp_path):
    from diffusers import AutoencoderTiny

    vae = load_vae(write_vae(tmp_path / "v", "tiny"))
    assert (vae.kind, vae.channels, vae.factor) == ("tiny", 4, 2)
    own = AutoencoderTiny.from_pretrained(tmp_path / "v").eval()
    mean, std = vae.encode(images())
    torch.testing.assert_close(mean, own.encode(images() / 127.5 - 1).latents)
    assert not std.any()
    assert vae.decode(mean).shape == (3, 3, 16, 16)


def test_decoding_in_parts_is_decoding_at_once(tmp_path, monkeypatch):
    vae = load_vae(write_vae(tmp_path / "v"))
    raw = 3 * torch.randn(5, 4, 8, 8)
    whole = vae.decode(raw)
    monkeypatch.setattr(module, "_PIXELS_AT_ONCE", 2 * 16 * 16)
    assert (vae.decode(raw).int() - whole.int()).abs().max() <= 1
    assert vae.decode(raw[:0]).shape == (0, 3, 16, 16)


def test_normalisation_is_imms_formula():
    raw = 5 * torch.randn(2, 4, 3, 3, dtype=torch.float64)
    for channel, (mean, std) in enumerate(zip((0.86488, -0.27787343, 0.21616915, 0.3738409),
                                              (4.85503674, 5.31922414, 3.93725398, 3.9870003), strict=True)):  # fmt: skip
        expected = raw[:, channel] * (0.5 / std) - mean * 0.5 / std  # imm.md, section 5.6
        torch.testing.assert_close(normalise(raw, IMM)[:, channel].double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(denormalise(normalise(raw, IMM), IMM).double(), raw, rtol=1e-6, atol=1e-5)


def test_drawn_latents_follow_their_moments_and_depend_on_the_image_alone():
    count = 20_000
    mean, std = torch.randn(1, 4, 2, 2), torch.rand(1, 4, 2, 2) + 0.5
    moments = torch.cat([mean, std], dim=1).expand(count, -1, -1, -1)
    drawn = denormalise(draw_latents(moments, IMM, keys(0, torch.arange(count), 7)), IMM)
    torch.testing.assert_close(drawn.mean(0), mean[0], rtol=0, atol=5 * 1.5 / count**0.5)
    torch.testing.assert_close(drawn.std(0), std[0], rtol=0.03, atol=0)
    some = torch.tensor([17, 3])
    again = draw_latents(moments[some], IMM, keys(0, some, 7))
    torch.testing.assert_close(denormalise(again, IMM), drawn[some], rtol=0, atol=1e-5)
    tiny = LatentSettings(vae="x", vae_sha256="0", kind="tiny", mean=IMM_MEAN, std=IMM_STD)
    assert torch.equal(draw_latents(mean, tiny, keys(0, [5])), draw_latents(mean, tiny, keys(0, [6])))


def test_half_precision_moments_become_float32():
    moments = torch.randn(2, 8, 3, 3, dtype=torch.float16)
    assert draw_latents(moments, IMM, keys(0, [0, 1])).dtype == torch.float32


def test_the_decoder_undoes_the_normalisation(tmp_path):
    vae = load_vae(write_vae(tmp_path / "v"))
    raw = 3 * torch.randn(2, 4, 8, 8)
    latents = settings_of(vae)
    decoded = decoder(latents)((raw - 0.1) / 2 * 0.5)
    assert decoded.shape == (2, 3, 16, 16)
    assert (decoded.int() - vae.decode(raw).int()).abs().max() <= 1


def test_another_vae_is_refused_and_its_place_can_be_told(tmp_path, monkeypatch):
    vae = load_vae(write_vae(tmp_path / "v"))
    latents = settings_of(vae)
    shutil.move(tmp_path / "v", tmp_path / "elsewhere")
    write_vae(tmp_path / "v", seed=1)
    module._load.cache_clear()
    with pytest.raises(ModelError, match=r"not the one that the model was trained with.*MMGEN_VAE"):
        decoder(latents)
    shutil.rmtree(tmp_path / "v")
    module._load.cache_clear()
    with pytest.raises(ModelError, match=r"no folder .*MMGEN_VAE"):
        decoder(latents)
    monkeypatch.setenv("MMGEN_VAE", str(tmp_path / "elsewhere"))
    assert decoder(latents)(torch.zeros(1, 4, 8, 8)).shape == (1, 3, 16, 16)


def test_pixels_in_unit_range_and_a_vae_that_nothing_names(tmp_path):
    """EDM2's autoencoder is given pixels in [0, 1]; other people's models do not say which weights theirs has."""
    from diffusers import AutoencoderKL

    vae = load_vae(write_vae(tmp_path / "vae"))
    raw = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    own = AutoencoderKL.from_pretrained(tmp_path / "vae")
    with torch.no_grad():
        expected = (own.decode(raw).sample.clamp(0, 1) * 255).to(torch.uint8)
    latents = settings_of(vae, mean=(0.0,) * 4, std=(1.0,) * 4, target_std=1.0, pixels="unit", vae_sha256="")
    assert (decoder(latents)(raw).int() - expected.int()).abs().max() <= 1


def test_a_pipeline_and_old_names_of_attention_weights(tmp_path):
    """Stable Diffusion's VAEs on the hub have names that diffusers replaced later."""
    vae = load_vae(write_vae(tmp_path / "pipeline/vae"))
    assert load_vae(str(tmp_path / "pipeline")).sha256 == vae.sha256
    state = load_file(tmp_path / "pipeline/vae" / WEIGHTS)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for key, value in state.items():
        for new, before in old.items():
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        renamed[key] = value
    assert renamed.keys() != state.keys()
    shutil.copytree(tmp_path / "pipeline/vae", tmp_path / "old")
    save_file(renamed, tmp_path / "old" / WEIGHTS, metadata={"format": "pt"})
    assert torch.equal(load_vae(str(tmp_path / "old")).encode(images())[0], vae.encode(images())[0])


def broken(tmp_path, change):
    write_vae(tmp_path / "v")
    change(tmp_path / "v")
    with pytest.raises(ModelError) as caught:
        load_vae(str(tmp_path / "v"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit_config(**changes):
    def change(folder):
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / WEIGHTS).rename(f / "diffusion_pytorch_model.bin"), "diffusion_pytorch_model.bin, a pickle"),
        (lambda f: (f / WEIGHTS).unlink(), f"holds no {WEIGHTS}"),
        (lambda f: (f / "config.json").unlink(), "holds no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "is not the config"),
        (edit_config(_class_name="UNet2DModel"), "is a UNet2DModel, not an AutoencoderKL"),
        (edit_config(in_channels=1), "must take and give 3"),
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-1000]), "cannot load the VAE"),
        (lambda f: (f / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "git lfs pull"),
        (lambda f: (f / WEIGHTS).write_text("<html>404</html>"), "web page"),
        (lambda f: (f / WEIGHTS).write_bytes(b""), "is empty"),
        (edit_config(latent_channels=8), "cannot load|does not fit"),
    ],
)
def test_what_cannot_be_used_has_its_sentence(tmp_path, change, message):
    assert re.search(message, broken(tmp_path, change))


def test_every_weight_must_come_from_the_file(tmp_path):
    def change(without=None, extra=None):
        def apply(folder):
            state = load_file(folder / WEIGHTS)
            state.pop(without, None)
            save_file({**state, **(extra or {})}, folder / WEIGHTS, metadata={"format": "pt"})

        return apply

    missing = broken(tmp_path, change(without="decoder.conv_out.bias"))
    assert re.search(r"decoder\.conv_out\.bias missing|missing: *decoder\.conv_out\.bias", missing)
    assert "something unknown" in broken(tmp_path, change(extra={"something": torch.zeros(3)}))


def test_a_place_that_is_nothing(tmp_path):
    with pytest.raises(ModelError, match="there is no folder nonsense"):
        load_vae("nonsense")
    (tmp_path / "x.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="is a file: give the folder"):
        load_vae(str(tmp_path / "x.safetensors"))


def test_a_hub_id_that_cannot_be_reached(tmp_path, monkeypatch):
    import huggingface_hub

    def offline(*arguments, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", offline)
    with pytest.raises(ModelError, match=r"hub cannot be asked \(no network\): run `hf download stabilityai/sd-vae-ft-ema"):
        load_vae("stabilityai/sd-vae-ft-ema")


def test_without_diffusers_the_command_to_install_it_is_named(tmp_path, monkeypatch):
    place = write_vae(tmp_path / "v")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ConfigError, match=r"pip install 'mmgen\[latents\]'"):
        load_vae(place)
