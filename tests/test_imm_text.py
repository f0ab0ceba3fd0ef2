"""IMM and MeanFlow with texts as the condition: training, prompts, guidance, a frozen encoder, a text teacher's weights."""

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from test_text_training import TINY, places, train  # noqa: F401
from tiny_encoder import make_encoder
from toy_distill import Quiet

from mmgen.config.imm import ImmConfig, resolve
from mmgen.config.sections import nest, read_preset
from mmgen.errors import ConfigError
from mmgen.methods import IMM
from mmgen.methods.imm.objective import imm_model_config, imm_task
from mmgen.methods.run import train as train_method
from mmgen.sampling.drawing import SampleSettings, draw
from mmgen.sampling.loading import load
from mmgen.training.batches import fetch
from mmgen.training.initial import begin_with, read_initial
from mmgen.training.start import load_data, with_texts


def config_for(preset="digits-text-imm", **changes):
    return resolve(read_preset(preset), nest({**TINY, **changes}, ImmConfig))


def train_imm(out, **changes):
    AcceleratorState._reset_state(reset_partial_state=True)
    return train_method(IMM, config_for(**changes), out, Quiet(), device="cpu")


@pytest.mark.slow
def test_a_run_on_captions_draws_what_it_is_asked_for(tmp_path):
    train_imm(tmp_path / "run", **{"optimizer.lr": 1e-2})
    model = load(tmp_path / "run")
    assert model.config.text.encoder == "bytes" and model.config.num_classes == 0 and len(set(model.config.captions)) == 28

    def drawn(prompt, **more):
        return draw(model, SampleSettings(steps=2, prompts=(prompt,), **more), range(4))[0].int()

    one = drawn("a bold one")
    assert not torch.equal(one, drawn("a thin eight")) and not torch.equal(one, drawn("a bold one", guidance=4.0))
    before = load_file(tmp_path / "run/model.safetensors")
    assert train_imm(tmp_path / "run", **{"optimizer.lr": 1e-2}).finished
    assert all(torch.equal(value, before[key]) for key, value in load_file(tmp_path / "run/model.safetensors").items())


@pytest.mark.parametrize("objective", ["imm", "mean_flow"])
def test_each_image_is_trained_with_its_own_text_and_some_with_none(objective, monkeypatch):
    """What the network is given, in both passes of IMM and in MeanFlow's one."""
    config = config_for() if objective == "imm" else resolve(
        read_preset("digits-meanflow"),
        nest({"data.conditional": False, "data.text": True, **{k: v for k, v in TINY.items() if k != "text.width"}}, ImmConfig),
    )  # fmt: skip
    dataset = load_data(config.data)
    model_config = imm_model_config(config, dataset.shape)
    dataset = with_texts(dataset, model_config.text, "cpu", Quiet())
    part = imm_task(config, model_config).trained["model"]
    seen, call = [], part.network.forward
    part.network.forward = lambda *given: (seen.append(given[3]), call(*given))[1]
    batch = fetch(dataset, 0, 64, 0, torch.device("cpu"))
    part.objective(batch)[0].backward()
    hidden = (batch.condition.tokens != seen[0].tokens).any(1)
    assert 0 < hidden.sum() < 20 and torch.equal(seen[0].tokens[hidden], batch.condition.null().tokens[hidden])
    assert len(seen) == (2 if objective == "imm" else 1) and all(torch.equal(one.tokens, seen[0].tokens) for one in seen)
    assert any(p.grad is not None and p.grad.any() for p in part.network.text.parameters())


@pytest.mark.slow
def test_the_null_of_a_frozen_encoder_is_in_the_model_file(tmp_path):
    folder = make_encoder(tmp_path / "encoder")
    train_imm(tmp_path / "run", **{"text.encoder": str(folder), "text.width": 128, "text.depth": 2, "train.max_images": 32})
    model = load(tmp_path / "run")
    assert model.network.text.null_tokens.abs().sum() > 0 and len(model.config.text.sha256) == 64
    assert draw(model, SampleSettings(steps=1, prompts=("a bold three",), guidance=3.0, negative="a one"), [0])[0].any()


def test_it_begins_with_a_text_teachers_weights(tmp_path):
    train(tmp_path / "teacher", **{"train.max_images": 32})
    teacher = load(tmp_path / "teacher")
    config = config_for(**{"flow.parametrization": "given", "train.init": str(tmp_path / "teacher")})
    from mmgen.methods.imm.objective import TRAINING

    _, config = TRAINING.find(config, "cpu")
    model_config = imm_model_config(config, load_data(config.data).shape)
    task = begin_with(imm_task(config, model_config), read_initial(str(tmp_path / "teacher")))
    found = task.trained["model"].network.state_dict()
    assert all(torch.equal(found[key], value) for key, value in teacher.network.state_dict().items())
    assert model_config.text == teacher.config.text


def test_what_is_of_captions_needs_them():
    with pytest.raises(ConfigError, match="section text is of captions"):
        config_for("digits-imm", **{"text.width": 16})
