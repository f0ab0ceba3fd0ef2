"""IMM that begins with a denoiser's weights: its flow map is at first the denoiser's DDIM step, for all pairs of times."""

from dataclasses import replace

import pytest
import torch
from test_init import train
from test_training import tiny
from tiny_model import awaken, make_denoiser, make_model

from mmgen.diffusion.preconditioning import DenoiserSettings
from mmgen.diffusion.schedules import ScheduleSettings
from mmgen.errors import ConfigError
from mmgen.methods.imm.objective import TRAINING, imm_task
from mmgen.models.config import ModelConfig
from mmgen.models.files import load_model, read_config
from mmgen.models.flow_model import FlowModel
from mmgen.networks.conditions import Labels
from mmgen.training.initial import begin_with, read_initial

TEACHERS = {
    "edm": DenoiserSettings(),
    "velocity": DenoiserSettings(precondition="schedule", prediction="velocity", schedule=ScheduleSettings("fm"), sigma_min=1e-4, sigma_max=1e4),
    "v": DenoiserSettings(precondition="schedule", prediction="v", schedule=ScheduleSettings("vp_cosine"), sigma_min=1e-4, sigma_max=1e4),
    "eps": DenoiserSettings(precondition="discrete"),
}  # fmt: skip


def given(path, **changes):
    return tiny(**{"flow.parametrization": "given", "train.init": str(path), **changes})


def begun(path, config):
    """A flow map that begins with the denoiser in the file."""
    model = read_config(path)
    model_config = ModelConfig(network=config.network, flow=config.flow, resolution=8, channels=1, num_classes=model.num_classes)
    return begin_with(imm_task(config, model_config), read_initial(str(path))), model_config


@pytest.mark.parametrize("kind", TEACHERS)
@pytest.mark.parametrize("schedule", ["fm", "vp_cosine"])
def test_it_begins_as_the_ddim_step_of_the_denoiser(kind, schedule, tmp_path):
    path = awaken(make_denoiser(tmp_path / "teacher.safetensors", TEACHERS[kind], channels=1, num_classes=10))
    teacher = load_model(path)
    _, config = TRAINING.find(given(path, **{"flow.schedule": schedule, "flow.second_time": "t-s"}), "cpu")
    config = replace(config, network=read_config(path).network)
    task, model_config = begun(path, config)
    model = FlowModel(model_config, task.trained["model"].network.eval())
    t = torch.tensor([0.1, 0.5, 0.9, 0.9], dtype=torch.float64)
    s = torch.tensor([0.01, 0.2, 0.3, 0.9], dtype=torch.float64)
    x, condition = torch.randn(4, 1, 8, 8, dtype=torch.float64), Labels(torch.tensor([1, 2, 3, 10]), 10)
    path_ = config.flow.get_schedule()
    at = lambda value: value[:, None, None, None]  # noqa: E731
    x_hat = teacher.denoise(x / at(path_.alpha(t)), 0.5 * path_.eta(t), condition)  # noise has the standard deviation 0.5
    noise = (x - at(path_.alpha(t)) * x_hat) / at(path_.sigma(t))
    expected = at(path_.alpha(s)) * x_hat + at(path_.sigma(s)) * noise
    with torch.no_grad():
        found = model.f(x, s, t, condition)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(found[3], x[3], rtol=0, atol=1e-12)  # s = t


def test_such_a_run_trains_resumes_and_its_file_says_what_it_is(tmp_path):
    teacher = make_denoiser(tmp_path / "teacher.safetensors", channels=1, num_classes=10, network=tiny().network)
    changes = {"flow.parametrization": "given", "train.init": str(teacher), "network.dropout": 0.0}
    train(tmp_path / "run", **changes)
    assert any("resuming" in note for note in train(tmp_path / "run", **changes, **{"train.max_images": 48}).notes)
    model = load_model(tmp_path / "run/model.safetensors")
    assert model.config.flow.given == DenoiserSettings() and model.f(torch.randn(1, 1, 8, 8), 0.1, 0.9).isfinite().all()
    # from there another goes on
    train(tmp_path / "next", **changes | {"train.init": str(tmp_path / "run"), "train.seed": 3})


def test_what_does_not_go_together_is_named(tmp_path):
    teacher = make_denoiser(tmp_path / "teacher.safetensors", channels=1, num_classes=10, network=tiny().network)
    with pytest.raises(ConfigError, match="set flow.parametrization=given too"):
        train(tmp_path / "a", **{"train.init": str(teacher)})
    with pytest.raises(ConfigError, match="name it with --init"):
        tiny(**{"flow.parametrization": "given"})
    with pytest.raises(ConfigError, match="is a flow map already"):
        TRAINING.find(given(make_model(tmp_path / "imm.safetensors", channels=1)), "cpu")
    noisy = make_denoiser(tmp_path / "student.safetensors", DenoiserSettings(noise_channels=1), channels=1)
    with pytest.raises(ConfigError, match="noise of its own"):
        TRAINING.find(given(noisy), "cpu")
