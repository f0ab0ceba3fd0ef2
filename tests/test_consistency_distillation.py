"""Consistency distillation: the teacher's ODE leads from x_t to x_r."""

import json
from dataclasses import replace

import pytest
import torch
from test_init import train
from test_objective import make
from test_training import tiny
from tiny_model import awaken, make_denoiser, make_model
from torch import nn

from mmgen.config.imm import ImmConfig, resolve
from mmgen.config.sections import nest
from mmgen.diffusion.flow_map import coefficients
from mmgen.diffusion.preconditioning import DenoiserSettings
from mmgen.diffusion.process import diffuse
from mmgen.diffusion.schedules import SCHEDULES
from mmgen.errors import ConfigError, ModelError, TrainingError
from mmgen.losses.imm import draw_times, earlier_time
from mmgen.losses.ode_step import image_and_noise
from mmgen.methods.imm import flow_objective as imm
from mmgen.methods.imm.objective import TRAINING
from mmgen.methods.imm.teacher import TeacherPath
from mmgen.models.files import load_model
from mmgen.models.flow_model import flow_map
from mmgen.system.random import keys, normal

DATA, NOISE = 0.3, 0.5  # standard deviations of a Gaussian and of IMM's noise
END = {"loss.group_size": 1, "loss.jump": "end", "data.label_dropout": 0.0, "flow.t_min": 0.1, "flow.t_max": 0.9, "loss.mapping": "t"}


def at(value):
    return value[:, None, None, None]


def std(schedule, t):
    """Of x_t where the images are N(0, DATA^2): the ODE keeps x_t / std(t), which is the whole of its solution."""
    return (DATA**2 * schedule.alpha(t) ** 2 + NOISE**2 * schedule.sigma(t) ** 2).sqrt()


def gaussian_mean(schedule):
    return lambda z, t: at(schedule.alpha(t) * DATA**2 / std(schedule, t) ** 2) * z


@pytest.mark.parametrize("name", ["fm", "vp_cosine"])
@pytest.mark.parametrize("solver, order", [("ddim", 1), ("heun", 2)])
def test_the_solver_has_its_order_on_a_gaussian(name, solver, order):
    schedule = SCHEDULES[name]
    t, z = torch.tensor([0.3, 0.5, 0.8], dtype=torch.float64), torch.randn(3, 1, 2, 2, dtype=torch.float64)
    errors = []
    for gap in (0.02, 0.01):
        x, noise = image_and_noise(gaussian_mean(schedule), schedule, z, t, t - gap, solver)
        torch.testing.assert_close(diffuse(schedule, x, noise, t), z)
        exact = at(std(schedule, t - gap) / std(schedule, t)) * z
        errors.append(((diffuse(schedule, x, noise, t - gap) - exact) / z).abs().amax((1, 2, 3)))
    torch.testing.assert_close(errors[0] / errors[1], torch.full_like(t, 2.0 ** (order + 1)), rtol=0.2, atol=0)


