"""The settings of `mmgen train-imm`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from .sections import DataSettings, OptimizerSettings, RunSettings, TrainSettings, build, check_shared, require, require_positive
from ..diffusion.flow_map import FlowMapSettings
from ..losses.imm import ImmSettings, documented_times
from ..losses.mean_flow import MeanFlowSettings
from ..losses.ode_step import Solver
from ..models.config import SamplingSettings
from ..networks import NetworkSettings, UNetSettings
from ..networks.text import TextSettings, check_text


@dataclass(frozen=True)
class OdeTeacher:
    """A denoiser whose ODE leads from x_t to x_r: with digits-consistency, consistency distillation."""

    name: str = ""  # file, run folder or hub repository; none: x_r has the image and noise of x_t
    sha256: str = ""  # of its file, filled in
    solver: Solver = "heun"  # as in the paper (arXiv:2303.01469); ddim: one evaluation in place of two


@dataclass(frozen=True)
class ImmConfig:
    """All settings of `mmgen train-imm`, a section each."""

    network: NetworkSettings = field(default_factory=UNetSettings)
    flow: FlowMapSettings = FlowMapSettings()
    loss: ImmSettings = ImmSettings()
    mean_flow: MeanFlowSettings = MeanFlowSettings()
    teacher: OdeTeacher = OdeTeacher()
    data: DataSettings = DataSettings()
    text: TextSettings = TextSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    train: TrainSettings = TrainSettings()
    sampling: SamplingSettings = SamplingSettings()
    run: RunSettings = RunSettings()

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def resolve(*tables: dict[str, Any]) -> ImmConfig:
    """One config from tables of rising precedence; what depends on other settings is filled in, what cannot be is refused."""
    config = build(ImmConfig, *tables)
    mean_flow = config.loss.objective == "mean_flow"
    low, high = (0.0, 1.0) if mean_flow else documented_times(config.loss.mapping, config.flow.get_schedule().t_max)
    flow = dataclasses.replace(
        config.flow,
        t_min=low if config.flow.t_min is None else config.flow.t_min,
        t_max=high if config.flow.t_max is None else config.flow.t_max,
    )
    sampling = config.sampling
    if config.loss.jump == "end" and sampling.sampler == "default":
        sampling = dataclasses.replace(sampling, sampler="restart")
    config = dataclasses.replace(config, flow=flow, sampling=sampling)
    check(config)
    return config


def check(config: ImmConfig) -> None:
    """Raises ConfigError for values that are impossible, alone or together."""
    flow, loss, train = config.flow, config.loss, config.train
    require_positive({
        "loss.group_size": loss.group_size, "flow.sigma_data": flow.sigma_data, "flow.time_scale": flow.time_scale,
        "loss.distance_floor": loss.distance_floor, "loss.lognormal_std": loss.lognormal_std,
        "mean_flow.floor": config.mean_flow.floor, "mean_flow.time_std": config.mean_flow.time_std,
    })  # fmt: skip
    check_shared(config)
    check_text(config.text)
    require(config.data.text or config.text == TextSettings(), "the section text is of captions: set data.text=true, or leave it out")
    require(
        len(train.ema_betas) + len(train.ema_half_lives) + len(train.ema_lengths) > 0,
        "train.ema_betas, train.ema_half_lives and train.ema_lengths are all empty",
    )
    require(
        0 <= flow.t_min < flow.t_max <= 1,
        f"0 <= flow.t_min < flow.t_max <= 1 must hold, not {flow.t_min}, {flow.t_max}",
    )
    require(
        flow.parametrization != "euler_fm" or flow.schedule == "fm",
        "flow.parametrization euler_fm needs flow.schedule fm",
    )
    require(flow.parametrization != "given" or train.init, "flow.parametrization given needs a denoiser to begin with: name it with --init")
    require(flow.parametrization == "given" or flow.given is None, "flow.given is filled in from --init: leave it out")
    if loss.objective == "mean_flow":
        _check_mean_flow(config)
    else:
        _check_imm(config)


def _check_mean_flow(config: ImmConfig) -> None:
    flow, own, run = config.flow, config.mean_flow, config.run
    require(not config.teacher.name, "loss.objective mean_flow takes no teacher: leave --teacher out")
    for field_ in dataclasses.fields(ImmSettings):
        require(field_.name == "objective" or getattr(config.loss, field_.name) == field_.default,
                f"loss.{field_.name} is of IMM's own loss: leave it out, or set loss.objective=imm")  # fmt: skip
    require(0 <= own.share <= 1, f"mean_flow.share must be from 0 to 1, not {own.share}")
    require(own.power >= 0, f"mean_flow.power cannot be negative, and is {own.power}")
    require(flow.parametrization == "euler_fm", "loss.objective mean_flow needs flow.parametrization=euler_fm: its network is the mean velocity")
    require((flow.t_min, flow.t_max) == (0, 1), "loss.objective mean_flow trains all times from 0 to 1: leave flow.t_min and flow.t_max out")
    for name, used in (
        ("run.gradient_checkpointing", run.gradient_checkpointing), ("run.compile", run.compile),
        (f"train.precision {config.train.precision}", config.train.precision in ("bf16", "fp16")),
    ):  # fmt: skip
        require(not used, f"{name} does not go with loss.objective mean_flow, which takes a derivative in forward mode: leave it out")


def _check_imm(config: ImmConfig) -> None:
    flow, loss, train, run = config.flow, config.loss, config.train, config.run
    require(config.mean_flow == MeanFlowSettings(), "the section mean_flow needs loss.objective=mean_flow: set it, or leave the section out")
    require(
        loss.jump == "drawn" or config.sampling.sampler == "restart",
        "loss.jump end trains jumps to the end only, which the sampler restart takes: leave sampling.sampler out",
    )
    require(config.teacher.name or config.teacher == OdeTeacher(), "the section teacher needs a denoiser: name it with --teacher")
    if config.teacher.name:
        require(config.data.augment == 0, "data.augment does not go with --teacher, which knows images as they are: leave it out")
        require(config.teacher.solver == "ddim" or flow.t_max < 1, "teacher.solver heun needs flow.t_max < 1: set it, or teacher.solver=ddim")
    require(min(loss.min_gap, loss.a) >= 0, "loss.min_gap and loss.a cannot be negative")
    require(train.batch_size % loss.group_size == 0,
            f"train.batch_size {train.batch_size} must be a multiple of loss.group_size {loss.group_size}")  # fmt: skip
    require(run.batch_per_device == "auto" or run.batch_per_device >= loss.group_size,
            f"run.batch_per_device {run.batch_per_device} must hold a group of loss.group_size {loss.group_size}")  # fmt: skip
    require(loss.mapping not in ("eta", "log_snr") or flow.t_max < 1, f"loss.mapping {loss.mapping} needs flow.t_max < 1")
    require(loss.mapping not in ("log_snr", "inverse_eta") or flow.t_min > 0,
            f"loss.mapping {loss.mapping} needs flow.t_min > 0")  # fmt: skip
    require(
        loss.a > 0 or flow.t_max < 1 or loss.weighting == "none",
        "loss.a = 0 needs flow.t_max < 1: the weight is infinite at 1",
    )
    require(
        loss.weighting != "elbo" or flow.t_max < 1,
        "loss.weighting elbo needs flow.t_max < 1: the weight is infinite at 1",
    )
