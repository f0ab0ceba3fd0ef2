"""Presets against the paper's table, merging, and refusals by name."""

import pytest
import torch

from mmgen.config import sections as configs
from mmgen.data import DataShape
from mmgen.errors import ConfigError
from mmgen.config.imm import ImmConfig, resolve
from mmgen.models.flow_model import FlowModel
from mmgen.system.schema import flatten
from mmgen.methods.imm.objective import imm_model_config

# arXiv:2503.07565, table 5; DiT sizes from table 4 of arXiv:2212.09748
PAPER = {
    "cifar10-imm": {
        "network.kind": "unet", "network.dropout": 0.2, "flow.schedule": "fm", "flow.parametrization": "simple_edm",
        "flow.second_time": "s", "flow.sigma_data": 0.5, "flow.time_scale": 1000.0, "flow.t_min": 0.006, "flow.t_max": 0.994,
        "loss.group_size": 4, "loss.kernel": "laplace", "loss.mapping": "eta", "loss.k": 15.0, "loss.a": 1.0, "loss.b": 5.0,
        "loss.min_gap": 0.0, "loss.time_distribution": "uniform", "loss.target_labels": "dropped", "loss.distance_floor": 1e-8,
        "data.xflip": True, "data.augment": 0.12, "data.conditional": False, "optimizer.name": "radam", "optimizer.lr": 1e-4,
        "optimizer.eps": 1e-8, "optimizer.beta1": 0.9, "optimizer.beta2": 0.999, "optimizer.weight_decay": 0.0,
        "optimizer.warmup_images": 0, "optimizer.grad_clip": 0.0, "train.batch_size": 4096, "train.max_images": 400_000 * 4096,
        "train.ema_betas": (0.9999,), "train.precision": "tf32", "sampling.sampler": "pushforward",
    },
    "imagenet256-imm-xl": {
        "network.kind": "dit", "network.hidden_size": 1152, "network.depth": 28, "network.num_heads": 16, "network.patch_size": 2,
        "flow.parametrization": "euler_fm", "flow.second_time": "s", "flow.t_min": 0.0, "flow.t_max": 0.994, "loss.a": 1.0,
        "loss.b": 4.0, "loss.k": 12.0, "loss.min_gap": 0.0, "optimizer.name": "adamw", "optimizer.lr": 1e-4,
        "data.label_dropout": 0.1, "data.xflip": False, "data.augment": 0.0, "train.batch_size": 4096,
        "train.max_images": 1_200_000 * 4096, "train.ema_betas": (0.9999,), "train.precision": "tf32",
    },
    "imagenet256-imm-xl-fp16": {
        "network.depth": 28, "flow.second_time": "t-s", "loss.a": 2.0, "loss.b": 4.0, "loss.k": 12.0, "loss.min_gap": 1e-4,
        "train.precision": "fp16",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PAPER)
def test_presets_are_the_papers_table(name):
    found = dict(flatten(resolve(configs.read_preset(name)).to_dict()))
    assert {key: found[key] for key in PAPER[name]} == PAPER[name]


@pytest.mark.parametrize(
    ("name", "shape", "parameters"),
    [
        ("cifar10-imm", DataShape(32, 3), 56_062_595),  # 56.06M, with the augmentation's 9 x 128
        (
            "imagenet256-imm-s",
            DataShape(32, 4, 1000),
            33_203_728 - 256 * 384,
        ),  # the published counts hold the fixed positions
        ("imagenet256-imm-b", DataShape(32, 4, 1000), 131_288_080 - 256 * 768),
        ("imagenet256-imm-l", DataShape(32, 4, 1000), 459_399_184 - 256 * 1024),
        ("imagenet256-imm-xl", DataShape(32, 4, 1000), 676_735_504 - 256 * 1152),
        ("imagenet256-imm-xl-fp16", DataShape(32, 4, 1000), 676_735_504 - 256 * 1152),
    ],
)
def test_presets_build_networks_of_the_published_size(name, shape, parameters):
    with torch.device("meta"):
        model = FlowModel(imm_model_config(resolve(configs.read_preset(name)), shape))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_every_preset_resolves():
    assert set(configs.preset_names("train-imm")) == {
        "digits-imm", "digits-consistency", "digits-meanflow", "digits-text-imm", "own32-imm", "own64-imm", "cifar10-imm", *(f"imagenet256-imm-{size}" for size in ("s", "b", "l", "xl", "xl-fp16"))
    }  # fmt: skip
    for name in configs.preset_names("train-imm"):
        resolve(configs.read_preset(name))


@pytest.mark.parametrize(
    ("mapping", "schedule", "expected"),
    [
        ("eta", "fm", (0.006, 0.994)), ("eta", "vp_cosine", (0.006, 0.996)), ("t", "fm", (0.0, 1.0)),
        ("log_snr", "fm", (0.001, 0.994)), ("log_snr", "vp_cosine", (0.001, 0.996)), ("inverse_eta", "fm", (0.005, 1.0)),
    ],
)  # fmt: skip
def test_times_follow_from_mapping_and_schedule(mapping, schedule, expected):
    flow = resolve({"loss": {"mapping": mapping}, "flow": {"schedule": schedule}}).flow
    assert (flow.t_min, flow.t_max) == expected


def test_later_tables_win_and_another_kind_of_network_replaces():
    table = configs.read_preset("cifar10-imm")
    config = resolve(table, {"network": {"kind": "dit", "depth": 2}, "data": {"augment": 0}}, {"loss": {"k": 10}})
    assert (config.network.kind, config.network.depth, config.network.hidden_size) == ("dit", 2, 384)
    assert config.loss.k == 10 and config.loss.b == 5.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss.kk": 12}, "unknown setting 'loss.kk'.*did you mean"),
        ({"k": 12}, "unknown setting 'k'.*loss.k"),
        ({"los.k": 12}, "unknown setting 'los.k'.*loss.k"),
        ({"loss.kernel": "laplac"}, "did you mean 'laplace'"),
        ({"loss.k": "many"}, "loss.k must be a number"),
        ({"train.batch_size": 2.5}, "whole number"),
        ({"train.batch_size": 6}, "multiple of loss.group_size"),
        ({"train.batch_size": 0}, "more than 0"),
        ({"data.xflip": 1}, "true or false"),
        ({"network.channel_mult": 2}, "must be a list"),
        ({"network.dropout": 1.0}, "less than 1"),
        ({"network.kind": "gan"}, "unet, dit"),
        ({"flow.parametrization": "euler_fm", "flow.schedule": "vp_cosine"}, "needs flow.schedule fm"),
        ({"flow.t_min": 0.9, "flow.t_max": 0.5}, "t_min < flow.t_max"),
        ({"flow.t_max": 1.0}, "needs flow.t_max < 1"),
        ({"loss.mapping": "log_snr", "flow.t_min": 0.0}, "needs flow.t_min > 0"),
        ({"loss.mapping": "t", "loss.weighting": "elbo"}, "infinite at 1"),
        ({"train.ema_betas": [1.0]}, "between 0 and 1"),
        ({"train.ema_betas": []}, "all empty"),
        ({"run.eval_steps": [0]}, "more than 0"),
        ({"run.eval_steps": [1, 10**9]}, "run.eval_steps must be at most 100,000"),
        ({"run.log_with": ["mlflow"]}, "tensorboard, wandb"),
        ({"optimizer.lr": float("nan")}, "must be a number"),
        ({"sampling.sampler": "push"}, "pushforward, restart"),
        ({"network.kind": "dit", "data.augment": 0.12}, "augment needs network.kind unet"),
    ],
)
def test_what_cannot_be_is_refused_by_name(changes, message):
    with pytest.raises(ConfigError, match=message):
        resolve(configs.nest(changes, ImmConfig))


