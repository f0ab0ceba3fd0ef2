"""The autoencoder of a pipeline: mmgen's decoding of its latents is the pipeline's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mmgen.encoders.pipeline_vae import pipeline_latents, vae_factor
from mmgen.encoders.vae import decoder, load_vae, normalise
from mmgen.errors import ModelError
from mmgen.models.pixels import from_uint8, to_uint8
from tiny_pipelines import latent_side, tiny_pipeline

diffusers = pytest.importorskip("diffusers")


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "sd3", "sana"])
def test_decodes_as_the_pipeline_does(tmp_path, kind):
    folder = Path(tiny_pipeline(kind, tmp_path))
    side = latent_side(kind)
    latents = pipeline_latents(folder, str(folder), 2 * side)
    x = torch.randn(3, 4, side, side, generator=torch.Generator().manual_seed(0))
    vae = diffusers.DiffusionPipeline.from_pretrained(folder).vae
    config = vae.config
    with torch.no_grad():
        raw = x / config.scaling_factor + (getattr(config, "shift_factor", None) or 0)  # as each pipeline's __call__ has it
        expected = to_uint8(vae.decode(raw, return_dict=False)[0])
    found = decoder(latents)(x)
    assert (found.int() - expected.int()).abs().max() <= 1 and found.float().std() > 5
    assert vae_factor(folder, "p") == 2
    mean, std = load_vae(str(folder)).encode(found)
    with torch.no_grad():
        encoded = vae.encode(from_uint8(found))
        expected = encoded.latent_dist.mean if kind != "sana" else encoded.latent
    torch.testing.assert_close(normalise(mean, latents), (expected - (getattr(config, "shift_factor", None) or 0)) * config.scaling_factor)
    assert bool(std.any()) == (kind != "sana")


def test_means_and_standard_deviations_of_a_pipeline(tmp_path):
    folder = Path(tiny_pipeline("sdxl", tmp_path))
    file = folder / "vae" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "latents_mean": [1, 2, 3, 4], "latents_std": [5, 6, 7, 8]}))
    latents = pipeline_latents(folder, "p", 16)
    assert latents.mean == (1, 2, 3, 4) and latents.std == pytest.approx([x / 0.13025 for x in (5, 6, 7, 8)])


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda vae: (vae / "config.json").unlink(), "has no vae/config.json"),
        (lambda vae: (vae / "config.json").write_text('{"_class_name": "VQModel"}'), "is a 'VQModel': only AutoencoderKL"),
        (lambda vae: (vae / "config.json").write_text("{"), "is damaged"),
        (lambda vae: (vae / "diffusion_pytorch_model.safetensors").rename(vae / "diffusion_pytorch_model.fp16.safetensors"), "only diffusion_pytorch_model.fp16"),
        (lambda vae: (vae / "diffusion_pytorch_model.safetensors").rename(vae / "diffusion_pytorch_model.bin"), "only diffusion_pytorch_model.bin"),
    ],
)  # fmt: skip
def test_what_is_not_whole_is_one_sentence(tmp_path, change, sentence):
    folder = Path(tiny_pipeline("sd15", tmp_path))
    change(folder / "vae")
    with pytest.raises(ModelError, match=sentence):
        pipeline_latents(folder, "the pipeline", 16)
