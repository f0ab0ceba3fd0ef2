"""A model: network, flow map or denoiser, and what is known of its data, in one .safetensors file that samples years later."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import __version__
from .denoiser import Denoiser, DenoiserSettings, check_settings
from ..errors import ConfigError, ModelError, shortened
from ..system.files import parse_json, replacing
from .flow_map import FlowMapSettings, flow_map
from .flow_map import check_settings as check_flow
from .latents import LatentSettings
from ..networks import NetworkSettings, build_network
from ..networks.conditions import Condition
from ..networks.empty import fill, without_weights
from ..networks.limits import check_sizes
from ..diffusion.schedules import ScheduleSettings
from ..system.schema import from_dict
from ..system.tensor_files import save_tensors

METADATA_KEY = "mmgen"
FORMAT = 1
MODEL_FILE = "model.safetensors"


def to_uint8(x: Tensor) -> Tensor:
    """Pixels in [-1, 1] to 0..255: x * 127.5 + 128, clipped, truncated, as behind the published FIDs. Any shape."""
    return (x * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def from_uint8(images: Tensor) -> Tensor:
    """uint8 to float32 in [-1, 1]: x / 127.5 - 1. Any shape."""
    return images.float() / 127.5 - 1


@dataclass(frozen=True)
class SamplingSettings:
    """How a model is sampled unless the command says otherwise. `default` and None: what suits its kind."""

    sampler: Literal["default", "pushforward", "restart", "ddim", "ancestral", "heun"] = "default"
    # Of the times: see `time_grid` or `sigma_grids` of the room `sampling`; `schedule`: evenly spaced in that of `schedule` below
    grid: Literal["default", "uniform", "edm", "schedule", "linspace", "leading"] = "default"
    guidance: float = 1.0  # w of classifier-free guidance; 1 is none
    steps: int | None = None
    churn: float = 0.0  # heun only, this and what follows: S_churn of Karras et al., arXiv:2206.00364, algorithm 2
    s_tmin: float = 0.0  # sigma below which nothing is churned
    s_tmax: float | None = None  # and above which; None: no limit
    s_noise: float = 1.0  # standard deviation of the noise added
    schedule: ScheduleSettings | None = None  # a student's: the process that it was distilled on, and so that of its grid
    stochasticity: float = 1.0  # ancestral only: 1 is DDPM, 0 is DDIM: see `diffusion.posterior`
    student_steps: int | None = None  # how many steps a student was distilled for; None: it is none


@dataclass(frozen=True)
class ModelConfig:
    """Everything beside the weights. Stored as JSON in the header of the model file."""

    network: NetworkSettings
    flow: FlowMapSettings | None  # a flow map has this, a denoiser has `denoiser`
    resolution: int  # of images; of the latents where there are `latents`
    channels: int
    num_classes: int = 0  # 0: unconditional
    null_trained: bool | None = None  # trained on images without a class too, as guidance needs; None: see `guidance.knows_null`
    augment_dim: int = 0  # width of the augmentation label that the network was trained with; 0: none
    class_names: list[str] | None = None
    class_counts: list[int] | None = None  # images per class in the training data
    data: str = ""  # the --data word of the training data
    denoiser: DenoiserSettings | None = None
    latents: LatentSettings | None = None  # of a model in an autoencoder's latent space
    sampling: SamplingSettings = SamplingSettings()
    training: dict[str, Any] = field(default_factory=dict)  # provenance: settings, images seen, which EMA


class Model(nn.Module):
    """A flow map with its network: `model.f(x, s, t)` jumps from t to s, `model.sample(...)` draws images."""

    def __init__(self, config: ModelConfig, network: nn.Module | None = None) -> None:
        super().__init__()
        self.config = config
        self.network = network or build_network(
            config.network,
            resolution=config.resolution,
            channels=config.channels,
            num_classes=config.num_classes,
            augment_dim=config.augment_dim,
        )

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.config.channels, self.config.resolution, self.config.resolution

    def f(self, x: Tensor, s: Tensor, t: Tensor, condition: Condition | None = None, guidance: float = 1.0) -> Tensor:
        """f_{s,t}(x): see `flow_map.flow_map`."""
        return flow_map(self.network, self.config.flow, x, s, t, condition, guidance)

    def sample(self, num: int, **options: Any) -> Tensor:
        """Draws images, uint8 [num, C, H, W] on the CPU. Options: those of `sampling.SampleSettings` (steps, seed, classes,
        guidance, sampler, grid, batch_size ...)."""
        from ..sampling.drawing import SampleSettings, draw

        return draw(self, SampleSettings(**options), range(num))[0]


AnyModel = Model | Denoiser


def kind_of(config: ModelConfig) -> str:
    """`imm`, a flow map, or `denoiser`. Raises ConfigError for what is neither or both."""
    if (config.flow is None) == (config.denoiser is None):
        both = "both" if config.flow else "neither"
        raise ConfigError(f"a model is a flow map or a denoiser: its config has {both} of `flow` and `denoiser`")
    return "denoiser" if config.flow is None else "imm"


def build_model(config: ModelConfig) -> AnyModel:
    """A model with freshly initialised weights."""
    return Model(config) if kind_of(config) == "imm" else Denoiser(config)


def check_weights(config: ModelConfig) -> None:
    """Raises ConfigError for a network whose weights alone are more than this machine's memory, before it is built."""
    with without_weights():
        count = sum(p.numel() for p in build_model(config).network.parameters())
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not a system that tells
        return
    if 4 * count > memory:
        raise ConfigError(
            f"the network has {count:,} parameters, whose weights take {4 * count / 1e9:,.0f} GB, and this machine has "
            f"{memory / 1e9:,.0f} GB of memory: make it smaller by the settings of network"
        )


