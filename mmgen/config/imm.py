"""The settings of `mmgen train-imm`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from .sections import DataSettings, OptimizerSettings, RunSettings, TrainSettings, build, check_shared, require, require_positive
from ..diffusion.flow_map import FlowMapSettings
from ..losses.imm import ImmSettings, documented_times
from ..models.config import SamplingSettings
from ..networks import NetworkSettings, UNetSettings


@dataclass(frozen=True)
class ImmConfig:
    """All settings of `mmgen train-imm`, a section each."""

    network: NetworkSettings = field(default_factory=UNetSettings)
    flow: FlowMapSettings = FlowMapSettings()
    loss: ImmSettings = ImmSettings()
    data: DataSettings = DataSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    train: TrainSettings = TrainSettings()
    sampling: SamplingSettings = SamplingSettings()
    run: RunSettings = RunSettings()

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def resolve(*tables: dict[str, Any]) -> ImmConfig:
    """One config from tables of rising precedence; what depends on other settings is filled in, what cannot be is refused."""
    config = build(ImmConfig, *tables)
    low, high = documented_times(config.loss.mapping, config.flow.get_schedule().t_max)
    flow = dataclasses.replace(
        config.flow,
        t_min=low if config.flow.t_min is None else config.flow.t_min,
        t_max=high if config.flow.t_max is None else config.flow.t_max,
    )
    config = dataclasses.replace(config, flow=flow)
    check(config)
    return config


def check(config: ImmConfig) -> None:
    """Raises ConfigError for values that are impossible, alone or together."""
    flow, loss, train, run = config.flow, config.loss, config.train, config.run
    require_positive({
        "loss.group_size": loss.group_size, "flow.sigma_data": flow.sigma_data, "flow.time_scale": flow.time_scale,
        "loss.distance_floor": loss.distance_floor, "loss.lognormal_std": loss.lognormal_std,
    })  # fmt: skip
    check_shared(config)
    require(
        len(train.ema_betas) + len(train.ema_half_lives) + len(train.ema_lengths) > 0,
        "train.ema_betas, train.ema_half_lives and train.ema_lengths are all empty",
    )
    require(min(loss.min_gap, loss.a) >= 0, "loss.min_gap and loss.a cannot be negative")
    require(train.batch_size % loss.group_size == 0,
            f"train.batch_size {train.batch_size} must be a multiple of loss.group_size {loss.group_size}")  # fmt: skip
    require(run.batch_per_device == "auto" or run.batch_per_device >= loss.group_size,
            f"run.batch_per_device {run.batch_per_device} must hold a group of loss.group_size {loss.group_size}")  # fmt: skip
    require(
        0 <= flow.t_min < flow.t_max <= 1,
        f"0 <= flow.t_min < flow.t_max <= 1 must hold, not {flow.t_min}, {flow.t_max}",
    )
    require(
        flow.parametrization != "euler_fm" or flow.schedule == "fm",
        "flow.parametrization euler_fm needs flow.schedule fm",
    )
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
