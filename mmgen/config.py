"""The settings of a training run: presets, TOML files and single settings merged into one checked, frozen data class."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from .errors import ConfigError, nearest
from .flow_map import FlowMapSettings
from .losses.imm import ImmSettings, documented_times
from .models import SamplingSettings
from .networks import DiTSettings, NetworkSettings, UNetSettings
from .settings import flatten, from_dict

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib


@dataclass(frozen=True)
class DataSettings:
    name: str = "digits"  # digits, cifar10, a hub id user/name, a folder (of images or latents), a zip or a parquet file
    split: str = "train"
    resolution: int | None = None  # side of the images after cropping and resizing; unset: their own. Of latents: theirs
    channels: int | None = None  # 1 grey, 3 RGB; unset: grey if the images are. Of latents: theirs
    image_column: str | None = None  # unset: the first column that holds images
    label_column: str | None = None  # unset: the first column that holds class labels
    on_corrupt: Literal["stop", "skip"] = "stop"  # what an image that cannot be decoded does
    conditional: bool = False  # train on class labels
    num_classes: int | None = None  # unset: found in the data
    label_dropout: float = 0.1  # probability of hiding a label, for guidance; used if conditional
    xflip: bool = False  # mirror every second image, at random
    augment: float = 0.0  # probability p of EDM's augmentation (0.12 for CIFAR-10), with its label; 0: none


@dataclass(frozen=True)
class OptimizerSettings:
    name: Literal["radam", "adamw", "adam"] = "radam"
    lr: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_images: int = 0  # the learning rate rises linearly over these, then is constant
    grad_clip: float = 0.0  # largest norm of the gradient; 0: not clipped


@dataclass(frozen=True)
class TrainSettings:
    batch_size: int = 4096  # global, whatever the number of devices
    max_images: int = 400_000 * 4096  # images to train on
    seed: int = 0
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "tf32"  # tf32 is fp32 where there is no GPU
    ema_betas: tuple[float, ...] = (0.9999,)  # averages of the weights kept, by decay per step
    ema_half_lives: tuple[int, ...] = ()  # more averages, by half-life in images


@dataclass(frozen=True)
class RunSettings:
    """Settings that leave the mathematics alone: a run may be continued with others."""

    batch_per_device: int = 128  # at most so many images in one pass; the rest of the batch is accumulated
    compile: bool = False  # torch.compile the network
    checkpoint_every: int = 2_000_000  # images between checkpoints
    keep_checkpoints: int = 2
    preview_every: int = 2_000_000  # images between sample grids
    eval_every: int = 10_000_000  # images between measurements
    eval_num: int = 10_000  # samples per measurement; 0: none
    eval_steps: tuple[int, ...] = (1, 2, 4, 8)  # numbers of steps shown and measured; the first decides which model is best
    eval_features: str = "auto"  # as `mmgen fid --features`; auto: Inception's (FID), or pixels where it is not at hand
    log_every: int = 100  # steps between log lines
    log_with: tuple[Literal["tensorboard", "wandb"], ...] = ()


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


def preset_names() -> list[str]:
    return sorted(p.name.removesuffix(".toml") for p in resources.files("mmgen.presets").iterdir() if p.name.endswith(".toml"))


def read_preset(name: str) -> dict[str, Any]:
    """The table of a preset, or ConfigError with the names that there are."""
    if name not in preset_names():
        raise ConfigError(f"unknown preset {name!r}: {nearest(name, preset_names())}")
    return tomllib.loads((resources.files("mmgen.presets") / f"{name}.toml").read_text("utf-8"))


def read_toml(path: str | Path) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def parse_assignment(text: str) -> tuple[str, Any]:
    """("loss.k", 12) from "loss.k=12"; the value as TOML writes it, quotes around a word may be left out."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--set {text!r} must be key=value, such as loss.k=12")
    try:
        parsed = tomllib.loads(f"value = {value.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    return key.strip(), parsed


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with the tables of `changes` merged in; a network of another kind replaces the one before."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and value.get("kind") in (None, old.get("kind")):
            value = merge(old, value)
        merged[key] = value
    return merged


def nest(dotted: dict[str, Any]) -> dict[str, Any]:
    """{"loss.k": 12} as {"loss": {"k": 12}}. Raises ConfigError for a key that is not section.name."""
    sections = [f.name for f in dataclasses.fields(ImmConfig)]
    valid = [key for key, _ in flatten(ImmConfig().to_dict())]
    valid += [f"network.{f.name}" for f in dataclasses.fields(DiTSettings) if f"network.{f.name}" not in valid]
    nested: dict[str, Any] = {}
    for key, value in dotted.items():
        section, dot, name = key.partition(".")
        if not dot or section not in sections:
            raise ConfigError(f"unknown setting {key!r}: {nearest(key, valid)}")
        nested.setdefault(section, {})[name] = value
    return nested


def resolve(*tables: dict[str, Any]) -> ImmConfig:
    """One config from tables of rising precedence; what depends on other settings is filled in, what cannot be is refused."""
    content: dict[str, Any] = {}
    for table in tables:
        content = merge(content, table)
    if isinstance(content.get("network"), dict):
        content["network"].setdefault("kind", "unet")
    config = from_dict(ImmConfig, content)
    low, high = documented_times(config.loss.mapping, config.flow.get_schedule().t_max)
    flow = dataclasses.replace(
        config.flow,
        t_min=low if config.flow.t_min is None else config.flow.t_min,
        t_max=high if config.flow.t_max is None else config.flow.t_max,
    )
    config = dataclasses.replace(config, flow=flow)
    _check(config)
    return config


def _check(config: ImmConfig) -> None:
    """Raises ConfigError for values that are impossible, alone or together."""
    flow, loss, data, optimizer, train, run = (
        config.flow, config.loss, config.data, config.optimizer, config.train, config.run
    )  # fmt: skip

    def require(condition: bool, message: str) -> None:
        if not condition:
            raise ConfigError(message)

    for name, value in {
        "loss.group_size": loss.group_size, "train.batch_size": train.batch_size, "train.max_images": train.max_images,
        "run.batch_per_device": run.batch_per_device, "run.checkpoint_every": run.checkpoint_every,
        "run.keep_checkpoints": run.keep_checkpoints, "run.preview_every": run.preview_every,
        "run.eval_every": run.eval_every, "run.log_every": run.log_every, "flow.sigma_data": flow.sigma_data,
        "flow.time_scale": flow.time_scale, "optimizer.lr": optimizer.lr, "optimizer.eps": optimizer.eps,
        "loss.distance_floor": loss.distance_floor, "loss.lognormal_std": loss.lognormal_std,
        **{"run.eval_steps": min(run.eval_steps, default=0), "train.ema_half_lives": min(train.ema_half_lives, default=1)},
    }.items():  # fmt: skip
        require(value > 0, f"{name} must be more than 0, not {value}")
    for name, value in {
        "data.label_dropout": data.label_dropout, "data.augment": data.augment, "optimizer.beta1": optimizer.beta1,
        "optimizer.beta2": optimizer.beta2, **({"network.dropout": config.network.dropout}
                                               if isinstance(config.network, UNetSettings) else {}),
    }.items():  # fmt: skip
        require(0 <= value < 1, f"{name} must be at least 0 and less than 1, not {value}")
    for beta in train.ema_betas:
        require(0 < beta < 1, f"train.ema_betas must lie between 0 and 1, not {beta}")
    require(len(train.ema_betas) + len(train.ema_half_lives) > 0, "train.ema_betas and train.ema_half_lives are both empty")
    require(min(optimizer.weight_decay, optimizer.grad_clip, optimizer.warmup_images, loss.min_gap, loss.a) >= 0,
            "weight_decay, grad_clip, warmup_images, loss.min_gap and loss.a cannot be negative")  # fmt: skip
    require(train.batch_size % loss.group_size == 0,
            f"train.batch_size {train.batch_size} must be a multiple of loss.group_size {loss.group_size}")  # fmt: skip
    require(run.batch_per_device >= loss.group_size,
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
    require(
        data.augment == 0 or isinstance(config.network, UNetSettings),
        "data.augment needs network.kind unet: a DiT takes no augmentation label",
    )


def check_network(network: NetworkSettings, resolution: int, channels: int) -> None:
    """Raises ConfigError where a network cannot take images of this size."""
    if isinstance(network, DiTSettings):
        if resolution % network.patch_size:
            raise ConfigError(f"network.patch_size {network.patch_size} does not divide the resolution {resolution}")
        if network.hidden_size % network.num_heads or network.hidden_size % 4:
            raise ConfigError(
                f"network.hidden_size {network.hidden_size} must be a multiple of num_heads {network.num_heads} and of 4"
            )
        return
    if not network.channel_mult:
        raise ConfigError("network.channel_mult needs at least one level")
    factor = 2 ** (len(network.channel_mult) - 1)
    if resolution % factor:
        raise ConfigError(
            f"a U-Net of {len(network.channel_mult)} levels (network.channel_mult) needs a resolution divisible by {factor}, not {resolution}"
        )
    widths = [m * network.model_channels for m in (1, *network.channel_mult)]
    pairs = widths + [a + b for a in widths for b in widths]
    for width in pairs:
        if width < 4 or width % min(32, width // 4):
            raise ConfigError(
                f"network.model_channels {network.model_channels} gives a layer of {width} channels, which group norm cannot "
                "divide into up to 32 groups: use a multiple of 32, or 4, 8 or 16"
            )