def drawn_shape(config: ModelConfig) -> tuple[int, int, int]:
    """Channels, height and width of the images that are drawn: decoded ones where the model knows latents."""
    if config.latents is not None:
        return 3, config.latents.resolution, config.latents.resolution
    return config.channels, config.resolution, config.resolution


def save_model(path: str | os.PathLike, config: ModelConfig, state: dict[str, Tensor]) -> None:
    """Writes one .safetensors file, atomically. `state`: the network's state dict."""
    header = {"format": FORMAT, "mmgen_version": __version__, "kind": kind_of(config), "config": dataclasses.asdict(config)}
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    with replacing(path) as temporary:
        save_tensors(tensors, temporary, metadata={METADATA_KEY: json.dumps(header)})


def read_config(path: str | os.PathLike) -> ModelConfig:
    """The config in the header of a model file, without reading the weights. Raises ModelError with one sentence."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read as a .safetensors file: {error}") from error
    if METADATA_KEY not in metadata:
        raise ModelError(f"{path} is a .safetensors file, but not one of mmgen's: its header has no '{METADATA_KEY}' entry")
    try:
        header = parse_json(metadata[METADATA_KEY])
        found = header["format"]
        if found != FORMAT:
            raise ModelError(f"{path} has model format {found}, this version of mmgen reads {FORMAT}: install a newer mmgen")
        config = from_dict(ModelConfig, header["config"])
        _check_config(config)
        return config
    except (ValueError, KeyError, TypeError, ConfigError) as error:
        raise ModelError(f"the config in the header of {path} is damaged: {shortened(error, 2000)}") from error


def _check_config(config: ModelConfig) -> None:
    """Raises ConfigError for a config that is none of a model, so that nothing is built of it."""
    check_sizes(config.network, resolution=config.resolution, channels=config.channels, num_classes=config.num_classes)
    if not 0 <= config.augment_dim <= 1024:
        raise ConfigError(f"augment_dim {config.augment_dim} is impossible: 0 to 1024")
    if kind_of(config) == "denoiser":
        check_settings(config.denoiser)
    else:
        check_flow(config.flow)
    for name, values in (("class_names", config.class_names), ("class_counts", config.class_counts)):
        if values is not None and len(values) > max(config.num_classes, 1):
            raise ConfigError(f"{name} has {len(values):,} entries for {config.num_classes:,} classes")
    if config.class_counts is not None and (min(config.class_counts, default=0) < 0 or sum(config.class_counts) == 0):
        raise ConfigError("class_counts are no numbers of images")
    trained = config.training.get("config", {})
    if not isinstance(trained, dict) or not isinstance(trained.get("data", {}), dict):
        raise ConfigError("training.config holds no settings")
    if not isinstance(config.training.get("data", {}), dict):
        raise ConfigError("training.data says nothing of the data")


def load_model(path: str | os.PathLike, device: str | torch.device = "cpu") -> AnyModel:
    """The model in a file, in evaluation mode. Every tensor must be there with its shape, and none besides."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config = read_config(path)
    with without_weights():
        model = build_model(config)
    try:
        state = load_file(path, device="cpu")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    check_state(model.network.state_dict(), state, str(path))
    fill(model.network, state)
    return model.to(device).eval().requires_grad_(False)


