"""Every valid combination of settings takes two steps of training on tiny data; every other is a ConfigError."""

from __future__ import annotations

import copy
from collections import Counter
from itertools import product

import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import given
from hypothesis import strategies as st
from properties import examples
from tiny_model import make_denoiser
from toy_task import Quiet

from mmgen import data
from mmgen.config import distill as distill_config, imm as imm_config, teacher as teacher_config
from mmgen.config.sections import nest
from mmgen.models.denoiser import DenoiserSettings
from mmgen.errors import ConfigError
from mmgen.diffusion.schedules import ScheduleSettings
from mmgen.methods.distill.method import distill_task, find_teacher, student_model_config
from mmgen.methods.imm.objective import imm_model_config, imm_task
from mmgen.training.loop import Trainer
from mmgen.training.run_folder import RunFolder
from mmgen.training.start import make_accelerator
from mmgen.methods.teacher.objective import teacher_model_config, teacher_task

pytestmark = pytest.mark.slow

NETWORKS = {
    "unet": {"network.kind": "unet", "network.model_channels": 4, "network.channel_mult": [1, 2], "network.num_blocks": 1,
             "network.attn_resolutions": [4]},
    "dit": {"network.kind": "dit", "network.hidden_size": 8, "network.depth": 1, "network.num_heads": 2, "network.patch_size": 4},
    "adm": {"network.kind": "adm", "network.model_channels": 8, "network.channel_mult": [1], "network.num_blocks": 1,
            "network.attn_resolutions": [], "network.channels_per_head": 8},
    "uvit": {"network.kind": "uvit", "network.model_channels": 8, "network.channel_mult": [1, 2], "network.num_blocks": [1],
             "network.depth": 1, "network.channels_per_head": 8, "network.emb_channels": 16},
}  # fmt: skip
TINY = {
    "data.conditional": True, "train.batch_size": 8, "train.max_images": 16, "train.precision": "fp32", "run.batch_per_device": 8,
    "run.eval_num": 0, "optimizer.lr": 1e-3,
}  # fmt: skip
STEPS = 2


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


