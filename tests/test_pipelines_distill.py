"""From captioned images to a student of a pipeline: latents with text, distillation by both methods, prompts drawn and decoded."""

from __future__ import annotations

import shutil

import pytest
import torch
from accelerate.state import AcceleratorState
from test_latents_text import cached, write_images
from tiny_pipelines import tiny_pipeline
from toy_distill import Quiet, weights

import mmgen
from mmgen.config.distill import DistillConfig
from mmgen.config.distill import resolve as resolve_student
from mmgen.config.sections import nest, read_preset
from mmgen.config.teacher import TeacherConfig
from mmgen.config.teacher import resolve as resolve_teacher
from mmgen.encoders import vae as vaes
from mmgen.encoders.pipeline_text import pipeline_encoder
from mmgen.errors import ConfigError, DataError, ModelError
from mmgen.methods import DISTILLATION, TEACHER
from mmgen.methods.run import train as train_method
from mmgen.models.files import read_config
from mmgen.models.pixels import to_uint8
from mmgen.sampling import prompts
from mmgen.sampling.drawing import SampleSettings, draw, plan

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(autouse=True)
def places(monkeypatch, tmp_path):
    monkeypatch.setenv("MMGEN_INCEPTION", "")
    monkeypatch.setenv("MMGEN_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """images/ with captions, a pipeline with CLIP and one with T5, and their latents."""
    folder = tmp_path_factory.mktemp("distill")
    write_images(folder / "images", 24)
    for kind in ("sdxl", "pixart_alpha"):
        tiny_pipeline(kind, folder / kind)
        cached(folder, folder / f"latents-{kind}", kind)
    tiny_pipeline("sd15", folder / "sd15")
    cached(folder, folder / "latents", None)
    return folder


def distill(place, out, kind, latents=None, **changes):
    small = {
        "teacher.name": str(place / kind), "data.name": str(place / (latents or f"latents-{kind}")), "teacher.guidance": 3.0,
        "student.steps": 2, "train.batch_size": 8, "train.max_images": 24, "run.batch_per_device": 4, "run.eval_num": 0,
        "run.teacher_steps": 2, "optimizer.lr": 1e-3, "optimizer.warmup_images": 0, "run.checkpoint_every": 8, "optimizer.decay": "none",
    }  # fmt: skip
    config = resolve_student(nest({**small, **changes}, DistillConfig))
    AcceleratorState._reset_state(reset_partial_state=True)
    return train_method(DISTILLATION, config, out, Quiet(), device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("kind, method", [("sdxl", "alternating"), ("pixart_alpha", "instant")])
def test_a_pipeline_is_distilled_and_its_student_draws_prompts(place, tmp_path, kind, method, monkeypatch):
    distill(place, tmp_path / "whole", kind, **{"loss.method": method})
    distill(place, tmp_path / "parts", kind, **{"loss.method": method, "train.max_images": 16})
    distill(place, tmp_path / "parts", kind, **{"loss.method": method})
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)
    config = read_config(tmp_path / "whole/model.safetensors")
    assert config.text.pipeline and config.captions[0] == "a red dot" and config.latents.vae == str(place / kind)
    student, teacher = mmgen.load(tmp_path / "whole"), mmgen.load(place / kind)
    moved = [key for key, value in student.network.state_dict().items() if not torch.equal(value, teacher.network.state_dict()[key])]
    assert moved and not any(key.startswith("null_") for key in moved)
    settings = SampleSettings(prompts=("a red dot", "a fox"), seed=3)
    images, _ = draw(student, settings, range(4))
    assert images.shape == (4, 3, 16, 16) and torch.equal(images[1:2], draw(student, settings, [1])[0])
    assert not torch.equal(images[:1], draw(student, SampleSettings(prompts=("a blue fox",), seed=3), [0])[0])
    assert plan(student.config, SampleSettings(prompts=("image " * 200,))).notes[-1].startswith("1 of 1 prompts are longer than")
    # the pipeline moved elsewhere: the model file is complete, its encoders are looked for where the variables say
    shutil.copytree(place / kind, tmp_path / "moved")
    for cache in (pipeline_encoder, vaes._load, prompts._encoded, prompts.cut_prompts):
        cache.cache_clear()
    (tmp_path / "away").mkdir()
    shutil.move(place / kind, tmp_path / "away" / kind)
    try:
        with pytest.raises(ModelError, match=r"there is no folder .*MMGEN_ENCODER may name"):
            draw(student, settings, [0])
        monkeypatch.setenv("MMGEN_ENCODER", str(tmp_path / "moved"))
        with pytest.raises(ModelError, match=r"there is no folder .*MMGEN_VAE may name"):
            draw(student, settings, [0])
        monkeypatch.setenv("MMGEN_VAE", str(tmp_path / "moved"))
        assert torch.equal(draw(student, settings, range(4))[0], images)
        tiny_pipeline(kind, tmp_path / "moved", seed=1)
        for cache in (pipeline_encoder, prompts._encoded, prompts.cut_prompts):
            cache.cache_clear()
        with pytest.raises(ConfigError, match="is not the one of the training"):
            draw(student, settings, [0])
    finally:
        shutil.move(tmp_path / "away" / kind, place / kind)
        pipeline_encoder.cache_clear()


def test_latents_that_do_not_fit_the_teacher_are_one_sentence(place, tmp_path):
    with pytest.raises(ConfigError, match="knows latents of .*sdxl, and .*latents-pixart_alpha holds those of"):
        distill(place, tmp_path / "out", "sdxl", latents="latents-pixart_alpha")
    with pytest.raises(DataError, match="trains on latents of 4 channels, and .*images is no folder of them"):
        distill(place, tmp_path / "out", "sdxl", latents="images")
    with pytest.raises(ConfigError, match="data.captions is a choice of `mmgen cache-latents`"):
        distill(place, tmp_path / "out", "sdxl", **{"data.captions": "c.json"})


def test_ones_own_text_teacher_on_latents_and_its_student(place, tmp_path):
    tiny = {
        "network.model_channels": 8, "network.kind": "unet", "text.width": 8, "train.batch_size": 8, "train.max_images": 16, "data.leave_out": [],
        "run.batch_per_device": 8, "run.eval_num": 0, "optimizer.warmup_images": 0, "run.eval_steps": [2], "data.name": str(place / "latents"),
        "data.resolution": 8, "data.channels": 4,
    }  # fmt: skip
    AcceleratorState._reset_state(reset_partial_state=True)
    config = resolve_teacher(read_preset("digits-text"), nest(tiny, TeacherConfig))
    train_method(TEACHER, config, tmp_path / "teacher", Quiet(), device="cpu")
    teacher = mmgen.load(tmp_path / "teacher")
    assert teacher.config.text.encoder == "bytes" and teacher.config.latents is not None and teacher.config.captions[0] == "a red dot"
    distill(tmp_path, tmp_path / "student", "teacher", latents=place / "latents")
    images, _ = draw(mmgen.load(tmp_path / "student"), SampleSettings(prompts=("a red dot",)), range(2))
    assert images.shape == (2, 3, 16, 16)


def test_an_autoencoder_saved_in_half_precision_decodes_in_float32(tmp_path):
    """SDXL's overflows in float16."""
    folder = tiny_pipeline("sdxl", tmp_path / "p")
    vae = diffusers.AutoencoderKL.from_pretrained(folder, subfolder="vae")
    with torch.no_grad():
        vae.decoder.conv_in.weight.mul_(1e5)
        vae.decoder.conv_in.bias.mul_(1e5)
    vae.half().save_pretrained(tmp_path / "p/vae")
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 20
    with torch.no_grad():
        assert not vae.decode(latents.half()).sample.isfinite().all()
        expected = vae.float().decode(latents).sample
    images = vaes.load_vae(folder).decode(latents, False)
    assert expected.isfinite().all() and torch.equal(images, to_uint8(expected))
