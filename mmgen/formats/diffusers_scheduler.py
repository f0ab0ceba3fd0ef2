"""scheduler_config.json of diffusers against our `DenoiserSettings` and `SamplingSettings`.

A scheduler of diffusers holds both how a network was trained (betas, what it predicts) and how to sample from it. The former
and the spacing of its timesteps are kept; steps and solver are chosen when sampling.

What is written makes diffusers sample as mmgen does: DDPMScheduler with the posterior's variance (`fixed_small`) and trailing
timesteps is the sampler `ancestral` on the grids `uniform` and `schedule`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..diffusion.betas import PURE_NOISE
from ..diffusion.schedules import ScheduleSettings
from ..models.denoiser import DenoiserSettings
from ..errors import ConfigError, ModelError
from ..models.config import SamplingSettings

# With these a network is one of discrete times; they differ as samplers only
DISCRETE = (
    "DDPMScheduler",
    "DDIMScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
)
FLOW = "FlowMatchEulerDiscreteScheduler"
SOLVER = "DPMSolverMultistepScheduler"  # also of flows, with `use_flow_sigmas`
_FLOW_GRIDS = {FLOW: "linspace", SOLVER: "flow"}  # how they space the times of a flow -> ours
_ALIEN_FLOW = ("use_dynamic_shifting", "shift_terminal", "invert_sigmas")
_LINSPACED = DISCRETE[3:]  # what they space their timesteps by where nothing is said; the others have "leading"
_GRIDS = {"trailing": "uniform", "linspace": "linspace", "leading": "leading"}  # timestep_spacing -> ours
_CLIPPING = ("DDPMScheduler", "DDIMScheduler")  # unless they are told not to
_BETAS = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
_PREDICTIONS = {"epsilon": "eps", "sample": "x", "v_prediction": "v"}
_ALIEN = {  # settings that change what the network was trained on, and the values at which they do not
    "trained_betas": (None, []),
    "thresholding": (None, False),
    "use_flow_sigmas": (None, False),
    "timestep_type": (None, "discrete"),
}


def read_scheduler(config: dict[str, Any] | None, name: str) -> DenoiserSettings:
    """The settings of a network that was trained with this scheduler; `name` is that of the folder, for messages.

    Raises ModelError for a scheduler that means another kind of model, or none at all.
    """
    if not config:
        raise ModelError(
            f"{name} holds no scheduler_config.json, without which nobody knows what the network predicts and at which times: "
            'add the one it was trained with, such as {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000, '
            '"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02, '
            '"prediction_type": "epsilon", "clip_sample": true}'
        )
    kind = str(config.get("_class_name"))
    if kind in DISCRETE:
        return _discrete(config, kind, name)
    scales = {key: float(config[key]) for key in ("sigma_min", "sigma_max", "sigma_data") if key in config}
    if kind == "CMStochasticIterativeScheduler":
        return DenoiserSettings("cm", **scales, clip=bool(config.get("clip_denoised", True)))
    if kind == "EDMEulerScheduler" and config.get("prediction_type", "epsilon") == "epsilon":
        return DenoiserSettings("edm", **scales)
    known = ", ".join((*DISCRETE, "CMStochasticIterativeScheduler", "EDMEulerScheduler"))
    prediction = f" with prediction_type {config['prediction_type']!r}" if kind == "EDMEulerScheduler" else ""
    raise ModelError(f"{name} has the scheduler {kind}{prediction}, which mmgen cannot express; it can these: {known}")


def is_flow(config: dict[str, Any] | None) -> bool:
    """Whether a scheduler is of a flow-matching model."""
    return bool(config) and (config.get("_class_name") == FLOW or bool(config.get("use_flow_sigmas")))


def read_flow(config: dict[str, Any], name: str) -> tuple[DenoiserSettings, SamplingSettings]:
    """The settings of a flow z = (1 - s) x + s e whose network gives e - x at the time 1000 s, and how it is sampled.

    The shift is one of the times that are sampled, not of the network's. Raises ModelError for what mmgen cannot express.
    """
    kind = config.get("_class_name")
    alien = {key: config[key] for key in _ALIEN_FLOW if config.get(key)}
    if config.get("num_train_timesteps", 1000) != 1000:
        alien["num_train_timesteps"] = config["num_train_timesteps"]
    if kind == SOLVER and config.get("prediction_type") != "flow_prediction":
        alien["prediction_type"] = config.get("prediction_type")
    if kind not in _FLOW_GRIDS or alien:
        listing = ", ".join(f"{key} = {value!r}" for key, value in alien.items())
        what = f" with {listing}" if alien else ""
        raise ModelError(f"{name} has a {kind} of flows{what}, which mmgen cannot express; it can {' and '.join(_FLOW_GRIDS)}")
    shift = float(config.get("shift" if kind == FLOW else "flow_shift", 1.0))
    denoiser = DenoiserSettings(
        "schedule", prediction="velocity", schedule=ScheduleSettings("fm"), sigma_max=PURE_NOISE, round_time=kind == SOLVER
    )
    return denoiser, SamplingSettings(grid=_FLOW_GRIDS[kind], schedule=ScheduleSettings("fm", shift=shift))


def write_flow(student: SamplingSettings, denoiser: DenoiserSettings) -> dict[str, Any]:
    """scheduler_config.json with which diffusers samples a student of a flow exactly as mmgen does.

    DPMSolverMultistepScheduler's first order with `sde-dpmsolver++` is q(z_s | z_t, x_hat); its times are the grid `flow`.
    Raises ConfigError where they are not the student's.
    """
    steps, schedule, reason = student.student_steps, student.schedule, None
    if schedule.name != "fm":
        reason = f"it was distilled on the schedule {schedule.name}, and diffusers has flows (fm) only"
    elif student.stochasticity != 1:
        reason = f"it is sampled with the stochasticity {student.stochasticity:g}, where DPMSolverMultistepScheduler always has 1"
    elif student.grid != "flow" or not denoiser.round_time:
        reason = "it is sampled on other times than DPMSolverMultistepScheduler's (grid flow, denoiser.round_time)"
    elif denoiser.noise_channels or denoiser.noise_dropout:
        reason = "it has randomness of its own, which diffusers does not give it"
    elif _flow_times(steps, schedule.shift) != _own_times(steps, schedule.shift):
        reason = f"diffusers rounds one of the times of {steps} steps otherwise"
    if reason:
        raise ConfigError(f"this student cannot be written for diffusers: {reason}; sample from it with mmgen")
    return {
        "_class_name": SOLVER,
        "algorithm_type": "sde-dpmsolver++",
        "solver_order": 1,
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": schedule.shift,
        "final_sigmas_type": "zero",
        "thresholding": False,
    }


def _flow_times(steps: int, shift: float) -> list[int]:
    """The network times of DPMSolverMultistepScheduler.set_timesteps with flow sigmas."""
    sigmas = 1.0 - np.linspace(1, 1 / 1000, steps + 1)
    sigmas = np.flip(shift * sigmas / (1 + (shift - 1) * sigmas))[:-1]
    return (sigmas * 1000).astype(np.int64).tolist()


def _own_times(steps: int, shift: float) -> list[int]:
    """Those of the grid `flow`, rounded down as the preconditioning `schedule` does."""
    t = (1 - 1 / 1000) * (1 - np.arange(steps) / steps)
    return np.floor(1000 * shift * t / (1 + (shift - 1) * t) + 1e-9).astype(np.int64).tolist()


def _discrete(config: dict[str, Any], kind: str, name: str) -> DenoiserSettings:
    schedule, prediction = config.get("beta_schedule", "linear"), config.get("prediction_type", "epsilon")
    if config.get("predict_epsilon") is False:  # what prediction_type was before diffusers 0.10
        prediction = "sample"
    alien = {key: config[key] for key, plain in _ALIEN.items() if key in config and config[key] not in plain}
    alien |= {"beta_schedule": schedule} if schedule not in _BETAS else {}
    alien |= {"prediction_type": prediction} if prediction not in _PREDICTIONS else {}
    clip = bool(config.get("clip_sample", kind in _CLIPPING))
    if clip and config.get("clip_sample_range", 1.0) != 1:
        alien["clip_sample_range"] = config["clip_sample_range"]
    if alien:
        listing = ", ".join(f"{key} = {value!r}" for key, value in alien.items())
        raise ModelError(f"{name} has a {kind} with {listing}, which mmgen cannot express")
    zero_snr = bool(config.get("rescale_betas_zero_snr"))
    if zero_snr and prediction == "epsilon":
        raise ModelError(
            f"{name} has a {kind} with rescale_betas_zero_snr and prediction_type 'epsilon': where there is no signal, the noise says "
            "nothing of the image, so that one of the two is wrong"
        )
    return DenoiserSettings(
        "discrete",
        zero_snr=zero_snr,
        prediction=_PREDICTIONS[prediction],
        betas=_BETAS[schedule],
        beta_start=float(config.get("beta_start", 1e-4)),
        beta_end=float(config.get("beta_end", 0.02)),
        num_timesteps=int(config.get("num_train_timesteps", 1000)),
        clip=clip,
        clip_eps=False,
    )


def read_sampling(config: dict[str, Any]) -> tuple[SamplingSettings, str | None]:
    """How this scheduler spaces timesteps, as the model's default, and a sentence on it; nothing of others than DISCRETE."""
    kind = config.get("_class_name")
    if kind not in DISCRETE:
        return SamplingSettings(), None
    spacing = config.get("timestep_spacing") or ("linspace" if kind in _LINSPACED else "leading")
    if spacing not in _GRIDS:
        raise ModelError(f"the scheduler has timestep_spacing = {spacing!r}, which diffusers does not know")
    if spacing == "leading" and config.get("steps_offset", 0):
        return SamplingSettings(), (
            f"timesteps are spaced trailing (--grid uniform), not leading with steps_offset {config['steps_offset']} as the scheduler"
        )
    note = f"timesteps are spaced {spacing}, as the scheduler says (--grid {_GRIDS[spacing]})"
    return SamplingSettings(
        grid=_GRIDS[spacing]
    ), note if spacing == "trailing" else f"{note}; --grid uniform starts at the last one"


