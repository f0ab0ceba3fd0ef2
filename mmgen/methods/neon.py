"""Neon (Alemohammad et al., arXiv:2510.03597): a generator is trained for a moment on its own samples, and led away from what that did.

Its samples lean to where the model already is too sure; training on them goes further there, and the extrapolation goes back.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config.distill import DistillConfig
from ..config.imm import ImmConfig
from ..config.sections import DataSettings, OptimizerSettings, RunSettings
from ..config.teacher import TeacherConfig
from ..errors import ConfigError
from ..losses.denoising import DenoisingSettings
from ..models.config import ModelConfig, kind_of
from ..models.files import MODEL_FILE, find_model, load_model, read_config, save_model
from ..networks.text import TextSettings
from ..sampling.drawing import SampleSettings, plan
from ..sampling.folder import RECORD, write_png
from ..sampling.latents_folder import write_latents
from ..sampling.record import Origin, read_record
from ..system.devices import find_device
from ..system.schema import from_dict
from ..training.run_folder import RunFolder
from ..training.task import Outcome, Reporter
from . import IMM, TEACHER
from .distill.method import DISTILLED
from .method import Method
from .run import train

IMM_STEPS = 8  # in which samples are drawn; other models have a usual number of their own
NEON = "neon"  # entry of ModelConfig.training: where a model comes from


@dataclass(frozen=True)
class NeonSettings:
    """How samples are drawn, trained on and led away from: options of `mmgen neon`, which has the same defaults."""

    weight: float = 1.0  # w; 0 is the model as it is
    num: int = 10_000  # samples to draw and train on
    steps: int | None = None  # in which they are drawn; None: IMM_STEPS of an IMM model, else the model's usual number
    images: int = 20_000  # to train on
    lr: float = 1e-5  # of that training, constant


def extrapolated(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], weight: float) -> dict[str, Tensor]:
    """(1 + w) theta_r - w theta_s (eq. 1), in the dtype of theta_r: the base's weights, led away from the tuned ones.

    What is no floating-point number is the base's. Raises ConfigError where the two have not the same tensors.
    """
    if {k: v.shape for k, v in base.items()} != {k: v.shape for k, v in tuned.items()}:
        raise ConfigError("the two models have not the same tensors: tune the very model that is to be improved")
    return {
        name: ((1 + weight) * value.double() - weight * tuned[name].double()).to(value.dtype) if value.is_floating_point() else value
        for name, value in base.items()
    }


def tuning(config: ModelConfig, model: Path, samples: Path, images: int, lr: float) -> tuple[Method, Any]:
    """The method and settings of a short training of the model on its samples, at a constant learning rate.

    IMM models and teachers go on as they were trained. A student has no loss without its teacher: it learns as a denoiser, with the
    weight of its distillation. That leads it to means, which vary less than its samples: the direction in which students fail.
    Raises ConfigError where the model does not say how it was trained.
    """
    trained = config.training.get("config")
    if not trained:
        raise ConfigError(f"{model} was not trained by mmgen: neon goes on with the settings of a training")
    settings = {key: value for key, value in trained.items() if key != "data"}
    if kind_of(config) == "imm":
        method, own = IMM, from_dict(ImmConfig, settings)
    elif DISTILLED in config.training:
        method, own = TEACHER, _as_denoiser(config, from_dict(DistillConfig, settings), model)
    else:
        method, own = TEACHER, from_dict(TeacherConfig, settings)
    hidden = {key: trained.get("data", {}).get(key, getattr(own.data, key)) for key in ("label_dropout", "caption_dropout")}
    augment = trained.get("data", {}).get("augment", 0.0) if config.augment_dim else 0.0
    data = DataSettings(
        name=str(samples), resolution=config.resolution, channels=config.channels, conditional=config.num_classes > 0,
        num_classes=config.num_classes or None, text=config.text is not None,  # the samples' captions are beside them
        augment=augment, **hidden,
    )  # fmt: skip
    return method, replace(
        own,
        data=data,
        optimizer=replace(own.optimizer, lr=lr, warmup_images=0, decay="none"),
        train=replace(own.train, max_images=images, init=str(model)),
        run=replace(own.run, eval_num=0, checkpoint_every=images, preview_every=10 * images, eval_every=10 * images),
    )


def _as_denoiser(config: ModelConfig, trained: DistillConfig, model: Path) -> TeacherConfig:
    """The settings with which a student of this config is trained as a denoiser. Raises ConfigError for one that no denoiser is like."""
    denoiser, loss = config.denoiser, trained.loss
    if denoiser.noise_channels or denoiser.noise_dropout or denoiser.told_guidance or getattr(config.network, "takes_guidance", False):
        raise ConfigError(f"{model} is a student with noise of its own, or one that is told its guidance: neon does not improve those")
    of_run = {field.name: getattr(trained.run, field.name) for field in dataclasses.fields(RunSettings)}
    return TeacherConfig(
        network=config.network,
        denoiser=denoiser,
        loss=DenoisingSettings(loss.weighting, loss.sigma_data, loss.sigmoid_bias, loss.min_snr_gamma),
        text=config.text or TextSettings(),
        optimizer=OptimizerSettings(name="adam", grad_clip=trained.optimizer.grad_clip),  # distillation's has no momentum
        train=trained.train,
        sampling=config.sampling,
        run=RunSettings(**of_run),
    )


def place(model: str | os.PathLike, ema: str | None, out: Path | None) -> tuple[Path, Path]:
    """The model file that is meant, and the folder for what is made of it. Raises ConfigError and ModelError."""
    if out is not None and (out.suffix == ".safetensors" or out.is_file()):
        raise ConfigError(f"--out is a folder, for samples, training and model, and {out} names a file: name a folder")
    file = find_model(model, ema)
    return file, out or file.parent / ("neon" if ema is None else f"neon-{ema}")


def _check_found(out: Path, sha256: str, settings: NeonSettings, steps: int) -> None:
    """Raises ConfigError where `out` was made of other weights (sha256: the model's) or with other settings: before anything is drawn."""
    samples, tuned = read_record(out / "samples" / RECORD) or {}, RunFolder(out / "tuned")
    trained = tuned.identity()["config"] if (tuned.path / "config.json").is_file() else {"train": {}, "optimizer": {}}
    if samples.get("model_sha256", sha256) != sha256:
        raise ConfigError(f"{out} was made of other weights, such as those before the run went on: give another --out, or delete it")
    for option, now, before in (
        ("--num", settings.num, samples.get("num")), ("--steps", steps, samples.get("steps")), ("--lr", settings.lr, trained["optimizer"].get("lr")),
        ("--images", settings.images, max(settings.images, trained["train"].get("max_images", 0))),  # more images: the training goes on
    ):  # fmt: skip
        if before not in (None, now):
            raise ConfigError(f"{out} was made with {option} {before}, not {now}: give another --out, or delete it")


def neon(file: Path, out: Path, settings: NeonSettings, reporter: Reporter, device: str = "auto") -> tuple[Path, Outcome]:
    """Draws samples, trains on them and writes the extrapolated model, where that training ended.

    file: any of the averages of a run. `out` holds samples/, of a latent model its latents, tuned/ and the model. What is there already
    is not done again, so another weight takes a moment. Raises ConfigError for impossible settings, a model that was not trained by
    mmgen, and students with noise of their own.
    """
    for name in ("num", "steps", "images", "lr"):
        value = getattr(settings, name)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"--{name} must be positive, not {value}")
    if not math.isfinite(settings.weight):
        raise ConfigError(f"--weight must be a number, not {settings.weight}")
    origin = Origin.of(str(file))
    write = write_png if origin.config.latents is None else write_latents
    method, config = tuning(origin.config, file, out / "samples", settings.images, settings.lr)
    sampled = SampleSettings(steps=settings.steps or (IMM_STEPS if method is IMM else None))
    steps = plan(origin.config, sampled).steps
    _check_found(out, origin.sha256, settings, steps)
    result = out / f"model-{settings.weight:g}.safetensors"
    with reporter.work("own samples", settings.num) as update:
        write(origin.load(find_device(device)), out / "samples", settings.num, sampled, origin, progress=update)
    outcome = train(method, config, out / "tuned", reporter, device=device)
    if not outcome.finished or int(os.environ.get("RANK", "0")) != 0:
        return result, outcome
    of_tuning = out / "tuned" / file.name  # the same average
    if not of_tuning.is_file():
        of_tuning = out / "tuned" / MODEL_FILE
    base, tuned = load_model(file), load_model(of_tuning)
    made = {
        **dataclasses.asdict(settings), "steps": steps, "method": method.name,
        "base": str(file), "base_sha256": origin.sha256, "tuned": of_tuning.name,
    }  # fmt: skip
    improved = read_config(file)
    save_model(
        result,
        replace(improved, training={**improved.training, NEON: made}),
        extrapolated(base.network.state_dict(), tuned.network.state_dict(), settings.weight),
    )
    return result, outcome