def check_state(expected: dict[str, Tensor], found: dict[str, Tensor], name: str) -> None:
    """Raises ModelError unless both have the same keys and shapes, naming the first differences."""
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    shapes = [k for k in expected.keys() & found.keys() if expected[k].shape != found[k].shape]
    problems = [
        f"{what} {', '.join(keys[:3])}" + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
        for what, keys in (("it lacks", missing), ("it has unknown", extra), ("shapes differ for", sorted(shapes)))
        if keys
    ]
    if problems:
        raise ModelError(f"{name} does not fit its own config: {'; '.join(problems)}")


def find_model(place: str | os.PathLike, ema: str | None = None) -> Path:
    """The model file that a MODEL argument means: a file, a run folder, or a hub repository (user/name, hf://user/name).

    `ema` picks another of the averages a run keeps, such as "0.9999": `model-ema-0.9999.safetensors` beside `model.safetensors`.
    Raises ModelError saying where it looked.
    """
    name = f"model-ema-{ema}.safetensors" if ema else MODEL_FILE
    if Path(name).name != name or not name.isprintable() or len(name) > 100:
        raise ModelError(f"no average is called {shortened(ema)}: give the NAME of a model-ema-NAME.safetensors")
    path = Path(place)
    if path.is_file():
        if ema and path.name != name:
            path = path.with_name(name)
            if not path.is_file():
                raise ModelError(f"{Path(place).parent} has no {name}; {_averages(Path(place).parent)}")
        return path
    if path.is_dir():
        if (path / name).is_file():
            return path / name
        if ema:
            raise ModelError(f"{place} has no {name}; {_averages(path)}")
        raise ModelError(f"{place} is a folder without {MODEL_FILE}: it is not a run folder, or its run has not saved yet")
    repository = str(place).removeprefix("hf://")
    if str(place).startswith(("/", ".", "~")) or repository.count("/") != 1 or repository.endswith(".safetensors"):
        raise ModelError(f"there is no model at {place}: give a .safetensors file, a run folder or a hub repository user/name")
    return _download(repository, name)


def _averages(folder: Path) -> str:
    found = sorted(p.stem.removeprefix("model-ema-") for p in folder.glob("model-ema-*.safetensors"))
    return f"its other averages: {', '.join(found)}" if found else "it keeps one average only"


def _download(repository: str, name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    looked = f"there is no file or folder {repository}, and the hub repository {repository}"
    try:
        return Path(hf_hub_download(repository, name))
    except LocalEntryNotFoundError as error:
        raise ModelError(f"{looked} is not in the local cache and the hub cannot be reached") from error
    except EntryNotFoundError as error:
        raise ModelError(f"{looked} holds no {name}") from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ModelError(
            f"{looked} cannot be read ({type(error).__name__}): check the name, or log in for a private one"
        ) from error


def load(place: str | os.PathLike, *, ema: str | None = None, device: str | torch.device = "cpu") -> AnyModel:
    """Loads a model from a file, a run folder or a hub repository: a flow map (`Model`) or a `Denoiser`.

    >>> model = mmgen.load("runs/digits-imm")
    >>> images = model.sample(64, steps=2)  # uint8 [64, 1, 8, 8]
    >>> teacher = mmgen.load("teacher.safetensors")  # what `mmgen convert` wrote
    >>> x = teacher.denoise(y, sigma, condition)  # x_hat of y = x + sigma e
    """
    return load_model(find_model(place, ema), device)
