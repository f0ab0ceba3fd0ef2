"""Models of text in the rest of mmgen: the pipeline, the model card, conversion, and the data that a score compares them with."""

from dataclasses import replace

import pytest
from test_text_sampling import PROMPTS, model  # noqa: F401

from mmgen import data
from mmgen.errors import ConfigError
from mmgen.formats.convert import convert_file
from mmgen.methods import DISTILLATION
from mmgen.methods.choosing import choose
from mmgen.metrics.subjects import TrainingSet, training_images
from mmgen.models.files import read_config, save_model
from mmgen.report.model_card import model_card
from mmgen.sampling.pipeline import pipeline
from mmgen.sampling.record import training_data


def test_the_pipeline_takes_prompts(model):  # noqa: F811
    pipe = pipeline(model)
    assert len(pipe(prompt=PROMPTS, num_inference_steps=1, generator=3).images) == 3
    one = pipe(2, 1, prompt="an eight", generator=3, output_type="pt").images
    assert (one == pipe(2, 1, prompt=["an eight"] * 2, generator=3, output_type="pt").images).all()
    led = pipe(2, 1, prompt="an eight", generator=3, guidance_scale=3.0, negative_prompt="a one", output_type="pt").images
    assert (led != one).any()
    with pytest.raises(ConfigError, match="prompt holds no prompts"):
        pipe(prompt=[])


def test_the_card_says_what_it_takes(model):  # noqa: F811
    card = model_card(read_config(model), {})
    assert "pipeline_tag: text-to-image" in card and '--prompt "TEXT"' in card and "of a text (encoder: bytes)" in card


@pytest.mark.parametrize(("to", "out"), [("diffusers", "folder"), ("pt", "m.pt")])
def test_it_is_not_written_as_another_projects(model, tmp_path, to, out):  # noqa: F811
    with pytest.raises(ConfigError, match="by layers of mmgen's own"):
        convert_file(model, tmp_path / out, to=to)
    assert not (tmp_path / out).exists()


def test_a_score_finds_the_captioned_data_of_the_training_again(model):  # noqa: F811
    """The fingerprint of captioned data is of the captions too."""
    loaded = data.load("digits", with_captions=True)
    assert loaded.fingerprint != data.load("digits").fingerprint
    config = read_config(model)
    config.training["data"] = loaded.identity
    known = training_data(config)
    own = TrainingSet(known["data"], known["data_options"], known["data_place"], known["data_fingerprint"])
    assert training_images(own)[0].length == 1797


def test_the_preset_of_a_student_follows_from_the_teachers_kind(model, tmp_path):  # noqa: F811
    config = read_config(model)
    chosen = {}
    for name, one in (("text", config), ("plain", replace(config, text=None, captions=None))):
        save_model(tmp_path / f"{name}.safetensors", one, {})
        chosen[name] = choose(DISTILLATION, {"teacher.name": str(tmp_path / f"{name}.safetensors")})
    assert chosen["text"].preset == "digits-text-distill" and chosen["plain"].preset == "digits-distill"
    assert chosen["text"].config.teacher.guidance == 1.5 and chosen["text"].config.train == chosen["plain"].config.train
