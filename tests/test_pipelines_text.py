"""Texts by the encoders of a pipeline: what its network is given is what the pipeline itself gives it."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_pipelines import latent_side, tiny_pipeline

from mmgen.encoders.pipeline_text import pipeline_encoder
from mmgen.encoders.text import count_cut, described, encode
from mmgen.errors import ConfigError, ModelError
from mmgen.networks.text import TextSettings

diffusers = pytest.importorskip("diffusers")

CLASSES = {
    "sd15": "StableDiffusionPipeline", "sd21": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline",
    "pixart_alpha": "PixArtAlphaPipeline", "pixart_sigma": "PixArtSigmaPipeline", "sd3": "StableDiffusion3Pipeline",
    "sana": "SanaPipeline",
}  # fmt: skip
TEXTS = ["A red fox", "", "many words " * 60, " In snow "]


@pytest.fixture(autouse=True)
def fresh():
    pipeline_encoder.cache_clear()


def make(tmp_path, kind, **settings) -> TextSettings:
    return described(TextSettings(encoder=tiny_pipeline(kind, tmp_path / kind), pipeline=CLASSES[kind], **settings))


def given_to_the_network(folder, kind, prompts, **more):
    """Tokens, mask and pooled that the pipeline's own call gives its network: of no text, then of the prompts."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    network, seen = getattr(pipeline, "unet", None) or pipeline.transformer, []
    network.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    options = {} if kind in ("sd15", "sd21", "sdxl", "sd3") else {"use_resolution_binning": False, "clean_caption": False}
    side = 2 * latent_side(kind)
    pipeline(prompts, num_inference_steps=2, guidance_scale=3.0, height=side, width=side, output_type="latent", **options, **more)
    found = seen[0]
    pooled = found.get("pooled_projections", (found.get("added_cond_kwargs") or {}).get("text_embeds"))
    return found["encoder_hidden_states"], found.get("encoder_attention_mask"), pooled


@pytest.mark.parametrize("kind", CLASSES)
def test_it_gives_what_the_pipeline_gives_its_network(tmp_path, kind):
    settings = make(tmp_path, kind)
    text = encode(settings, TEXTS)
    tokens, mask, pooled = given_to_the_network(settings.encoder, kind, TEXTS)
    assert text.tokens.shape[1:] == (settings.length, settings.width) and settings.length == tokens.shape[1]
    assert torch.equal(text.tokens, tokens[4:])
    torch.testing.assert_close(text.empty.tokens, tokens[:1], rtol=1e-6, atol=1e-6)  # encoded alone, not four times
    assert text.mask.all() if mask is None else torch.equal(text.mask, mask[4:].bool()) and torch.equal(text.empty.mask, mask[:1].bool())
    if pooled is None:
        assert text.pooled is None and text.empty.pooled is None and settings.pooled == 0
    else:
        assert torch.equal(text.pooled, pooled[4:]) and settings.pooled == pooled.shape[1]
        torch.testing.assert_close(text.empty.pooled, pooled[:1], rtol=1e-6, atol=1e-6)
    assert text.empty.tokens.any() == (kind != "sdxl")  # whose null is zeros


@pytest.mark.parametrize("kind", CLASSES)
def test_a_negative_prompt_takes_the_place_of_the_null(tmp_path, kind):
    settings = make(tmp_path, kind)
    found = encode(settings, ["a fox"], empty="Fog").empty
    tokens, _, pooled = given_to_the_network(settings.encoder, kind, ["a fox"], negative_prompt=["Fog"])
    assert torch.equal(found.tokens, tokens[:1]) and (pooled is None or torch.equal(found.pooled, pooled[:1]))


@pytest.mark.parametrize("kind", CLASSES)
def test_texts_that_are_cut_are_counted_and_nothing_is_warned(tmp_path, kind, caplog, capfd):
    settings = make(tmp_path, kind)
    diffusers.utils.logging.get_logger("diffusers").addHandler(caplog.handler)
    capfd.readouterr()
    with caplog.at_level(logging.WARNING):
        assert count_cut(settings, TEXTS) == 1
        encode(settings, TEXTS)
    assert not caplog.records and not capfd.readouterr().err
    # what is one token shorter than the encoder takes is not cut: letters are tokens, and Gemma's beginning and T5's end one each
    longest = {"sd15": 10, "sd21": 10, "sdxl": 10, "pixart_alpha": 119, "pixart_sigma": 299, "sd3": 255, "sana": 298}[kind]
    space = 1 if kind in ("pixart_alpha", "pixart_sigma", "sd3") else 0  # T5's words begin with one
    fits, cut = "x" * (longest - space), "x" * (longest - space + 1)
    assert (count_cut(settings, [fits]), count_cut(settings, [cut])) == (0, 1)


