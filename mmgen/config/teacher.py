"""The settings of `mmgen train-teacher`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from .sections import DataSettings, OptimizerSettings, RunSettings, TrainSettings, build, check_shared, require, require_positive
from ..diffusion.preconditioning import DenoiserSettings, preconditioning
from ..losses.denoising import DenoisingSettings
from ..models.config import SamplingSettings
from ..networks import NetworkSettings, UNetSettings
from ..networks.text import TextSettings, check_text
from ..diffusion.schedules import ScheduleSettings


@dataclass(frozen=True)
class TeacherConfig:
    """All settings of `mmgen train-teacher`, a section each. The defaults of the denoiser and the loss are EDM's."""

    network: NetworkSettings = field(default_factory=UNetSettings)
    denoiser: DenoiserSettings = DenoiserSettings()
    loss: DenoisingSettings = DenoisingSettings(weighting="edm", times="lognormal")
    data: DataSettings = DataSettings()
    text: TextSettings = TextSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    train: TrainSettings = TrainSettings()
    sampling: SamplingSettings = SamplingSettings()
    run: RunSettings = RunSettings()

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def resolve(*tables: dict[str, Any]) -> TeacherConfig:
    """One config from tables of rising precedence; what depends on other settings is filled in, what cannot be is refused.

    A process is sampled on its own schedule unless `sampling` says otherwise, and its range of sigma ends where the schedule's
    does. EDM's preconditioning has no schedule and no other prediction: what a preset of another precondition has set there is
    dropped, so that it can be switched.
    """
    config = build(TeacherConfig, *tables)
    denoiser, sampling = config.denoiser, config.sampling
    if denoiser.precondition == "schedule":
        schedule = denoiser.schedule or ScheduleSettings()
        _check_schedule(schedule)
        low, high = preconditioning(dataclasses.replace(denoiser, schedule=schedule)).range
        denoiser = dataclasses.replace(denoiser, schedule=schedule, sigma_min=low, sigma_max=high)
        sampling = dataclasses.replace(sampling, schedule=sampling.schedule or denoiser.schedule)
    elif denoiser.precondition == "edm":
        denoiser = dataclasses.replace(denoiser, schedule=None, prediction=DenoiserSettings().prediction)
    config = dataclasses.replace(config, denoiser=denoiser, sampling=sampling)
    check(config)
    return config


def check(config: TeacherConfig) -> None:
    """Raises ConfigError for values that are impossible, alone or together."""
    denoiser, loss, network = config.denoiser, config.loss, config.network
    require(
        denoiser.precondition in ("schedule", "edm"),
        f"denoiser.precondition {denoiser.precondition} is for models of others: a new one is trained with schedule or edm",
    )
    require_positive({
        "denoiser.sigma_data": denoiser.sigma_data, "denoiser.sigma_min": denoiser.sigma_min,
        "denoiser.time_scale": denoiser.time_scale, "loss.sigma_data": loss.sigma_data,
        "loss.min_snr_gamma": loss.min_snr_gamma, "loss.time_std": loss.time_std,
    })  # fmt: skip
    check_shared(config)
    check_text(config.text)
    require(config.train.frozen_precision == "full", "train.frozen_precision is of trainings with a frozen network, and this one has none: leave it out")
    require(config.data.text or config.text == TextSettings(), "the section text is of captions: set data.text=true, or leave it out")
    require(
        denoiser.sigma_min < denoiser.sigma_max,
        f"denoiser.sigma_min {denoiser.sigma_min:g} must be less than denoiser.sigma_max {denoiser.sigma_max:g}",
    )
    require(
        denoiser.noise_channels == 0 and not denoiser.noise_dropout and not denoiser.told_guidance,
        "denoiser.noise_channels, noise_dropout and told_guidance are for students: leave them out",
    )
    require(
        network.null_class or not config.data.conditional or config.data.label_dropout == 0,
        "network.null_class is off, so that no label can be hidden: set data.label_dropout=0",
    )
    require(
        not getattr(network, "learn_sigma", False),
        "network.learn_sigma: a learned variance is not trained here, leave it off",
    )


def _check_schedule(schedule: ScheduleSettings) -> None:
    require_positive({"denoiser.schedule.shift": schedule.shift, "denoiser.schedule.sigma_min": schedule.sigma_min})
    require(
        schedule.sigma_min < schedule.sigma_max,
        f"denoiser.schedule.sigma_min {schedule.sigma_min:g} must be less than its sigma_max {schedule.sigma_max:g}",
    )
