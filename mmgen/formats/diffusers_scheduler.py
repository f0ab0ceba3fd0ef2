"""scheduler_config.json of diffusers against our `DenoiserSettings`: what of it belongs to the model rather than to the sampler.

A scheduler of diffusers holds both how a network was trained (betas, what it predicts) and how to sample from it. Only the
former is kept; steps, spacing and solver are chosen when sampling.
"""

from __future__ import annotations

from typing import Any

from ..models.denoiser import DenoiserSettings
from ..errors import ConfigError, ModelError

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
_CLIPPING = ("DDPMScheduler", "DDIMScheduler")  # unless they are told not to
_BETAS = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
_PREDICTIONS = {"epsilon": "eps", "sample": "x", "v_prediction": "v"}
_ALIEN = {  # settings that change what the network was trained on, and the values at which they do not
    "trained_betas": (None, []),
    "rescale_betas_zero_snr": (None, False),
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
    return DenoiserSettings(
        "discrete",
        prediction=_PREDICTIONS[prediction],
        betas=_BETAS[schedule],
        beta_start=float(config.get("beta_start", 1e-4)),
        beta_end=float(config.get("beta_end", 0.02)),
        num_timesteps=int(config.get("num_train_timesteps", 1000)),
        clip=clip,
    )


def write_scheduler(denoiser: DenoiserSettings, kind: str, learned_variance: bool = False) -> dict[str, Any]:
    """scheduler_config.json for settings that `read_scheduler` would give; `kind`: DDPMScheduler or DDIMScheduler if discrete.

    Raises ConfigError for what no scheduler of diffusers expresses.
    """
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
    }
    if kind == "DDPMScheduler":
        config["variance_type"] = "learned_range" if learned_variance else "fixed_large"
    return config
