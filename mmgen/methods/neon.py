"""Neon (Alemohammad et al., arXiv:2510.03597): a generator is trained for a moment on its own samples, and led away from what that did.

Its samples lean to where the model already is too sure; training on them goes further there, and the extrapolation goes back.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ..config.imm import ImmConfig
from ..errors import ConfigError
from ..models.config import ModelConfig, kind_of
from ..models.files import MODEL_FILE, load_model, read_config, save_model
from ..sampling.drawing import SampleSettings
from ..sampling.folder import write_png
from ..sampling.latents_folder import write_latents
from ..sampling.record import Origin
from ..system.devices import find_device
from ..system.schema import from_dict
from ..training.task import Outcome, Reporter
from . import IMM
from .run import train

NEON = "neon"  # entry of ModelConfig.training: where a model comes from


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


def tuning_config(config: ModelConfig, model: Path, samples: Path, images: int, lr: float) -> ImmConfig:
    """The settings of the model's own training, for a short one on its samples at a constant learning rate.

    Raises ConfigError where the model does not say how it was trained.
    """
    trained = config.training.get("config")
    if kind_of(config) != "imm" or not trained:
        raise ConfigError(f"{model} is no IMM model trained by mmgen: neon goes on with the settings of a training")
    text = config.text is not None  # the samples' captions are beside them
    table = {**trained, "data": {"conditional": config.num_classes > 0, "num_classes": config.num_classes or None, "text": text}}
    own = from_dict(ImmConfig, table)
    return replace(
        own,
        data=replace(own.data, name=str(samples), resolution=config.resolution, channels=config.channels, augment=0.0,
                     **{key: trained.get("data", {}).get(key, getattr(own.data, key)) for key in ("label_dropout", "caption_dropout")}),
        optimizer=replace(own.optimizer, lr=lr, warmup_images=0, decay="none"),
        train=replace(own.train, max_images=images, init=str(model)),
        run=replace(own.run, eval_num=0, checkpoint_every=images, preview_every=10 * images, eval_every=10 * images),
    )  # fmt: skip


def neon(
    file: Path, out: Path, *, num: int, steps: int, images: int, lr: float, weight: float, reporter: Reporter, device: str = "auto"
) -> tuple[Path, Outcome]:
    """Draws `num` samples in `steps` steps, trains on `images` of them and writes the extrapolated model, where that training ended.

    file: any of the averages of a run. `out` holds samples/, of a latent model its latents, tuned/ and the model. What is there already
    is not done again, so another weight takes a moment. Raises ConfigError for a model that is none of IMM's or not trained by mmgen.
    """
    origin = Origin.of(str(file))
    write = write_png if origin.config.latents is None else write_latents
    settings = tuning_config(origin.config, file, out / "samples", images, lr)
    result = out / f"model-{weight:g}.safetensors"
    with reporter.work("own samples", num) as update:
        write(origin.load(find_device(device)), out / "samples", num, SampleSettings(steps=steps), origin, progress=update)
    outcome = train(IMM, settings, out / "tuned", reporter, device=device)
    if not outcome.finished or int(os.environ.get("RANK", "0")) != 0:
        return result, outcome
    of_tuning = out / "tuned" / file.name  # the same average
    base, tuned = load_model(file), load_model(of_tuning if of_tuning.is_file() else out / "tuned" / MODEL_FILE)
    made = {"base": str(file), "base_sha256": origin.sha256, "num": num, "steps": steps, "images": images, "lr": lr, "weight": weight}
    config = read_config(file)
    save_model(
        result,
        replace(config, training={**config.training, NEON: made}),
        extrapolated(base.network.state_dict(), tuned.network.state_dict(), weight),
    )
    return result, outcome