def test_sdxl_without_zeros_encodes_the_empty_text(tmp_path):
    settings = make(tmp_path, "sdxl")
    index = Path(settings.encoder) / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "force_zeros_for_empty_prompt": False}))
    pipeline_encoder.cache_clear()
    with pytest.raises(ConfigError, match="not the one of the training"):  # the null is a part of what it is
        encode(settings, ["a fox"])
    text = encode(described(replace(settings, sha256="")), ["a fox", ""])
    torch.testing.assert_close(text.empty.tokens, text.tokens[1:], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(text.empty.pooled, text.pooled[1:], rtol=1e-6, atol=1e-6)
    assert text.empty.tokens.any() and text.empty.pooled.any()


def test_sd3_without_t5_has_zeros_in_its_place(tmp_path):
    settings = make(tmp_path, "sd3")
    folder = Path(settings.encoder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "text_encoder_3": [None, None], "tokenizer_3": [None, None]}))
    shutil.rmtree(folder / "text_encoder_3")
    pipeline_encoder.cache_clear()
    text = encode(described(replace(settings, sha256="")), ["a fox"])
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    tokens, _, pooled, _ = pipeline.encode_prompt("a fox", None, None)
    assert torch.equal(text.tokens, tokens) and torch.equal(text.pooled, pooled) and not text.tokens[:, 12:].any()


def test_its_length_can_be_set_where_the_encoder_takes_any(tmp_path):
    assert encode(make(tmp_path, "pixart_alpha", length=20), ["a fox"]).tokens.shape[1] == 20
    assert make(tmp_path, "sd3", length=30).length == 30
    with pytest.raises(ConfigError, match="text.length is 20, and the encoders of .* give 12 tokens"):
        make(tmp_path, "sd15", length=20)


def test_a_moved_encoder_is_found_and_a_changed_one_refused(tmp_path, monkeypatch):
    settings = make(tmp_path, "sd15")
    text = encode(settings, ["a fox"])
    shutil.move(settings.encoder, tmp_path / "moved")
    pipeline_encoder.cache_clear()
    with pytest.raises(ModelError, match=r"there is no folder .*; \$MMGEN_ENCODER may name"):
        encode(settings, ["a fox"])
    monkeypatch.setenv("MMGEN_ENCODER", str(tmp_path / "moved"))
    assert torch.equal(encode(settings, ["a fox"]).tokens, text.tokens)
    tiny_pipeline("sd15", tmp_path / "moved", seed=1)
    pipeline_encoder.cache_clear()
    with pytest.raises(ConfigError, match="is not the one of the training, or has changed since"):
        encode(settings, ["a fox"])
    monkeypatch.setenv("MMGEN_ENCODER", tiny_pipeline("sdxl", tmp_path / "other"))
    with pytest.raises(ModelError, match="is a StableDiffusionXLPipeline, and the model's texts are encoded by a StableDiffusionPipeline"):
        encode(settings, ["a fox"])


def in_index(**changes):
    def change(folder):
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps({**index, **changes}))

    return change


def renamed(name, to):
    return lambda folder: (folder / "text_encoder" / name).rename(folder / "text_encoder" / to)


def cut_short(folder):
    file = folder / "text_encoder" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:3000])


def without_a_layer(folder):
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "text_encoder" / "model.safetensors")
    save_file({key: value for key, value in state.items() if "final_layer_norm" not in key}, folder / "text_encoder" / "model.safetensors")


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda folder: (folder / "model_index.json").unlink(), "not the folder of a pipeline of diffusers: it has no model_index.json"),
        (lambda folder: (folder / "model_index.json").write_text("{"), "not the folder of a pipeline of diffusers"),
        (in_index(_class_name="FluxPipeline"), "is a pipeline of the class 'FluxPipeline', which mmgen does not know"),
        (lambda folder: shutil.rmtree(folder / "text_encoder"), "has no folder text_encoder"),
        (lambda folder: shutil.rmtree(folder / "tokenizer"), "has no folder tokenizer"),
        (in_index(text_encoder=[None, None]), "has no text_encoder .null"),
        (in_index(text_encoder=["custom", "CLIPTextModel"]), "only encoders and tokenizers of transformers"),
        (in_index(text_encoder=["transformers", "AutoModel"]), "is a 'AutoModel', which mmgen does not read"),
        (in_index(tokenizer=["transformers", "pipeline"]), "is a 'pipeline', which mmgen does not read"),
        (renamed("model.safetensors", "model.fp16.safetensors"), "half precision only .model.fp16.safetensors"),
        (renamed("model.safetensors", "pytorch_model.bin"), "only pytorch_model.bin, a pickle, which is not read"),
        (lambda folder: (folder / "text_encoder" / "model.safetensors").unlink(), "holds no weights"),
        (cut_short, "the text_encoder of .* cannot be read"),
        (without_a_layer, "is not whole: its weights lack text_model.final_layer_norm|lack final_layer_norm"),
        (lambda folder: (folder / "text_encoder" / "config.json").write_text("{"), "the text_encoder of .* cannot be read"),
    ],
)  # fmt: skip
def test_what_is_missing_or_odd_is_one_sentence(tmp_path, change, sentence):
    folder = Path(tiny_pipeline("sd15", tmp_path / "p"))
    change(folder)
    with pytest.raises(ModelError, match=sentence) as error:
        described(TextSettings(encoder=str(folder), pipeline="StableDiffusionPipeline"))
    assert "\n" not in str(error.value)


def test_a_word_that_is_no_folder_is_one_sentence(tmp_path):
    with pytest.raises(ModelError, match="there is no folder"):
        described(TextSettings(encoder=str(tmp_path / "nowhere"), pipeline="StableDiffusionPipeline"))
