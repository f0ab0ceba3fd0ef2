"""The record beside samples: how they were made, whether all are there, and whether others may join them."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..config.sections import CAPTIONS, READING
from ..errors import ConfigError
from ..formats.family import ConvertOptions
from ..system.files import read_json
from ..formats.opening import OpenedModel, open_model
from ..models.build import AnyModel
from ..models.config import ModelConfig, drawn_shape, kind_of
from ..report.push import CONVERTED
from .drawing import Plan
from .prompts import prompts_sha256

FORMAT = 1

# What an image depends on, in the order in which a difference is reported. Everything else (batch size, device, path of
# the model, number of images) has no influence on image i.
DECIDING = {
    "model_sha256": "the model",
    "read_as": "how the checkpoint is read",
    "steps": "steps",
    "sampler": "sampler",
    "grid": "grid",
    "times": "times",
    "churn": "churn",
    "s_tmin": "s_tmin",
    "s_tmax": "s_tmax",
    "s_noise": "s_noise",
    "stochasticity": "stochasticity",
    "guidance": "guidance",
    "guidance_interval": "the guidance interval",
    "guide_sha256": "the guide",
    "classes": "classes",
    "prompts_sha256": "prompts",
    "negative_prompt": "the negative prompt",
    "seed": "seed",
    "precision": "precision",
    "digits": "the number of digits in file names",
}


@dataclass(frozen=True)
class Origin:
    """Which file a model was loaded from."""

    model: str  # the MODEL argument as given
    file: Path
    sha256: str
    ema: str | None = None  # which average was asked for
    opened: OpenedModel | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, path: str | os.PathLike, ema: str | None = None, options: ConvertOptions = ConvertOptions()) -> Origin:
        """Finds the model that a MODEL argument means, as `mmgen.load` does, and hashes it. Raises ModelError and ConfigError.

        options: what is said of another project's file."""
        opened = open_model(path, ema, options=options)
        return cls(str(path), opened.file, opened.sha256, ema, opened)

    @property
    def config(self) -> ModelConfig:
        return self._opened().config

    @property
    def notes(self) -> tuple[str, ...]:
        """What is assumed of another project's file, and how sampling follows its code."""
        return self.opened.notes if self.opened is not None else ()

    def load(self, device: str | torch.device = "cpu") -> AnyModel:
        return self._opened().build(device)

    def _opened(self) -> OpenedModel:
        return self.opened or open_model(self.file)


def make_record(model: AnyModel, origin: Origin, chosen: Plan, num: int, **more: Any) -> dict[str, Any]:
    """The record of `num` images, as JSON has it; `complete` is false until all are written."""
    config, churn = model.config, chosen.churn
    return {
        "format": FORMAT,
        "complete": False,
        "num": num,
        "model": origin.model,
        "model_file": str(origin.file.absolute()),
        "model_sha256": origin.sha256,
        "read_as": _read_as(origin),
        "ema": origin.ema,
        "kind": kind_of(config),
        **training_data(config),
        "image": list(drawn_shape(config)),
        "vae": None if config.latents is None else {"name": config.latents.vae, "sha256": config.latents.vae_sha256},
        "num_classes": config.num_classes,
        "steps": chosen.steps,
        "nfe": chosen.nfe,  # network evaluations per image
        "sampler": chosen.sampler,
        "grid": chosen.grid,
        "times": chosen.times,  # of a denoiser: sigmas
        "churn": None if churn is None else churn.amount,
        "s_tmin": None if churn is None else churn.s_tmin,
        "s_tmax": None if churn is None else churn.s_tmax,
        "s_noise": None if churn is None else churn.s_noise,
        "stochasticity": None if chosen.stochasticity == 1 else chosen.stochasticity,
        "notes": [*origin.notes, *chosen.notes],
        "assumed": config.training.get(CONVERTED, {}).get("assumed", []),  # of a converted model: what no file says
        "guidance": chosen.guidance,
        "guidance_interval": list(chosen.guidance_interval) or None,
        "guide": chosen.guide and chosen.guide.name,
        "guide_sha256": chosen.guide and chosen.guide.sha256,
        "classes": chosen.classes if config.num_classes else None,
        "prompts": len(chosen.prompts) if config.text is not None else None,  # 0: captions of the training data at random
        "prompts_sha256": prompts_sha256(chosen.prompts),
        "negative_prompt": chosen.negative or None,
        "seed": chosen.seed,
        "precision": chosen.precision,  # None: as the weights are
        "mmgen": __version__,
        "torch": torch.__version__,
        "device": str(model.device),
        **more,
    }