def test_a_step_to_the_data_is_the_teachers_mean():
    schedule, z = SCHEDULES["fm"], torch.randn(2, 1, 2, 2)
    t, r = torch.full((2,), 0.4, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for solver in ("ddim", "heun"):
        x, noise = image_and_noise(gaussian_mean(schedule), schedule, z, t, r, solver)
        torch.testing.assert_close(diffuse(schedule, x, noise, r), gaussian_mean(schedule)(z.double(), t))


class ExactMap(nn.Module):
    """The output G with which x_t - (t - s) sigma_d G is the consistency function of the Gaussian."""

    def __init__(self, flow):
        super().__init__()
        self.flow, self.scale = flow, nn.Parameter(torch.ones(1))

    def forward(self, x, time, second, condition=None, augment=None):
        t, s, schedule = time / self.flow.time_scale, second / self.flow.time_scale, self.flow.get_schedule()
        x_t = x.double() * at(NOISE * (schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2).sqrt())
        jump = at(std(schedule, s) / std(schedule, t)) * x_t
        return self.scale * torch.where(at(t > s), (x_t - jump) / at((t - s).clamp(min=1e-9) * NOISE), 0.0)


class Gaussian:
    """Its exact teacher, as `Denoiser.denoise_within` has it."""

    def denoise_within(self, z, alpha, sigma, condition, *, clip):
        return at(alpha * DATA**2 / (alpha**2 * DATA**2 + sigma**2)) * z


def test_at_the_exact_map_the_loss_is_zero_up_to_the_solvers_order():
    """And consistency training's is not: its x_r is another sample than the ODE's."""
    distances = {}
    for solver in (None, "ddim", "heun"):
        for k in (3, 4):
            objective, batch = make(**END, **{"loss.k": k, "flow.parametrization": "euler_fm"})
            flow = objective.config.flow
            teacher = None if solver is None else TeacherPath(Gaussian(), flow, solver)
            objective = type(objective)(ExactMap(flow), objective.config, None, teacher)
            _, numbers = objective(batch)
            distances[solver, k] = (numbers["distance"][0].sum() / numbers["distance"][1].sum()).item()
    assert distances["heun", 4] < 0.2 * distances["ddim", 4] < 0.2 * distances[None, 4]
    assert distances["ddim", 3] / distances["ddim", 4] == pytest.approx(4, rel=0.35)
    assert distances["heun", 3] / distances["heun", 4] == pytest.approx(8, rel=0.35)


@pytest.mark.parametrize("solver", ["ddim", "heun"])
def test_a_pass_is_consistency_distillation_by_the_book(solver, tmp_path):
    """d(f(x_t, t), sg f(x_r, r)) with x_r a step of EDM's solver in y = x_t / alpha_t and sigma, the noise of y."""
    objective, batch = make(**END, **{"loss.k": 4, "loss.weighting": "none"})
    teacher = load_model(awaken(make_denoiser(tmp_path / "teacher.safetensors", DenoiserSettings(), channels=1, num_classes=10)))
    flow, loss = objective.config.flow, objective.config.loss
    objective.teacher = TeacherPath(teacher, flow, solver)
    s, t = draw_times(loss, flow, keys(0, batch.index, imm.TIME))
    r = earlier_time(loss, flow, s, t)
    path = flow.get_schedule()
    x_t = diffuse(path, batch.images.double() / 127.5 - 1, 0.5 * normal(keys(0, batch.index, imm.NOISE), (1, 8, 8)).double(), t)
    y, sigma_t, sigma_r = x_t / at(path.alpha(t)), at(0.5 * path.eta(t)), at(0.5 * path.eta(r))
    with torch.no_grad():
        slope = (y - teacher.denoise(y, sigma_t.flatten(), batch.condition)) / sigma_t
        y_r = y + (sigma_r - sigma_t) * slope
        if solver == "heun":
            slope_r = (y_r - teacher.denoise(y_r, sigma_r.flatten(), batch.condition)) / sigma_r
            y_r = y + (sigma_r - sigma_t) * (slope + slope_r) / 2
        target = flow_map(objective.network, flow, at(path.alpha(r)) * y_r, s, r, batch.condition)
    distance = (flow_map(objective.network, flow, x_t, s, t, batch.condition) - target).flatten(1).norm(dim=1)
    expected = (2 - 2 * torch.exp(-distance / coefficients(flow, s, t)[1].abs() / 64)).mean()
    value, _ = objective(batch)
    assert value.item() == pytest.approx(expected.item(), rel=1e-4)
    parameters = list(objective.network.parameters())
    gradients = [torch.cat([g.flatten() for g in torch.autograd.grad(one, parameters)]) for one in (value, expected)]
    assert (gradients[0] - gradients[1]).norm() < 1e-3 * gradients[1].norm()


@pytest.mark.slow
def test_such_a_run_trains_goes_on_and_names_another_teacher(tmp_path):
    network = {"network": replace(tiny().network, dropout=0.0)}
    teacher = make_denoiser(tmp_path / "teacher.safetensors", channels=1, num_classes=10, **network)
    changes = {"teacher.name": str(teacher), "network.dropout": 0.0, "loss.group_size": 1, "loss.jump": "end"}
    train(tmp_path / "run", **changes)
    recorded = json.loads((tmp_path / "run/config.json").read_text())["config"]["teacher"]
    assert recorded["solver"] == "heun" and len(recorded["sha256"]) == 64
    assert any("resuming" in note for note in train(tmp_path / "run", **changes, **{"train.max_images": 48}).notes)
    awaken(teacher)
    with pytest.raises(TrainingError, match="teacher.sha256"):
        train(tmp_path / "run", **changes)
    # as in the paper, from the teacher's weights
    train(tmp_path / "given", **changes, **{"train.init": str(teacher), "flow.parametrization": "given"})


@pytest.mark.parametrize("changes, words", [
    ({"data.augment": 0.1}, "data.augment does not go with --teacher"),
    ({"loss.mapping": "t", "flow.t_max": 1.0}, "teacher.solver heun needs flow.t_max < 1"),
    ({"loss.objective": "mean_flow", "flow.parametrization": "euler_fm"}, "mean_flow takes no teacher"),
    ({"teacher.name": "", "teacher.solver": "ddim"}, "name it with --teacher"),
])  # fmt: skip
def test_settings_that_do_not_go_together(changes, words):
    with pytest.raises(ConfigError, match=words):
        resolve(nest({"teacher.name": "teacher", **changes}, ImmConfig))


def test_a_teacher_of_other_images_is_named(tmp_path):
    plain = make_denoiser(tmp_path / "plain.safetensors", channels=1)
    with pytest.raises(ConfigError, match="num_classes 0, and this training 10: make them the same"):
        train(tmp_path / "a", **{"teacher.name": str(plain)})
    without_null = make_denoiser(tmp_path / "classes.safetensors", channels=1, num_classes=10, null_trained=False)
    with pytest.raises(ConfigError, match="knows no images without a condition: set data.label_dropout"):
        train(tmp_path / "b", **{"teacher.name": str(without_null)})
    flow = make_model(tmp_path / "imm.safetensors", channels=1, num_classes=10)
    with pytest.raises(ModelError, match="is a flow map of IMM"):
        TRAINING.find(tiny(**{"teacher.name": str(flow)}), "cpu")
