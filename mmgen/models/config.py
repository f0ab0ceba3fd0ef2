"""What is known of a model beside its weights: the config in the header of its file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from ..diffusion.preconditioning import DenoiserSettings, check_settings
from ..diffusion.schedules import ScheduleSettings
from ..errors import ConfigError
from ..networks import NetworkSettings
from ..networks.text import TextSettings, check_text
from ..networks.limits import check_sizes
from ..diffusion.flow_map import FlowMapSettings
from ..diffusion.flow_map import check_settings as check_flow
from .latents import LatentSettings


MOST_CAPTIONS = 1000  # kept in a model file


@dataclass(frozen=True)
class SamplingSettings:
    """How a model is sampled unless the command says otherwise. `default` and None: what suits its kind."""

    sampler: Literal["default", "pushforward", "restart", "ddim", "ancestral", "heun"] = "default"
    # How times are spaced: see `sampling.flow_map_samplers` and `sigma_grids`; `schedule`: evenly in the time of `schedule` below
    grid: Literal["default", "uniform", "edm", "schedule", "linspace", "leading", "flow"] = "default"
    guidance: float = 1.0  # w of classifier-free guidance; 1 is none
    steps: int | None = None
    churn: float = 0.0  # heun only, this and what follows: S_churn of Karras et al., arXiv:2206.00364, algorithm 2
    s_tmin: float = 0.0  # sigma below which nothing is churned
    s_tmax: float | None = None  # and above which; None: no limit
    s_noise: float = 1.0  # standard deviation of the noise added
    # A student's: the process that it was distilled on, and so that of its grid. A teacher's: what its students take
    schedule: ScheduleSettings | None = None
    stochasticity: float = 1.0  # ancestral only: 1 is DDPM, 0 is DDIM: see `diffusion.posterior`
    guidance_interval: tuple[float, ...] = ()  # the sigma between which guidance acts; none: everywhere
    guidance_range: tuple[float, ...] = ()  # of a student that is told w: the least and largest that it learned
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
    text: TextSettings | None = None  # of a model that draws what a text says, which has no classes
    captions: list[str] | None = None  # of its training images, one each of at most MOST_CAPTIONS: drawn from where no prompt is given
    class_names: list[str] | None = None
    class_counts: list[int] | None = None  # images per class in the training data
    data: str = ""  # the name of the training data
    denoiser: DenoiserSettings | None = None
    latents: LatentSettings | None = None  # of a model in an autoencoder's latent space
    sampling: SamplingSettings = SamplingSettings()
    training: dict[str, Any] = field(default_factory=dict)  # provenance: settings, images seen, which EMA


def is_conditional(config: ModelConfig) -> bool:
    """Whether images are drawn of a class or a text."""
    return config.num_classes > 0 or config.text is not None


def kind_of(config: ModelConfig) -> str:
    """`imm`, a flow map, or `denoiser`. Raises ConfigError for what is neither or both."""
    if (config.flow is None) == (config.denoiser is None):
        both = "both" if config.flow else "neither"
        raise ConfigError(f"a model is a flow map or a denoiser: its config has {both} of `flow` and `denoiser`")
    return "denoiser" if config.flow is None else "imm"


def drawn_shape(config: ModelConfig) -> tuple[int, int, int]:
    """Channels, height and width of the images that are drawn: decoded ones where the model knows latents."""
    if config.latents is not None:
        return 3, config.latents.resolution, config.latents.resolution
    return config.channels, config.resolution, config.resolution


def check_config(config: ModelConfig) -> None:
    """Raises ConfigError for a config that is none of a model, so that nothing is built of it."""
    check_sizes(config.network, resolution=config.resolution, channels=config.channels, num_classes=config.num_classes)
    if not 0 <= config.augment_dim <= 1024:
        raise ConfigError(f"augment_dim {config.augment_dim} is impossible: 0 to 1024")
    if kind_of(config) == "denoiser":
        check_settings(config.denoiser)
    else:
        check_flow(config.flow)
    if config.text is not None:
        check_text(config.text)
        if config.num_classes:
            raise ConfigError("a model is conditioned on text or on classes, not on both")
    if config.captions is not None and (config.text is None or not 0 < len(config.captions) <= MOST_CAPTIONS):
        raise ConfigError(f"captions are of a model that is conditioned on text, and 1 to {MOST_CAPTIONS:,}")
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
