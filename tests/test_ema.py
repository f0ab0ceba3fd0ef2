"""EDM's ramp-up of the averages: its formula, and early samples of averaged weights that have variance."""

import math

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from test_training import Quiet, tiny

import mmgen
from mmgen.errors import ConfigError
from mmgen.models.build import build_model
from mmgen.sampling.drawing import SampleSettings, draw
from mmgen.training.collapse import spread_of
from mmgen.training.ema import EMA, ema_decays
from mmgen.methods import IMM
from mmgen.methods.run import train


def edm_beta(half_life: float, ratio: float | None, images: int, batch_size: int) -> float:
    """As training_loop.py of EDM's code has it, before cur_nimg is raised by the batch."""
    if ratio is not None:
        half_life = min(half_life, images * ratio)
    return 0.5 ** (batch_size / max(half_life, 1e-8))


@pytest.mark.parametrize("ratio", [None, 0.05, 0.3])
def test_decays_are_those_of_edm(ratio):
    """By decay and by half-life: 0.9 at 16 images a step is a half-life of 105.3 images."""
    train = tiny(**{"train.ema_rampup": ratio or 0}).train
    half_lives = {"0.9": 16 * math.log(0.5) / math.log(0.9), "64img": 64}
    layer = torch.nn.Linear(3, 2)
    ema = EMA(layer, ema_decays(train))
    expected = {name: layer.weight.detach().double().clone() for name in half_lives}
    for images in range(0, 16 * 300, 16):
        with torch.no_grad():
            layer.weight.copy_(torch.full((2, 3), math.sin(images)))
        ema.update(images)
        for name, half_life in half_lives.items():
            beta = edm_beta(half_life, ratio, images, 16)
            expected[name] = beta * expected[name] + (1 - beta) * layer.weight.detach().double()
            torch.testing.assert_close(ema.averages[name]["weight"].double(), expected[name], rtol=0, atol=1e-5)


def test_the_first_step_leaves_nothing_of_the_initial_weights():
    layer = torch.nn.Linear(2, 2)
    train = tiny().train
    ema = EMA(layer, ema_decays(train))
    with torch.no_grad():
        layer.weight.add_(1)
    ema.update(0)
    assert all(torch.equal(average["weight"], layer.weight) for average in ema.averages.values())


@pytest.mark.slow
def test_early_samples_of_averaged_weights_have_variance(tmp_path):
    """Within a factor of 2 of those of the weights themselves; without the ramp-up they have a thousandth: grey pictures."""
    settings = {
        "flow.parametrization": "simple_edm", "data.conditional": False, "network.dropout": 0.0, "optimizer.lr": 3e-3,
        "train.ema_betas": [0.9999], "train.ema_half_lives": [], "train.max_images": 960, "run.checkpoint_every": 960,
        "run.eval_num": 0,
    }  # fmt: skip
    train(IMM, tiny(**settings), tmp_path / "run", Quiet(), device="cpu")
    AcceleratorState._reset_state(reset_partial_state=True)
    averaged = mmgen.load(tmp_path / "run")
    own = build_model(averaged.config).eval()
    own.network.load_state_dict(load_file(tmp_path / "run/checkpoints/000000000960/network.safetensors"))
    first, second = (draw(model, SampleSettings(steps=1), range(100))[0].numpy() for model in (averaged, own))
    ratio = spread_of(first) / spread_of(second)
    assert 0.5 < ratio < 2


def test_a_ramp_of_less_than_nothing_is_refused():
    with pytest.raises(ConfigError, match="train.ema_rampup must be 0, for no ramp-up, or more, not -0.1"):
        tiny(**{"train.ema_rampup": -0.1})
