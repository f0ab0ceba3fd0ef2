"""Training of teachers: the objective against its definition, settings, presets, and a whole run on the digits."""

import json
import math

import pytest
import torch
from exact import exactly
from torch.nn import functional as F
from toy_task import Quiet

from mmgen.config import sections as configs
from mmgen import data
from mmgen.models.denoiser import Denoiser
from mmgen.errors import ConfigError, DataError
from mmgen.losses.denoising import draw_sigma, weight
from mmgen.sampling.loading import load
from mmgen.models.build import build_model
from mmgen.networks.conditions import Labels
from mmgen.system.random import keys, normal, uniform
from mmgen.config.teacher import TeacherConfig, resolve
from mmgen.methods import TEACHER
from mmgen.methods.run import train as train_method
from mmgen.methods.teacher import objective as teacher
from mmgen.training.batches import fetch
from mmgen.methods.teacher.objective import teacher_model_config, teacher_task

TINY = {
    "network": {"kind": "unet", "model_channels": 8, "channel_mult": [1, 1], "num_blocks": 1, "attn_resolutions": [4],
                "dropout": 0.0},
    "denoiser": {"precondition": "schedule", "prediction": "v", "time_scale": 100.0, "sigma_min": 0.01, "sigma_max": 100.0},
    "loss": {"weighting": "v", "times": "uniform"},
    "data": {"name": "digits", "conditional": True, "label_dropout": 0.3},
    "train": {"batch_size": 16, "max_images": 160, "precision": "fp32", "ema_betas": [0.9]},
    "optimizer": {"name": "adam", "lr": 1e-3},
    "run": {"batch_per_device": 8, "checkpoint_every": 64, "preview_every": 10**9, "eval_every": 10**9, "eval_num": 32,
            "eval_steps": [2], "log_every": 2},
}  # fmt: skip
EDM = {"denoiser.precondition": "edm", "loss.weighting": "edm", "loss.times": "lognormal"}


def tiny(**changes):
    return resolve(TINY, configs.nest(changes, TeacherConfig))


def make(count=16, **changes):
    """A network with outputs of the order of one, its objective, its model config and a batch."""
    config, dataset = tiny(**changes), data.load("digits")
    torch.manual_seed(0)
    model_config = teacher_model_config(config, dataset.shape)
    part = teacher_task(config, model_config).trained["model"]
    with torch.no_grad():
        for parameter in part.network.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) / parameter[0].numel() ** 0.5)
    return part.objective, model_config, fetch(dataset, 0, count, 0, torch.device("cpu"))


CASES = [
    *({"denoiser.prediction": prediction, "denoiser.schedule.name": name}
      for prediction in ("x", "eps", "v", "velocity") for name in ("vp_cosine", "fm")),
    {"denoiser.schedule.name": "ddpm_linear", "denoiser.prediction": "eps", "loss.weighting": "min_snr"},
    {"denoiser.schedule.name": "vp_cosine", "denoiser.schedule.shift": 2.0, "loss.weighting": "sigmoid"},
    {"denoiser.schedule.name": "edm", "denoiser.sigma_max": 80.0, "loss.times": "lognormal"},
    {"denoiser.schedule.name": "fm", "denoiser.prediction": "velocity", "loss.weighting": "output", "loss.times": "logit_normal"},
    EDM,
    {**EDM, "denoiser.sigma_data": 0.3},
]  # fmt: skip


@pytest.mark.parametrize("changes", CASES, ids=lambda case: "-".join(str(v) for v in case.values()))
def test_the_loss_is_the_weighted_error_of_x_hat(changes):
    objective, model_config, batch = make(**changes)
    loss, numbers = exactly(objective)(batch)
    x = batch.images.double() / 127.5 - 1
    noise = normal(keys(0, batch.index, teacher._NOISE), x.shape[1:]).double()
    draw = uniform(keys(0, batch.index, teacher._TIME))
    hidden = uniform(keys(0, batch.index, 102)) < 0.3  # the purpose that train-imm has for labels
    assert 0 < hidden.sum() < 16
    config = objective.config
    sigma = draw_sigma(config.loss, config.denoiser, draw)
    model = Denoiser(model_config, objective.network)
    x_hat = model.denoise(x + sigma[:, None, None, None] * noise, sigma, Labels(torch.where(hidden, 10, batch.condition.classes), 10))
    each = weight(config.loss, config.denoiser, sigma) * (x - x_hat).square().mean((1, 2, 3))
    assert loss.item() == pytest.approx(each.mean().item(), rel=1e-4)
    parameters = list(objective.network.parameters())
    ours, theirs = torch.autograd.grad(loss, parameters), torch.autograd.grad(each.mean(), parameters)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item() + 1e-9)
    found = numbers["loss_by_noise"]
    for level in range(8):
        inside = (8 * draw).long() == level
        assert found[1, level] == inside.sum()
        assert found[0, level].item() == pytest.approx(each[inside].sum().item(), rel=1e-3)