def _read_as(origin: Origin) -> str | None:
    """A digest of what a checkpoint of another project was taken for: options decide that. None for mmgen's own files."""
    if origin.opened is None or origin.opened.state is None or CONVERTED not in origin.config.training:
        return None
    content = json.dumps({**asdict(origin.config), "training": None}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def training_data(config: ModelConfig) -> dict[str, Any]:
    """The images that a model was trained on: what they were called, where they lay, what they were, and how `data.load` reads
    them. Of latents, the images behind them. Models of version 0.1 and of other projects know the name at most."""
    known = config.training.get("data", {})
    images = known.get("images")
    if isinstance(images, dict):  # of latents
        name, path, content = (str(images.get(key, "")) for key in ("word", "place", "content"))
        return {"data": name, "data_place": path, "data_fingerprint": "", "data_content": content,
                "data_options": images.get("options", {})}  # fmt: skip
    settings = config.training.get("config", {}).get("data", {})
    kept = {key: settings[key] for key in READING if settings.get(key)}
    if settings.get("text"):  # the fingerprint is of the captions too
        kept |= {"with_captions": True, **{key: settings[key] for key in CAPTIONS if settings.get(key)}}
    channels, resolution, _ = drawn_shape(config)
    return {
        "data": config.data,
        "data_place": str(known.get("place", "")),  # see `data.resolve.locate`
        "data_fingerprint": str(known.get("fingerprint", "")),  # of the pixels that training saw
        "data_content": "",  # of the encoded images
        "data_options": {**kept, "resolution": resolution, "channels": channels},
    }


def read_record(path: Path) -> dict[str, Any] | None:
    """The record in a file, or None where there is no such file. Raises ConfigError where it is damaged."""
    try:
        record = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): delete it with its samples, or choose another --out") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT or type(record.get("num")) is not int or record["num"] < 1:
        raise ConfigError(f"{path} is no record of samples that this mmgen understands: choose another --out")
    return record


def difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """The first setting in which two records' images differ, in words; None if image i is the same under both."""
    for key, name in DECIDING.items():
        if old.get(key) == new.get(key):
            continue
        if key == "grid" and old.get("times") == new.get("times"):  # another name for the same times
            continue
        if key == "read_as":
            return "its checkpoint was read otherwise (--type, --preset, --heads, --num-classes or --guide-all)"
        if key == "model_sha256":
            before = f"{old.get('model')} ({str(old.get(key))[:8]})"
            return f"the model is {new['model']} (SHA-256 {new[key][:8]}), not {before}"
        return f"{name} would be {_short(new.get(key))}, not {_short(old.get(key))}"
    return None


def may_continue(path: Path, old: dict[str, Any] | None, new: dict[str, Any], overwrite: bool) -> bool:
    """True if images of `new` may join those of `old`, False if those have to go first and `overwrite` allows it.

    Otherwise raises ConfigError naming the first setting that differs.
    """
    if old is None:
        return True
    what = difference(old, new)
    if what is None and old["num"] > new["num"]:
        what = f"--num is {new['num']}, but it holds {old['num']}"
    if what is None or overwrite:
        return what is None
    raise ConfigError(f"{path} holds samples of other settings: {what}; choose another --out, or replace them with --overwrite")


def _short(value: Any) -> str:
    plain = isinstance(value, list) and all(isinstance(v, int | float) for v in value)
    text = ",".join(f"{v:g}" for v in value) if plain else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