@pytest.mark.parametrize(
    ("network", "shape", "message"),
    [
        ({"kind": "unet", "channel_mult": [1, 2, 2]}, DataShape(30, 3), "divisible by 4, not 30"),
        ({"kind": "unet", "model_channels": 70}, DataShape(32, 3), "model_channels 70"),
        ({"kind": "dit", "patch_size": 3}, DataShape(32, 3), "patch_size 3 does not divide"),
        ({"kind": "dit", "num_heads": 7}, DataShape(32, 3), "multiple of num_heads 7"),
    ],
)
def test_networks_that_do_not_fit_the_images_are_refused(network, shape, message):
    with pytest.raises(ConfigError, match=message):
        imm_model_config(resolve({"network": network}), shape)


def test_labels_are_needed_for_a_conditional_model():
    with pytest.raises(ConfigError, match="--unconditional"):
        imm_model_config(resolve({"data": {"conditional": True}}), DataShape(32, 3, 0))


def test_assignments_are_read_as_toml():
    assert configs.parse_assignment("loss.k=12") == ("loss.k", 12)
    assert configs.parse_assignment("train.ema_betas=[0.9, 0.99]") == ("train.ema_betas", [0.9, 0.99])
    assert configs.parse_assignment("loss.kernel=rbf") == ("loss.kernel", "rbf")
    assert configs.parse_assignment("data.xflip = true") == ("data.xflip", True)
    with pytest.raises(ConfigError, match="key=value"):
        configs.parse_assignment("loss.k")


def test_toml_files(tmp_path):
    (tmp_path / "bad.toml").write_text("[loss\nk = 1")
    with pytest.raises(ConfigError, match="not valid TOML"):
        configs.read_toml(tmp_path / "bad.toml")
    with pytest.raises(ConfigError, match="cannot read"):
        configs.read_toml(tmp_path / "absent.toml")