def write_scheduler(
    denoiser: DenoiserSettings, sampling: SamplingSettings, kind: str, learned_variance: bool = False
) -> dict[str, Any]:
    """scheduler_config.json with which diffusers samples as mmgen does; `kind`: DDPMScheduler or DDIMScheduler if discrete.

    A student's is always DDPMScheduler: it is sampled by the posterior q(z_s | z_t, x_hat).

    Raises ConfigError for what no scheduler of diffusers expresses.
    """
    student = sampling.student_steps is not None
    if student:
        kind = "DDPMScheduler"
        _check_student(denoiser, sampling)
    scales = {key: getattr(denoiser, key) for key in ("sigma_min", "sigma_max", "sigma_data")}
    if denoiser.precondition == "cm":
        return {"_class_name": "CMStochasticIterativeScheduler", **scales, "clip_denoised": denoiser.clip}
    if denoiser.precondition == "edm" and not denoiser.clip:
        return {"_class_name": "EDMEulerScheduler", **scales, "prediction_type": "epsilon"}
    if denoiser.precondition != "discrete":
        raise ConfigError(
            f"diffusers has no scheduler for a network with the preconditioning {denoiser.precondition!r}: use --to pt"
        )
    inverse = {ours: theirs for theirs, ours in _PREDICTIONS.items()}, {ours: theirs for theirs, ours in _BETAS.items()}
    config = {
        "_class_name": kind,
        "num_train_timesteps": denoiser.num_timesteps,
        "beta_start": denoiser.beta_start,
        "beta_end": denoiser.beta_end,
        "beta_schedule": inverse[1][denoiser.betas],
        "prediction_type": inverse[0][denoiser.prediction],
        "clip_sample": denoiser.clip,
        "thresholding": False,
        "timestep_spacing": {ours: theirs for theirs, ours in _GRIDS.items()}.get(sampling.grid, "trailing"),
    }
    if denoiser.zero_snr:
        config["rescale_betas_zero_snr"] = True
    if kind == "DDPMScheduler":
        config["variance_type"] = "learned_range" if learned_variance else "fixed_small"
    return config