def test_losses_of_v_eps_and_velocity_are_the_plain_ones():
    """Mean squares between the raw output and what it should be, from textbook definitions in float64."""
    cases = ("vp_cosine", "v", "v"), ("vp_cosine", "eps", "eps"), ("fm", "velocity", "output"), ("ddpm_linear", "x", "uniform")
    for name, prediction, weighting in cases:
        changes = {"denoiser.schedule.name": name, "denoiser.prediction": prediction, "loss.weighting": weighting}
        objective, _, batch = make(**changes)
        exactly(objective)
        x = batch.images.double() / 127.5 - 1
        e = normal(keys(0, batch.index, teacher._NOISE), x.shape[1:]).double()
        sigma = draw_sigma(objective.config.loss, objective.config.denoiser, uniform(keys(0, batch.index, teacher._TIME)))
        if name == "fm":
            t = sigma / (1 + sigma)
            a, s = 1 - t, t
        else:
            t = torch.atan(sigma) * 2 / math.pi
            if name == "ddpm_linear":  # 9.95 t^2 + 0.1 t = log(1 + sigma^2)
                t = ((0.01 + 39.8 * torch.log1p(sigma**2)).sqrt() - 0.1) / 19.9
            a, s = (1 + sigma**2) ** -0.5, sigma * (1 + sigma**2) ** -0.5
        a, s = a[:, None, None, None], s[:, None, None, None]
        output = objective.network((a * x + s * e).float(), 100 * t, None, objective.inputs.condition(batch))
        target = {"v": a * e - s * x, "eps": e, "velocity": e - x, "x": x}[prediction]
        assert objective(batch)[0].item() == pytest.approx(F.mse_loss(output.double(), target).item(), rel=1e-4), prediction


def test_augmentation_comes_with_its_label():
    objective, _, batch = make(**EDM, **{"data.augment": 0.9, "data.xflip": True})
    x, label = objective.inputs.images(batch)
    assert label.shape == (16, 9) and label.abs().sum() > 0 and not torch.equal(x, batch.images / 127.5 - 1)
    before = objective(batch)[0].item()
    with torch.no_grad():
        objective.network.augment_embed.weight.mul_(3)
    assert objective(batch)[0].item() != before


def test_draws_depend_on_the_number_of_the_image_only():
    objective, _, batch = make()
    exactly(objective)
    whole, numbers = objective(batch)
    parts = [objective(fetch(data.load("digits"), start, 8, 0, torch.device("cpu"))) for start in (0, 8)]
    assert whole.item() == pytest.approx(sum(loss.item() for loss, _ in parts) / 2, rel=1e-6)
    torch.testing.assert_close(numbers["loss_by_noise"], sum(n["loss_by_noise"] for _, n in parts), rtol=1e-5, atol=1e-9)


def test_dropout_masks_belong_to_the_step():
    objective, _, batch = make(**{"network.dropout": 0.5})
    first = objective(batch)[0].item()
    torch.manual_seed(123)  # whatever came before
    assert objective(batch)[0].item() == first
    batch.first += 16
    assert objective(batch)[0].item() != first


def test_half_precision_is_for_the_network_alone():
    objective, _, batch = make()
    dtypes = []
    objective.network.out_conv.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    full = objective(batch)[0].item()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = objective(batch)
    assert dtypes == [torch.float32, torch.bfloat16] and loss.dtype == torch.float64
    assert loss.item() == pytest.approx(full, rel=0.1) and loss.item() != full


# ---------------------------------------------------------------------- settings


def test_presets_resolve_and_build():
    names = configs.preset_names("train-teacher")
    assert set(names) >= {"digits-teacher", "cifar10-teacher", "imagenet64-teacher", "imagenet128-teacher"}
    parameters = {}
    for name in names:
        config = resolve(configs.read_preset(name, "train-teacher"))
        shape = data.DataShape(config.data.resolution or 8, config.data.channels or 1, config.data.num_classes or 10)
        with torch.device("meta"):
            network = build_model(teacher_model_config(config, shape)).network
        parameters[name] = sum(p.numel() for p in network.parameters())
    assert parameters["digits-teacher"] < 200_000
    assert parameters["cifar10-teacher"] == pytest.approx(55.7e6, rel=0.01)  # EDM: 56M
    assert parameters["imagenet64-teacher"] == pytest.approx(400e6, rel=0.1)
    assert parameters["imagenet128-teacher"] == pytest.approx(400e6, rel=0.1)


def test_a_schedule_is_filled_in_for_sampling_and_dropped_by_edm():
    config = tiny(**{"denoiser.schedule.name": "fm", "denoiser.schedule.shift": 3.0})
    assert config.sampling.schedule == config.denoiser.schedule and config.denoiser.schedule.shift == 3.0
    assert tiny().denoiser.schedule.name == "vp_cosine" and tiny().denoiser.sigma_max == 100.0
    linear = tiny(**{"denoiser.schedule.name": "ddpm_linear", "denoiser.sigma_max": 1e4}).denoiser
    assert linear.sigma_max == pytest.approx(math.sqrt(math.expm1(19.9 / 2 + 0.1))) and linear.sigma_min == 0.01
    switched = tiny(**EDM)
    assert switched.denoiser.schedule is None and switched.sampling.schedule is None and switched.denoiser.prediction == "eps"


