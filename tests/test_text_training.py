"""Captions from the data to a trained model: which are drawn, what a frozen encoder makes of them, teachers and students of text."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_encoder import make_encoder
from toy_distill import Quiet, weights
from accelerate.state import AcceleratorState

from mmgen.config.distill import DistillConfig
from mmgen.config.distill import resolve as resolve_student
from mmgen.config.sections import nest, read_preset
from mmgen.config.teacher import TeacherConfig, resolve
from mmgen.data.digits import captions, read_digits
from mmgen.data.texts import encode_captions, without
from mmgen.encoders import text as encoders
from mmgen.errors import ConfigError, ModelError
from mmgen.methods import DISTILLATION, TEACHER
from mmgen.methods.run import train as train_method
from mmgen.models.files import read_config
from mmgen.networks.text import TextSettings
from mmgen.sampling.drawing import SampleSettings, draw
from mmgen.sampling.loading import load
from mmgen.training.batches import fetch
from mmgen.training.start import load_data

TINY = {
    "network.model_channels": 8, "text.width": 8, "train.batch_size": 16, "train.max_images": 96, "run.batch_per_device": 8,
    "run.eval_num": 0, "run.checkpoint_every": 48, "optimizer.warmup_images": 32, "run.eval_steps": [2], "run.log_every": 2,
}  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def places(monkeypatch, tmp_path):
    monkeypatch.setenv("MMGEN_INCEPTION", "")
    monkeypatch.setenv("MMGEN_CACHE", str(tmp_path / "cache"))


def config_for(**changes):
    return resolve(read_preset("digits-text"), nest(TINY, TeacherConfig), nest(changes, TeacherConfig))


def train(out, reporter=None, **changes):
    AcceleratorState._reset_state(reset_partial_state=True)
    return train_method(TEACHER, config_for(**changes), out, reporter or Quiet(), device="cpu")


def test_strokes_of_digits_are_the_quarters_of_ink_in_each_class():
    images, labels = read_digits()
    texts = captions(images, labels)
    for label in (7, 8):
        own = np.flatnonzero(labels == label)
        ink = images[own].astype(float).sum((1, 2))
        words = [texts[row][0].split() for row in own]
        stroke = np.array([word[1] if len(word) == 3 else "" for word in words])
        quarter = round(len(own) / 4)
        assert (stroke == "thin").sum() == (stroke == "bold").sum() == quarter
        assert ink[stroke == "thin"].max() <= ink[stroke == ""].min() and ink[stroke == ""].max() <= ink[stroke == "bold"].min()
    assert labels[8] == 8 and texts[8][-1] == "an eight" and {len(one) for one in texts} == {1, 2}


def test_left_out_combinations_are_never_named_and_wrong_ones_are_said():
    loaded = load_data(config_for().data)
    named = set(loaded.captions.flatten().to_pylist())
    assert len(named) == 28 and not named & {"a bold three", "a thin seven"} and {"a thin three", "a seven"} <= named
    assert len(loaded.captions) == 1797
    with pytest.raises(ConfigError, match="no image has the caption 'a purple seven'"):
        without(loaded.captions, ("a purple seven",))
    with pytest.raises(ConfigError, match="images have no other caption"):
        without(loaded.captions, ("a seven",))


def test_a_caption_is_drawn_by_seed_and_number_whatever_the_batch():
    loaded = load_data(config_for().data)
    loaded = replace(loaded, texts=encode_captions(loaded.captions, TextSettings(length=16)))
    whole = fetch(loaded, 1700, 400, 0, CPU).condition  # across an epoch
    parts = [fetch(loaded, 1700 + i, 100, 0, CPU).condition for i in range(0, 400, 100)]
    assert torch.equal(whole.tokens, torch.cat([part.tokens for part in parts]))
    again, other = fetch(loaded, 1797, 1797, 0, CPU).condition, fetch(loaded, 1797, 1797, 1, CPU).condition
    assert torch.equal(again.tokens[:50], fetch(loaded, 1797, 50, 0, CPU).condition.tokens) and not torch.equal(again.tokens, other.tokens)
    drawn = ["".join(chr(i - 2) for i in row if i > 1) for row in again.tokens.tolist()]
    pairs = sum(len(text.split()) == 3 for text in drawn)
    two = sum(len(texts) == 2 for texts in loaded.captions.to_pylist())
    assert abs(pairs - two / 2) < 4 * (two / 4) ** 0.5  # one of two, evenly
    assert all(text in own for text, own in zip(drawn, _in_order(loaded, 1797), strict=True))


def _in_order(loaded, first):
    from mmgen.training.batches import data_indices

    texts = loaded.captions.to_pylist()
    return [texts[row] for row in data_indices(len(loaded), first, len(loaded), 0)]


def test_a_text_teacher_trains_resumes_bit_for_bit_and_draws(tmp_path):
    train(tmp_path / "whole")
    train(tmp_path / "parts", **{"train.max_images": 48})
    train(tmp_path / "parts")
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole if "optimizer" not in key)
    model = load(tmp_path / "whole")
    assert model.config.text.length == 16 and len(model.config.captions) == 1000 and "a bold three" not in model.config.captions
    settings = SampleSettings(steps=2, prompts=("a bold three", "a one"), guidance=2.0)
    images, labels = draw(model, settings, range(4))
    assert labels is None and torch.equal(images[2:], draw(model, replace(settings, batch_size=1), range(2, 4))[0])
    assert not torch.equal(draw(model, replace(settings, prompts=("a one",)), [0])[0], images[:1])
    assert draw(model, SampleSettings(steps=2), range(3))[0].shape == (3, 1, 8, 8)  # of the training data's captions


@pytest.mark.slow
@pytest.mark.parametrize("method", ["alternating", "instant"])
def test_students_of_text_by_both_methods(tmp_path, method):
    train(tmp_path / "teacher", **{"train.max_images": 32})
    small = {
        "teacher.name": str(tmp_path / "teacher"), "teacher.guidance": 2.0, "student.steps": 2, "loss.method": method,
        "train.batch_size": 16, "train.max_images": 64, "run.batch_per_device": 8, "run.eval_num": 0, "run.teacher_steps": 4,
        "optimizer.lr": 1e-3, "optimizer.warmup_images": 0,
    }  # fmt: skip
    config = resolve_student(nest(small, DistillConfig))
    AcceleratorState._reset_state(reset_partial_state=True)
    train_method(DISTILLATION, config, tmp_path / "student", Quiet(), device="cpu")
    student, teacher = load(tmp_path / "student"), load(tmp_path / "teacher")
    assert student.config.text == teacher.config.text and student.config.captions == teacher.config.captions
    settings = json.loads((tmp_path / "student" / "config.json").read_text())["config"]["data"]
    assert settings["text"] and settings["caption_dropout"] == 0 and settings["leave_out"] == ["a bold three", "a thin seven"]
    moved = [key for key, value in student.network.state_dict().items() if not torch.equal(value, teacher.network.state_dict()[key])]
    assert any(key.startswith("text.") for key in moved)  # its encoder is part of it, and learns
    with pytest.raises(ConfigError, match="no effect on a student"):
        draw(student, SampleSettings(prompts=("a one",), negative="a two", guidance=2.0), [0])
    with pytest.raises(ConfigError, match="is built in"):
        draw(student, SampleSettings(prompts=("a one",), guidance=2.0), [0])


def test_a_frozen_encoder_is_asked_once_and_its_null_is_in_the_model_file(tmp_path, monkeypatch):
    folder = make_encoder(tmp_path / "encoder")
    train(tmp_path / "run", **{"text.encoder": str(folder), "text.width": 128, "text.depth": 2})
    config = read_config(tmp_path / "run" / "model.safetensors")
    assert (config.text.width, config.text.pooled, len(config.text.sha256)) == (8, 8, 64)
    model = load(tmp_path / "run")
    features, mask, pooled = encoders.frozen_encoder(str(folder), 16)([""])
    assert torch.allclose(model.network.text.null_tokens[:, :2], features[:, :2], atol=2e-3) and torch.equal(model.network.text.null_mask, mask)
    assert mask.sum() == 2 and torch.allclose(model.network.text.null_pooled, features[:, :2].mean(1), atol=2e-3)  # [CLS] [SEP]
    assert draw(model, SampleSettings(steps=2, prompts=("a bold three",), guidance=3.0, negative="a one"), [0])[0].any()
    loaded = load_data(config_for().data)
    monkeypatch.setattr(encoders.FrozenEncoder, "__call__", None)  # whoever asks it again fails
    texts = encode_captions(loaded.captions, config.text)
    assert texts.tokens.shape == (29, 16, 8) and texts.tokens.dtype == np.float16 and texts.pooled.shape == (29, 8)


def test_a_changed_missing_or_broken_encoder_is_one_sentence(tmp_path):
    folder = make_encoder(tmp_path / "encoder")
    settings = encoders.described(TextSettings(encoder=str(folder), length=8))
    assert encoders.count_cut(settings, ["a bold three", "a " * 20]) == 1
    make_encoder(folder, seed=1)
    encoders.frozen_encoder.cache_clear()
    with pytest.raises(ConfigError, match="or has changed since"):
        encoders.encode(settings, ["a one"])
    with pytest.raises(ModelError, match="no text encoder in .*nowhere"):
        encoders.described(TextSettings(encoder=str(tmp_path / "nowhere")))
    encoders.frozen_encoder.cache_clear()
    (folder / "model.safetensors").write_bytes(b"no")
    with pytest.raises(ModelError, match="cannot be read as a text encoder"):
        encoders.described(settings)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"data.conditional": True}, "captions .--unconditional. or on classes"),
        ({"data.text": False}, "data.leave_out is of captions"),
        ({"data.text": False, "data.leave_out": []}, "section text is of captions"),
        ({"data.caption_dropout": 1.5}, "data.caption_dropout must be at least 0"),
        ({"text.heads": 3}, "multiple of text.heads 3"),
    ],
)
def test_settings_that_do_not_go_together(changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        config_for(**changes)


def test_students_of_classes_take_no_captions(tmp_path):
    from toy_distill import config_for as student_for
    from toy_distill import toy_teacher

    from mmgen.methods.distill.method import find_teacher

    with pytest.raises(ConfigError, match="the teacher takes none"):
        find_teacher(student_for(toy_teacher(tmp_path), **{"data.leave_out": ["a one"]}))


def test_text_on_the_command_line_takes_the_place_of_classes():
    from mmgen.cli.training_options import shared_changes
    from mmgen.methods.choosing import choose

    chosen = choose(TEACHER, shared_changes({"data": "digits", "text": True}))
    assert chosen.preset == "digits-teacher" and chosen.config.data.text and not chosen.config.data.conditional
    with pytest.raises(ConfigError, match="captions .--unconditional. or on classes"):
        choose(TEACHER, shared_changes({"data": "digits", "text": True, "conditional": True}))
