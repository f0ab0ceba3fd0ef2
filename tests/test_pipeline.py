"""`mmgen.pipeline`: the interface of diffusers' pipelines, and the images of `model.sample`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from test_push import hub  # noqa: F401
from tiny_model import NAMES, make_denoiser

import mmgen
from mmgen.errors import ConfigError
from mmgen.sampling import pipeline as module
from mmgen.sampling.drawing import SampleSettings, draw
from mmgen.sampling.pipeline import Pipeline


@pytest.fixture(scope="module")
def pipe(digits_model):
    return mmgen.pipeline(digits_model)


def test_images_are_those_of_the_model(pipe):
    wanted = pipe.model.sample(3, steps=2, seed=7, classes=[3, 5, 3]).images
    made = pipe(class_labels=[3, "five", 3], num_inference_steps=2, generator=7).images
    assert [image.size for image in made] == [(8, 8)] * 3 and all(isinstance(image, Image.Image) for image in made)
    assert all(np.array_equal(np.asarray(image), one[0]) for image, one in zip(made, wanted, strict=True))
    array = pipe(3, 2, class_labels=[3, 5], generator=7, output_type="np").images
    assert array.shape == (3, 8, 8, 1) and array.dtype == np.float32
    assert np.array_equal(array[..., 0], wanted[:, 0].numpy().astype(np.float32) / 255)
    tensor = pipe(3, 2, class_labels=[3, 5], generator=7, output_type="pt").images
    assert torch.equal(tensor, wanted.float() / 255)


def test_settings_reach_the_sampler(pipe, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "draw", lambda model, settings, *more: asked.append(settings) or draw(model, settings, *more))
    pipe(2, 4, class_labels="zero", generator=1, guidance_scale=2.5, sampler="restart")
    assert asked == [SampleSettings(steps=4, seed=1, classes=["zero"], guidance=2.5, sampler="restart")]


def test_generators_tuples_and_callbacks(pipe):
    one, same = (torch.Generator().manual_seed(3) for _ in range(2))
    first = pipe(2, generator=one, output_type="pt", return_dict=False)
    assert isinstance(first, tuple) and torch.equal(first[0], pipe(2, generator=same, output_type="pt")[0])
    assert not torch.equal(first[0], pipe(2, generator=one, output_type="pt").images)  # the generator went on
    assert len(pipe().images) == 1 and len(pipe(class_labels=["one", "two"]).images) == 2
    told = []
    pipe(4, 2, callback=told.append)
    assert told[-1] == 4 and told == sorted(told) and 2 in told


@pytest.mark.parametrize("arguments, message", [
    ({"output_type": "latent"}, "pil, np, pt"), ({"class_labels": "ten"}, "class"), ({"class_labels": [10]}, "0 to 9"),
    ({"batch_size": 0}, "at least 1"), ({"batch_size": "2"}, "batch_size"), ({"num_inference_steps": 0}, "steps"),
    ({"sampler": "heun"}, "sampler"),
])  # fmt: skip
def test_refusals(pipe, arguments, message):
    with pytest.raises(ConfigError, match=message):
        pipe(**arguments)


def test_saved_and_loaded(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == ["README.md", "model.safetensors"]
    again = Pipeline.from_pretrained(tmp_path / "saved").to("cpu")
    assert again.config == pipe.config and again.device.type == "cpu" and again.config.class_names == NAMES
    assert torch.equal(again(2, generator=5, output_type="pt").images, pipe(2, generator=5, output_type="pt").images)


def test_a_denoiser_too(tmp_path):
    pipe = mmgen.pipeline(mmgen.load(make_denoiser(tmp_path / "d.safetensors", channels=3)))
    (image,) = pipe(num_inference_steps=2, generator=0).images
    assert image.mode == "RGB"


def test_pushed(pipe, hub):  # noqa: F811
    done = pipe.push_to_hub("user/digits", commit_message="hello")
    assert hub.message == "hello" and set(done.files) == {"model.safetensors", "README.md"}
