"""What a file says of its model is taken, an option says the rest, and what is assumed is said: heads, classes, null class, range."""

from __future__ import annotations

from dataclasses import replace

import original_files
import pytest
import torch
from golden import state
from test_convert import run, write
from test_dit_files import found, repa_tensors
from families import FILES
from tiny_model import make_denoiser

import mmgen
from mmgen.cli.convert import convert as convert_command
from mmgen.cli.convert import inspect
from mmgen.errors import ConfigError, ModelError
from mmgen.formats import dit, edm
from mmgen.formats.family import ConvertOptions
from mmgen.formats.recognise import convert
from mmgen.models.denoiser import Denoiser
from mmgen.diffusion.flow_map import FlowMapSettings
from mmgen.models.guidance import knows_null
from mmgen.models.config import ModelConfig
from mmgen.networks import UNetSettings
from mmgen.networks.conditions import Labels
from mmgen.sampling.drawing import SampleSettings, plan

HEADS = {"num_heads": 4}


def class_table(rows: int) -> dict[str, torch.Tensor]:
    return state("dit_learn_sigma") | {"y_embedder.embedding_table.weight": torch.randn(rows, 48)}


# ---- attention heads


def wide(hidden: int = 768) -> dict[str, torch.Tensor]:
    """A flat DiT of one block and this width, whose tensors do not tell its heads."""
    shapes = {"patch_embed.weight": (hidden, 4, 2, 2), "time_mlp.linear0.weight": (hidden, 256)}
    shapes |= {"time_mlp.linear1.weight": (hidden, hidden), "label_embed.weight": (1001, hidden)}
    shapes |= {"out.weight": (32, hidden), "out_modulation.weight": (2 * hidden, hidden), "position": (1, 16, hidden)}
    block = {"qkv": (3, 1), "proj": (1, 1), "fc1": (4, 1), "fc2": (1, 4), "modulation": (6, 1)}
    shapes |= {f"blocks.0.{key}.weight": (a * hidden, b * hidden) for key, (a, b) in block.items()}
    shapes |= {k.replace("weight", "bias"): v[:1] for k, v in shapes.items() if k not in ("position", "label_embed.weight")}
    names = dit.original_names(1)
    return {names[key]: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def test_heads_are_the_files_or_the_options_or_said_to_be_assumed():
    assumed = dit.convert(found(wide()), ConvertOptions("dit"))
    assert assumed.config.network.num_heads == 12
    assert any("12 attention heads, as published for width 768" in sentence for sentence in assumed.assumed)
    told = dit.convert(found(wide()), ConvertOptions("dit", heads=16))
    assert told.config.network.num_heads == 16 and not any("heads" in sentence for sentence in told.assumed)
    for arguments in ({"num_heads": 16}, {"model": "DiT-B/2"}):
        said = dit.convert(found(wide(), **arguments), ConvertOptions("dit"))
        assert said.config.network.num_heads == arguments.get("num_heads", 12)
        assert not any("heads" in sentence for sentence in said.assumed)


@pytest.mark.parametrize(
    "arguments, options, words",
    [
        ({"num_heads": 4}, {"heads": 6}, "says itself that it has 4 attention heads, not 6"),
        ({}, {"heads": 5}, "48 channels, which 5 attention heads do not divide"),
        ({"num_heads": 4, "num_classes": 10}, {"num_classes": 11}, "says itself that it has 10 classes, not 11"),
        ({"num_heads": 4}, {"num_classes": 9}, "11 class embeddings, which are not those of 9 classes"),
    ],
)
def test_options_against_the_file(arguments, options, words):
    with pytest.raises(ConfigError, match=words):
        convert(found(state("dit_learn_sigma"), **arguments), ConvertOptions("dit", **options))


@pytest.mark.parametrize("options", [{"heads": 4}, {"num_classes": 10}, {"guide_all": True}])
def test_options_are_for_transformers(options):
    with pytest.raises(ConfigError, match="leave (it|them) out"):
        convert(FILES["edm_ddpmpp_cond"](), ConvertOptions(**options))


# ---- the null class of a transformer


@pytest.mark.parametrize(
    "rows, arguments, options, classes, null, said",
    [
        (11, {}, {}, 10, True, "of 11 class embeddings the last is that of no class"),
        (10, {}, {}, 10, False, "of 10 class embeddings none is that of no class"),
        (11, {"num_classes": 10}, {}, 10, True, None),
        (11, {"num_classes": 11}, {}, 11, False, None),
        (11, {"class_dropout_prob": 0.0}, {}, 11, False, None),
        (10, {"class_dropout_prob": 0.1}, {}, 9, True, None),
        (11, {}, {"num_classes": 11}, 11, False, None),
        (10, {}, {"num_classes": 9}, 9, True, None),
    ],
)
def test_the_null_class_of_a_dit(rows, arguments, options, classes, null, said):
    """DiT's table has num_classes + (class_dropout_prob > 0) rows: with 0, the last is a class like the others."""
    made = dit.convert(found(class_table(rows), **HEADS, **arguments), ConvertOptions("dit", **options))
    assert (made.config.num_classes, made.config.network.null_class) == (classes, null)
    assert knows_null(made.config) is null
    assert any("class embeddings" in sentence for sentence in made.assumed) == (said is not None)
    assert said is None or any(said in sentence for sentence in made.assumed)
    model = Denoiser(made.config)
    model.network.load_state_dict(made.state)
    model.eval().requires_grad_(False)
    y, sigma = torch.randn(2, 4, 8, 8), torch.ones(2, dtype=torch.float64)
    model.denoise(y, sigma, Labels(torch.tensor([0, classes - 1]), classes))  # the last class is there
    if null:
        model.denoise(y, sigma)
    else:
        with pytest.raises(ConfigError, match="no null class"):
            model.denoise(y, sigma)
    assert len(dit.original_state(made.config, made.state)["y_embedder.embedding_table.weight"]) == rows


# ---- guidance where no null was trained


def own(dropout: float | None):
    config = ModelConfig(UNetSettings(), FlowMapSettings(t_min=0.006, t_max=0.994), resolution=8, channels=1, num_classes=10)
    training = {} if dropout is None else {"config": {"data": {"label_dropout": dropout}}}
    return replace(config, training=training)


def converted(name: str, **changes):
    """A converted file; `changes` of its network's constructor arguments."""
    given = FILES[name]()
    if changes:
        given.arguments["modules"]["model"]["init_kwargs"] |= changes
    return convert(given, ConvertOptions()).config


GUIDED = {  # what, and whether guidance is possible
    "edm": (lambda: converted("edm_ddpmpp_cond"), False),
    "edm, ADM's network": (lambda: converted("edm_adm_cond"), False),
    "edm with label dropout": (lambda: converted("edm_ddpmpp_cond", label_dropout=0.1), True),
    "edm2": (lambda: converted_edm2(), False),
    "dit": (lambda: dit.convert(found(class_table(11), **HEADS), ConvertOptions("dit")).config, True),
    "dit without": (lambda: dit.convert(found(class_table(10), **HEADS), ConvertOptions("dit")).config, False),
    "sit without": (lambda: dit.convert(found(class_table(10), **HEADS), ConvertOptions("sit")).config, False),
    "repa without": (
        lambda: dit.convert(found(repa_tensors(), **HEADS, cfg_prob=0.0), ConvertOptions()).config, False,
    ),
    "mmgen": (lambda: own(0.1), True),
    "mmgen without": (lambda: own(0.0), False),
}  # fmt: skip


def converted_edm2():
    """The unconditional file of the tests says only that there are no classes: here with the setting of a model with classes."""
    return replace(converted("edm2"), num_classes=10, null_trained=False)


@pytest.mark.parametrize("what", GUIDED)
def test_guidance_needs_a_null_that_was_trained(what):
    make, possible = GUIDED[what]
    config = make()
    plan(config, SampleSettings(steps=4))
    if possible:
        assert plan(config, SampleSettings(steps=4, guidance=2.0)).guidance == 2
        return
    for w in (0.0, 2.0):
        with pytest.raises(ConfigError, match="also learned images without a class"):
            plan(config, SampleSettings(steps=4, guidance=w))


def test_where_nothing_says_it_is_said():
    assert knows_null(own(None)) is None
    assert any("nothing says whether" in note for note in plan(own(None), SampleSettings(steps=1, guidance=2.0)).notes)
    assert plan(own(None), SampleSettings(steps=1)).notes == ()


def test_distilling_with_guidance_needs_it_too(tmp_path):
    from mmgen.methods.distill.teachers import load_teacher

    for dropout, knows in ((0.0, False), (0.1, True)):
        training = {"config": {"data": {"label_dropout": dropout}}}
        path = make_denoiser(tmp_path / f"{dropout}.safetensors", channels=1, num_classes=10, training=training)
        assert load_teacher(path).has_null_class is knows


# ---- the range of noise levels


@pytest.mark.parametrize(
    "given, expected, assumed",
    [
        ({}, (0.002, 80.0), "sigma_min 0.002 and sigma_max 80, EDM's"),
        ({"sigma_min": 0.01, "sigma_max": 40.0}, (0.01, 40.0), None),
        ({"sigma_max": 160.0}, (0.002, 160.0), "sigma_min 0.002, EDM's"),
    ],
)
def test_an_edm_pickles_own_range(given, expected, assumed):
    file = FILES["edm_ddpmpp_cond"]()
    file.arguments["init_kwargs"] = {**file.arguments["init_kwargs"], **given}
    made = edm.convert(file, ConvertOptions())
    assert (made.config.denoiser.sigma_min, made.config.denoiser.sigma_max) == expected
    assert made.assumed == () if assumed is None else assumed in made.assumed[0]
    times = plan(made.config, SampleSettings(steps=5)).times
    assert (times[0], times[-2]) == pytest.approx(expected[::-1])


# ---- said where it can be read


def test_what_is_assumed_is_shown_and_recorded(tmp_path):
    path, options = write("dit", tmp_path)
    sentence = "of 11 class embeddings the last is that of no class"
    assert sentence in run(inspect, path, *options)
    text = run(convert_command, path, tmp_path / "m.safetensors", *options)
    assert sentence in text and "assumed" in text
    assert sentence in (tmp_path / "m.md").read_text()
    provenance = mmgen.load(tmp_path / "m.safetensors").config.training["converted"]
    assert any(sentence in line for line in provenance["assumed"])
    assert sentence not in run(inspect, path, *options, "--num-classes", 10)


def test_heads_on_the_command_line(tmp_path):
    original_files.write_pt(tmp_path / "file", state("dit_learn_sigma"))
    with pytest.raises(ConfigError, match="give --heads"):
        run(convert_command, tmp_path / "file", tmp_path / "m.safetensors", "--type", "dit")
    run(convert_command, tmp_path / "file", tmp_path / "m.safetensors", "--type", "dit", "--heads", 4)
    assert mmgen.load(tmp_path / "m.safetensors").config.network.num_heads == 4


def test_a_dit_without_a_null_class_is_none_of_diffusers(tmp_path):
    from mmgen.formats.diffusers_dit import for_writing

    made = dit.convert(found(class_table(10), **HEADS), ConvertOptions("dit"))
    with pytest.raises((ConfigError, ModelError), match="no null class"):
        for_writing(made.config, made.state)