def steps(make_task, config, digits, place, parts: int = 1) -> None:
    """Two steps of every part: losses are finite, weights change."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = make_accelerator(config.train, config.run, place, "cpu")
    trainer = Trainer(make_task, digits, RunFolder(place), Quiet(), accelerator, train=config.train, optimizer=config.optimizer,
                      run=config.run, config=config.to_dict())  # fmt: skip
    before = {name: copy.deepcopy(network.state_dict()) for name, network in trainer.networks.items()}
    for _ in range(STEPS * parts):
        trainer._step()
    trainer._flush()  # raises for a loss that is not finite
    for name, network in trainer.networks.items():
        after = network.state_dict()
        assert all(torch.isfinite(value).all() for value in after.values())
        assert any(not torch.equal(before[name][key], after[key]) for key in after), name


def chosen(**choices):
    """A dictionary of settings, each of its choices by dotted key."""
    return st.fixed_dictionaries({key.replace("__", "."): value for key, value in choices.items()})


OPTIMIZERS = {
    "optimizer__name": st.sampled_from(["radam", "adamw", "adam"]), "optimizer__grad_clip": st.sampled_from([0.0, 1.0]),
    "optimizer__decay": st.sampled_from(["none", "linear"]), "train__precision": st.sampled_from(["fp32", "fp32", "tf32", "bf16"]),
    "train__ema_betas": st.sampled_from([[0.9], [0.9, 0.99]]), "data__label_dropout": st.sampled_from([0.0, 0.5]),
    "run__batch_per_device": st.sampled_from([4, 8]),
}  # fmt: skip
networks = st.sampled_from(sorted(NETWORKS))
IMM = chosen(
    flow__parametrization=st.sampled_from(["identity", "simple_edm", "euler_fm"]),
    flow__schedule=st.sampled_from(["fm", "vp_cosine"]),
    flow__second_time=st.sampled_from(["s", "t-s"]),
    loss__mapping=st.sampled_from(["eta", "t", "log_snr", "inverse_eta"]),
    loss__kernel=st.sampled_from(["laplace", "rbf"]),
    loss__weighting=st.sampled_from(["full", "elbo_alpha", "elbo", "none"]),
    loss__time_distribution=st.sampled_from(["uniform", "lognormal"]),
    loss__eta_range=st.sampled_from(["paper", "exact"]),
    loss__target_labels=st.sampled_from(["dropped", "undropped"]),
    loss__group_size=st.sampled_from([1, 2, 4]),
    loss__min_gap=st.sampled_from([0.0, 1e-4]),
    loss__a=st.sampled_from([0.0, 1.0, 2.0]),
    data__augment=st.sampled_from([0.0, 0.0, 0.1]),
    data__xflip=st.booleans(),
    **OPTIMIZERS,
)
TEACHER = chosen(
    denoiser__prediction=st.sampled_from(["eps", "x", "v", "velocity"]),
    denoiser__precondition=st.sampled_from(["schedule", "schedule", "edm", "vp"]),
    denoiser__schedule__name=st.sampled_from(["fm", "vp_cosine", "ddpm_linear", "edm"]),
    denoiser__schedule__shift=st.sampled_from([0.5, 1.0, 4.0]),
    loss__weighting=st.sampled_from(["edm", "sigmoid", "min_snr", "v", "eps", "uniform", "output"]),
    loss__times=st.sampled_from(["uniform", "lognormal", "logit_normal"]),
    **OPTIMIZERS,
)
STUDENT = chosen(
    loss__method=st.sampled_from(["alternating", "instant"]),
    loss__posterior=st.sampled_from(["conditional", "unconditional"]),
    loss__weighting=st.sampled_from(["edm", "sigmoid", "min_snr", "v", "eps", "uniform", "output"]),
    loss__reduction=st.sampled_from(["sum", "mean"]),
    loss__jvp=st.sampled_from(["auto", "forward", "finite"]),
    loss__preconditioner=st.sampled_from(["identity", "identity", "adam"]),
    loss__stochasticity=st.sampled_from([1.0, 1.0, 0.5]),
    student__schedule=st.sampled_from([{}, {"name": "fm"}, {"name": "ddpm_linear"}, {"name": "edm"}, {"name": "vp_cosine"}]),
    student__shift=st.sampled_from([1.0, 2.0]),
    student__steps=st.sampled_from([1, 2, 8]),
    student__noise_channels=st.sampled_from([0, 0, 1]),
    student__dropout=st.sampled_from([0.0, 0.0, 0.1]),
    teacher__guidance=st.sampled_from([1.0, 1.5]),
    # Clipped always: sums over pixels have gradients of 10^8 and more, and RAdam's first steps are those of plain descent
    **{**OPTIMIZERS, "train__ema_betas": st.sampled_from([[], [0.9]]), "optimizer__grad_clip": st.just(1.0),
       "train__precision": st.sampled_from(["fp32", "tf32"])},
)  # fmt: skip
count: Counter[str] = Counter()


@examples(25, simplify=False)
@given(changes=IMM, kind=networks)
def test_train_imm(digits, place, changes, kind):
    try:
        config = imm_config.resolve(nest({**TINY, **NETWORKS[kind], **changes}, imm_config.ImmConfig))
        model_config = imm_model_config(config, digits.shape)
    except ConfigError:
        count["train_imm refused"] += 1
        return
    steps(lambda accelerator: imm_task(config, model_config), config, digits, place)
    count["train_imm"] += 1


@pytest.mark.parametrize(
    ("parametrization", "schedule"),
    [("identity", "fm"), ("identity", "vp_cosine"), ("simple_edm", "fm"), ("simple_edm", "vp_cosine"), ("euler_fm", "fm")],
)  # euler_fm is refused with another schedule
def test_train_imm_in_every_combination(digits, place, parametrization, schedule):
    """Of mapping rule, kernel, second time input, precision and optimiser: 144, 720 with those above; of a tiny DiT."""
    tiny = {
        **TINY,
        **NETWORKS["dit"],
        "network.hidden_size": 4,
        "train.batch_size": 4,
        "run.batch_per_device": 4,
        "loss.group_size": 2,
    }
    tiny |= {"flow.parametrization": parametrization, "flow.schedule": schedule}
    for mapping, kernel, second, precision, optimizer in product(
        ("eta", "t", "log_snr", "inverse_eta"),
        ("laplace", "rbf"),
        ("s", "t-s"),
        ("fp32", "tf32", "bf16"),
        ("radam", "adamw", "adam"),
    ):
        changes = {"loss.mapping": mapping, "loss.kernel": kernel, "flow.second_time": second, "train.precision": precision,
                   "optimizer.name": optimizer}  # fmt: skip
        config = imm_config.resolve(nest({**tiny, **changes}, imm_config.ImmConfig))
        model_config = imm_model_config(config, digits.shape)
        steps(lambda accelerator, c=config, m=model_config: imm_task(c, m), config, digits, place)


@examples(25, simplify=False)
@given(changes=TEACHER, kind=networks)
def test_train_teacher(digits, place, changes, kind):
    try:
        config = teacher_config.resolve(nest({**TINY, **NETWORKS[kind], **changes}, teacher_config.TeacherConfig))
        model_config = teacher_model_config(config, digits.shape)
    except ConfigError:
        count["train_teacher refused"] += 1
        return
    steps(lambda accelerator: teacher_task(config, model_config), config, digits, place)
    count["train_teacher"] += 1


SCHEDULE = ScheduleSettings("vp_cosine")
TEACHERS = {
    "v": DenoiserSettings(precondition="schedule", prediction="v", schedule=SCHEDULE, time_scale=100.0),
    "velocity": DenoiserSettings(precondition="schedule", prediction="velocity", schedule=ScheduleSettings("fm")),
    "edm": DenoiserSettings(), "vp": DenoiserSettings("vp"), "ve": DenoiserSettings("ve"), "discrete": DenoiserSettings("discrete"),
    "flow": DenoiserSettings("flow"),
}  # fmt: skip


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    return {name: make_denoiser(folder / f"{name}.safetensors", settings, channels=1, num_classes=10)
            for name, settings in TEACHERS.items()}  # fmt: skip


@examples(12, simplify=False)
@given(changes=STUDENT, name=st.sampled_from(sorted(TEACHERS)))
def test_distill(digits, place, teachers, changes, name):
    own = {"teacher.name": str(teachers[name]), "data.name": "digits", "run.teacher_steps": 0, "optimizer.warmup_images": 0}
    tiny = {key: value for key, value in TINY.items() if key != "data.conditional"}
    changes = {key: value for key, value in changes.items() if value != {}}
    try:
        config = distill_config.resolve(nest({**tiny, **own, **changes}, distill_config.DistillConfig))
        teacher, config = find_teacher(config)
        model_config = student_model_config(config, teacher, digits)
        steps(
            lambda accelerator: distill_task(config, teacher, model_config, digits, Quiet(), accelerator),
            config,
            digits,
            place,
            2,
        )
    except ConfigError:
        count["distill refused"] += 1
        return
    count["distill"] += 1


def test_many_combinations_train():
    """The properties above were not of refusals only."""
    print(dict(count))
    for name in ("train_imm", "train_teacher", "distill"):
        assert not count[f"{name} refused"] or count[name] >= count[f"{name} refused"] / 4, count