def _check_student(denoiser: DenoiserSettings, sampling: SamplingSettings) -> None:
    """Raises ConfigError for a student that diffusers' DDPMScheduler would sample otherwise than mmgen."""
    own = denoiser.betas, denoiser.beta_start, denoiser.beta_end, denoiser.num_timesteps, denoiser.zero_snr
    schedule = sampling.schedule
    reason = None
    if denoiser.precondition != "discrete":
        reason = "its network was not trained on discrete timesteps"
    elif schedule.name != "discrete" or schedule.shift != 1:
        shifted = "" if schedule.shift == 1 else f" shifted by {schedule.shift:g}"
        reason = f"it was distilled on the schedule {schedule.name}{shifted}, and not on the timesteps of its teacher (discrete)"
    elif (schedule.betas, schedule.beta_start, schedule.beta_end, schedule.num_timesteps, schedule.zero_snr) != own:
        reason = "it was distilled on timesteps of other betas than its teacher's"
    elif sampling.stochasticity != 1:
        reason = f"it is sampled with the stochasticity {sampling.stochasticity:g}, where DDPMScheduler always has 1"
    elif len(np.arange(denoiser.num_timesteps, 0, -denoiser.num_timesteps / sampling.student_steps)) != sampling.student_steps:
        reason = (
            f"diffusers' trailing timesteps for {sampling.student_steps} steps are not so many, by a rounding error of its own"
        )
    elif denoiser.noise_channels or denoiser.noise_dropout:
        reason = "it has randomness of its own, which diffusers does not give it"
    if reason:
        raise ConfigError(f"this student cannot be written for diffusers: {reason}; sample from it with mmgen")