@pytest.mark.parametrize("changes, words", [
    ({"denoiser.precondition": "vp"}, "denoiser.precondition"), ({"denoiser.sigma_min": 0.0}, "denoiser.sigma_min"),
    ({"denoiser.sigma_min": 200.0}, "less than"), ({"denoiser.noise_channels": 1}, "students"),
    ({"denoiser.schedule.name": "edm", "denoiser.sigma_min": 90.0}, "less than"),
    ({"denoiser.schedule": {"name": "edm", "sigma_min": 90.0}}, "denoiser.schedule.sigma_min"),
    ({"denoiser.schedule.name": "fn"}, "denoiser.schedule.name"),
    ({"denoiser.schedule.shift": 0.0}, "shift"), ({"loss.time_std": 0.0}, "loss.time_std"),
    ({"loss.min_snr_gamma": -1.0}, "gamma"), ({"loss.weighing": "v"}, "loss.weighing"),
    ({"data.augment": 0.1, "network": {"kind": "dit", "hidden_size": 32, "num_heads": 2}}, "data.augment"),
    ({"network": {"kind": "adm", "model_channels": 16, "null_class": False}}, "null_class"),
    ({"network": {"kind": "dit", "learn_sigma": True}}, "learn_sigma"),
])  # fmt: skip
def test_impossible_settings_are_named(changes, words):
    networks = {"network": changes.pop("network")} if "network" in changes else {}
    with pytest.raises(ConfigError, match=words):
        resolve(TINY, networks, configs.nest(changes, TeacherConfig))


def test_labels_that_are_not_there():
    with pytest.raises(ConfigError, match="unconditional"):
        teacher_model_config(tiny(), data.DataShape(8, 1, 0))
    assert teacher_model_config(tiny(**{"data.conditional": False}), data.DataShape(8, 1, 0)).num_classes == 0


# ---------------------------------------------------------------------- runs


def train(config, folder, **options):
    return train_method(TEACHER, config, folder, Quiet(), device="cpu", **options)


@pytest.mark.parametrize("changes", [{}, EDM], ids=["v", "edm"])
def test_a_run_leaves_a_denoiser_that_samples(tmp_path, changes):
    outcome = train(tiny(**changes), tmp_path / "run")
    assert outcome.finished and outcome.results["values"].keys() == {"2"}
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    losses = [line for line in lines if "loss" in line]
    assert [line["images"] for line in losses] == [32, 64, 96, 128, 160]
    assert all(len(line["loss_by_noise"]) == 8 for line in losses)
    model = load(tmp_path / "run")
    assert isinstance(model, Denoiser) and model.config.num_classes == 10
    assert model.sample(3, steps=3, guidance=2.0).images.shape == (3, 1, 8, 8)
    assert model.sample(3, steps=3, sampler="ancestral").images.shape == (3, 1, 8, 8)


@pytest.mark.slow
def test_killed_and_resumed_is_the_uninterrupted_run(tmp_path):
    from safetensors.torch import load_file

    changes = {"network.dropout": 0.1, "data.augment": 0.2}
    train(tiny(**changes), tmp_path / "whole")
    assert not train(tiny(**changes), tmp_path / "parts", max_seconds=0.0).finished
    assert train(tiny(**changes), tmp_path / "parts").finished
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)


def test_the_command_line(tmp_path):
    from typer.testing import CliRunner

    from mmgen.cli import app

    config = tmp_path / "tiny.toml"
    config.write_text(
        'command = "train-teacher"\n[network]\nmodel_channels = 8\nchannel_mult = [1]\n[train]\nbatch_size = 16\n'
        "max_images = 32\n[run]\neval_num = 0\n[sampling]\nsteps = 4\n"
    )
    command = ["train-teacher", "--config", str(config), "--set", "denoiser.prediction=eps", "--set", "loss.weighting=min_snr"]
    shown = CliRunner().invoke(app, [*command, "--dry-run"], catch_exceptions=False)
    assert shown.exit_code == 0 and "prediction=eps*" in shown.output
    assert "1 pass forward, 1 back" in shown.output
    done = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "run"), "--device", "cpu"], catch_exceptions=False)
    assert done.exit_code == 0 and "mmgen distill --teacher" in done.output
    assert load(tmp_path / "run").settings.prediction == "eps"
    wrong = CliRunner().invoke(app, ["train-teacher", "--preset", "digits-imm", "--dry-run"])
    assert isinstance(wrong.exception, ConfigError) and "train-imm" in str(wrong.exception)
    unknown = CliRunner().invoke(app, ["train-teacher", "--data", "imagenet", "--dry-run"])
    assert isinstance(unknown.exception, DataError) and "'imagenet': Valid: digits, cifar10" in str(unknown.exception)
