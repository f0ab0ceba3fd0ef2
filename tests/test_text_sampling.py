"""`mmgen sample` by text: which prompt an image has, what lies beside the images, and what is refused, in one sentence."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from sampled import run
from tiny_model import awaken, make_denoiser, make_model
from toy_distill import V

from mmgen.errors import ConfigError
from mmgen.metrics.captions import read_captions
from mmgen.metrics.image_sets import drawn_images, image_set
from mmgen.networks.text import TextSettings
from mmgen.sampling.drawing import SampleSettings, draw, plan
from mmgen.sampling.loading import load

TEXT = TextSettings(length=12, width=8, depth=1, heads=2)
PROMPTS = ["a bold three", "a thin seven", "an eight"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    trained = {"config": {"data": {"caption_dropout": 0.1, "text": True}}}
    options = {"channels": 1, "text": TEXT, "captions": PROMPTS[1:], "training": trained}
    place = make_denoiser(tmp_path_factory.mktemp("model") / "m.safetensors", V, **options)
    return awaken(place)


def pixels(folder):
    return np.stack([np.asarray(Image.open(file)) for file in sorted(folder.glob("*.png"))])


def texts(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text("utf-8").splitlines()]


def test_image_i_has_prompt_i_modulo_their_number_whatever_the_batch(model, tmp_path):
    (tmp_path / "prompts.txt").write_text("\ufeffa bold three\n\na thin seven\r\nan eight\n", "utf-8")
    common = [str(model), "--prompts", str(tmp_path / "prompts.txt"), "--steps", "2"]
    run(*common, "--per-prompt", "2", "--out", tmp_path / "a", "--batch-size", "6")
    run(*common, "--num", "6", "--out", tmp_path / "b", "--batch-size", "4")
    run(*common, "--out", tmp_path / "c")  # one of each
    a, b, c = pixels(tmp_path / "a"), pixels(tmp_path / "b"), pixels(tmp_path / "c")
    assert len(a) == 6 and np.array_equal(a, b) and np.array_equal(a[:3], c)
    settings = SampleSettings(steps=2, prompts=("a thin seven",))
    assert np.array_equal(draw(load(model), settings, [4])[0][0, 0].numpy(), a[4])
    assert not np.array_equal(draw(load(model), replace(settings, prompts=("an eight",)), [4])[0][0, 0].numpy(), a[4])
    record = json.loads((tmp_path / "a" / "samples.json").read_text())
    assert record["prompts"] == 3 and len(record["prompts_sha256"]) == 64 and record["classes"] is None
    assert texts(tmp_path / "a")[4] == {"file_name": "000004.png", "text": "a thin seven"}
    assert read_captions(image_set(str(tmp_path / "a"))) == PROMPTS * 2


def test_other_prompts_do_not_join_and_replace_those_there_when_asked(model, tmp_path):
    common = [str(model), "--steps", "1", "--num", "2", "--out", tmp_path / "a"]
    run(*common, "--prompt", "an eight")
    with pytest.raises(ConfigError, match="prompts would be"):
        run(*common, "--prompt", "a one")
    run(*common, "--prompt", "a one", "--overwrite")
    assert [row["text"] for row in texts(tmp_path / "a")] == ["a one"] * 2


@pytest.mark.parametrize("name", ["x.npz", "x.png"])
def test_captions_lie_beside_a_file(model, tmp_path, name):
    run(str(model), "--prompt", "an eight", "--prompt", "a ö", "--num", "4", "--steps", "1", "--out", tmp_path / name)
    assert (tmp_path / f"{name}.txt").read_text("utf-8") == "an eight\na ö\n" * 2
    if name == "x.npz":
        assert read_captions(image_set(str(tmp_path / name))) == ["an eight", "a ö"] * 2


def test_without_prompts_captions_of_the_training_data_are_drawn_by_seed_and_number(model, tmp_path):
    run(str(model), "--num", "40", "--steps", "1", "--out", tmp_path / "a")
    found = [row["text"] for row in texts(tmp_path / "a")]
    assert set(found) == set(PROMPTS[1:]) and 8 < found.count(PROMPTS[1]) < 32
    loaded = load(model)
    drawn = drawn_images(loaded, plan(loaded.config, SampleSettings(steps=1)), 10, name="m", first=30)
    assert read_captions(drawn) == found[30:]  # as `mmgen fid --clip` and `mmgen compare` find them
    assert np.array_equal(drawn.read(0, 10, False)[:, 0], pixels(tmp_path / "a")[30:])


def test_a_negative_prompt_takes_the_place_of_the_null(model):
    loaded, base = load(model), SampleSettings(steps=2, prompts=("a one",), guidance=2.0)
    plain, led = draw(loaded, base, [0])[0], draw(loaded, replace(base, negative="a two"), [0])[0]
    assert not torch.equal(plain, led)
    same = draw(loaded, replace(base, negative="a one"), [0])[0]  # u + w (c - u) with u = c
    assert (same.int() - draw(loaded, replace(base, guidance=1.0), [0])[0].int()).abs().max() <= 1


def test_long_prompts_are_cut_counted_and_said_once(model, tmp_path):
    output = run(str(model), "--prompt", "a bold three and four", "--prompt", "a one", "--num", "4", "--steps", "1,2", "--out", tmp_path)
    assert output.replace("\n", " ").count("1 of 2 prompts are longer than the 12 bytes that this model reads: their ends are cut off") == 1


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--prompts", "EMPTY"], "holds no prompts"),
        (["--prompts", "LATIN"], "is not UTF-8"),
        (["--prompts", "nowhere.txt"], "cannot read nowhere.txt"),
        (["--prompt", " "], "holds an empty prompt"),
        (["--prompt", "a\nb"], "one line of text"),
        (["--prompt", "a", "--prompts", "EMPTY"], "are both given"),
        (["--per-prompt", "2"], "--per-prompt needs prompts"),
        (["--prompt", "a", "--per-prompt", "2", "--num", "3"], "leave --num out"),
        (["--prompt", "a", "--classes", "3"], "it draws what a text says"),
        (["--prompt", "a", "--negative-prompt", "b"], "a negative prompt needs guidance"),
    ],
)
def test_what_cannot_be_is_one_sentence(model, tmp_path, options, sentence):
    (tmp_path / "empty.txt").write_text("\n  \n")
    (tmp_path / "latin.txt").write_bytes("drei \xf6\n".encode("latin-1"))
    files = {"EMPTY": str(tmp_path / "empty.txt"), "LATIN": str(tmp_path / "latin.txt")}
    with pytest.raises(ConfigError, match=sentence):
        run(str(model), *[files.get(one, one) for one in options], "--steps", "1", "--out", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_model_of_classes_takes_no_prompts(tmp_path):
    place = make_model(tmp_path / "m.safetensors", channels=1, num_classes=10)
    with pytest.raises(ConfigError, match="takes no prompts, it draws classes"):
        run(str(place), "--prompt", "a one", "--out", tmp_path / "a")
