"""Denoisers: x_hat, the mean of the images that a noisy one may come from, by any network of a diffusion or flow model.

All are brought to one form (Karras et al., arXiv:2206.00364, eq. 7): with y = x + sigma e,

    x_hat(y; sigma) = c_skip(sigma) y + c_out(sigma) F(c_in(sigma) y, c_noise(sigma))

A model that was trained on z = a x + s e has y = z / a and sigma = s / a, and its c_in takes y back to z. Coefficients and
conversions are float64: where sigma is large, x_hat is a small difference of large numbers.

A student is a denoiser too. It may have randomness of its own: noise that its network is given beside the image, or dropout.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..diffusion import betas
from ..diffusion.betas import position
from ..diffusion.process import per_image
from ..errors import ConfigError
from .guidance import guided, is_single
from ..networks.keyed_dropout import dropouts, keyed_dropout
from ..networks import build_network
from ..networks.conditions import Condition
from ..system.random import normal
from ..diffusion.schedules import Schedule, ScheduleSettings, make_schedule

if TYPE_CHECKING:
    from .model import ModelConfig

BETA_D, BETA_MIN = 19.9, 0.1  # of `vp`
TIMESTEPS = 1000  # M of `vp` and `iddpm`
FLOW_START = 1e8  # sigma of `flow` at time 0, where it is infinite: z is noise to the last digit of float32


@dataclass(frozen=True)
class DenoiserSettings:
    """How a network's raw output becomes x_hat: the coordinates that it was trained in. Part of the model file.

    edm, vp, ve, iddpm: the preconditioners of Karras et al., arXiv:2206.00364, table 1. edm_cm: EDM's scalings, network time
    250 ln(sigma + 1e-44), as consistency_models has it. cm: the same time and the boundary scalings of a consistency model.
    discrete: DDPM's, timesteps 0 to num_timesteps - 1. flow: SiT's linear path, network time 1 is data, output x - e.
    schedule: what mmgen trains, on z = a x + s e of `schedule`, network time time_scale t, t = 1 is noise; of e, x, v = a e - s x
    and the velocity a' x + s' e = dz/dt it predicts one (Salimans & Ho, arXiv:2202.00512, appendix D; Lipman et al.,
    arXiv:2210.02747).
    """

    precondition: Literal["edm", "vp", "ve", "iddpm", "edm_cm", "cm", "discrete", "flow", "schedule"] = "edm"
    sigma_data: float = 0.5  # standard deviation of the data: edm, edm_cm and cm
    sigma_min: float = 0.002  # trained range of sigma, noise to signal; `discrete` has that of its betas, `flow` has all, and
    sigma_max: float = 80.0  # these are then the range of the grid `edm`
    prediction: Literal["eps", "x", "v", "velocity"] = "eps"  # the network's output: discrete and schedule, velocity this only
    betas: Literal["linear", "scaled_linear", "cosine"] = "linear"  # discrete only
    beta_start: float = 1e-4  # discrete with linear and scaled_linear
    beta_end: float = 0.02
    num_timesteps: int = 1000  # discrete
    round_time: bool = False  # discrete: the nearest timestep; else between two, linear in log sigma
    clip: bool = False  # x_hat to [-1, 1]
    clip_eps: bool = True  # ddim with clip: the noise is computed from the clipped x_hat (guided-diffusion), else not (diffusers)
    guided_channels: int | None = None  # guidance acts on the first so many channels only (DiT's and SiT's code: 3); None: on all
    schedule: ScheduleSettings | None = None  # schedule: the process that it was trained on
    time_scale: float = 1000.0  # schedule: network time = time_scale t
    noise_channels: int = 0  # of normal noise that the network is given behind the image: a student's own randomness
    noise_dropout: bool = False  # dropout stays on when sampling: likewise


class Denoiser(nn.Module):
    """A network with its preconditioning: `model.denoise(y, sigma)` is x_hat, `model.sample(...)` draws images."""

    def __init__(self, config: ModelConfig, network: nn.Module | None = None) -> None:
        super().__init__()
        self.config, self.settings = config, config.denoiser
        check_settings(self.settings)
        self.network = network or build_network(
            config.network,
            resolution=config.resolution,
            channels=config.channels,
            num_classes=config.num_classes,
            augment_dim=config.augment_dim,
            second_time=False,
            extra_channels=self.settings.noise_channels,
        )
        if self.settings.noise_dropout and dropouts(self.network) == 0:
            raise ConfigError("denoiser.noise_dropout needs a network with dropout, and this one has none or one of 0")

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.config.channels, self.config.resolution, self.config.resolution

    @property
    def range(self) -> tuple[float, float]:
        """Smallest and largest sigma that the network was trained at."""
        return sigma_range(self.settings)

    @property
    def is_random(self) -> bool:
        """Whether x_hat has randomness of its own, so that `denoise` needs `noise`."""
        return self.settings.noise_channels > 0 or self.settings.noise_dropout

    def denoise(
        self,
        y: Tensor,
        sigma: Tensor,
        condition: Condition | None = None,
        guidance: float = 1.0,
        noise: Tensor | None = None,
        *,
        clip: bool = True,
    ) -> Tensor:
        """x_hat of y = x + sigma e, in y's dtype. `clip` False: not clipped, whatever the settings say.

        y float [N, C, H, W]; sigma float64 [N], positive. `guidance` w other than 0 and 1 costs two evaluations. Outside `range`
        the formulas are continued, but timesteps and `schedule` end.
        noise: int64 [N], keys (`random.keys`) of a student's own randomness, one per image, the same for both evaluations of
        guidance. A model with such randomness raises ValueError without them, others do not look at them.
        """
        c_skip, c_out, c_in, c_noise = preconditioning(self.settings, sigma)
        exact = y.double()
        scaled = (per_image(c_in, exact) * exact).to(next(self.network.parameters()).dtype)
        if self.is_random and noise is None:
            raise ValueError("this student has randomness of its own: `noise` must be a key for each image")
        if self.settings.noise_channels:
            extra = normal(noise, (self.settings.noise_channels, *y.shape[2:]), scaled.dtype)
            scaled = torch.cat([scaled, extra], dim=1)
        masks = contextlib.nullcontext()
        if self.settings.noise_dropout:
            single = is_single(condition, guidance, self.settings.guided_channels)
            masks = keyed_dropout(self.network, noise if single else torch.cat([noise] * 2))
        with masks:
            limits = {"channels": y.shape[1], "guided_channels": self.settings.guided_channels}
            output = guided(self.network, scaled, c_noise, None, condition, guidance, **limits)
        x = per_image(c_skip, exact) * exact + per_image(c_out, exact) * output.double()
        return (x.clamp(-1, 1) if self.settings.clip and clip else x).to(y.dtype)

    def x_hat(
        self,
        z: Tensor,
        t: Tensor,
        schedule: Schedule,
        condition: Condition | None = None,
        guidance: float = 1.0,
        noise: Tensor | None = None,
    ) -> Tensor:
        """x_hat of z = alpha_t x + sigma_t e, of any schedule, in z's dtype. z float [N, C, H, W], t float64 [N].

        Where sigma_t / alpha_t is outside `range`, the nearest sigma inside is taken instead: above, with z's noise scaled down
        to it, so that t = 1, where alpha_t is 0, is the denoiser at its largest sigma. The rest as in `denoise`.
        """
        return self.denoise_within(z, schedule.alpha(t), schedule.sigma(t), condition, guidance, noise)

    def denoise_within(
        self,
        z: Tensor,
        alpha: Tensor,
        sigma: Tensor,
        condition: Condition | None = None,
        guidance: float = 1.0,
        noise: Tensor | None = None,
        *,
        clip: bool = True,
    ) -> Tensor:
        """`x_hat` of z = alpha x + sigma e, alpha and sigma float64 [N]."""
        low, high = self.range
        within = (sigma / alpha).clamp(low, high)
        scale = torch.where(sigma > high * alpha, high / sigma, 1 / alpha)
        y = per_image(scale, z.double()) * z.double()
        return self.denoise(y, within, condition, guidance, noise, clip=clip).to(z.dtype)

    def sample(self, num: int, **options: Any) -> Tensor:
        """Draws images, uint8 [num, C, H, W] on the CPU. Options: those of `sampling.SampleSettings` (steps, seed, classes,
        guidance, sampler, grid, batch_size ...)."""
        from ..sampling.drawing import SampleSettings, draw

        return draw(self, SampleSettings(**options), range(num))[0]


def check_settings(settings: DenoiserSettings) -> None:
    """Raises ConfigError for settings that contradict each other, or make no denoiser."""
    if (settings.schedule is None) == (settings.precondition == "schedule"):
        raise ConfigError(
            f"denoiser.precondition {settings.precondition!r} "
            + ("needs denoiser.schedule" if settings.schedule is None else "has no denoiser.schedule: that is for 'schedule'")
        )
    if settings.prediction == "velocity" and settings.precondition != "schedule":
        raise ConfigError("denoiser.prediction 'velocity' needs denoiser.precondition 'schedule'")
    if settings.noise_channels < 0:
        raise ConfigError(f"denoiser.noise_channels cannot be negative: {settings.noise_channels}")
    if settings.time_scale <= 0:
        raise ConfigError(f"denoiser.time_scale must be more than 0, not {settings.time_scale}")
    low, high = sigma_range(settings)
    if not 0 <= low < high:
        raise ConfigError(f"a denoiser's range of sigma must not be empty, and this one is from {low:g} to {high:g}")


def preconditioning(settings: DenoiserSettings, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(c_skip, c_out, c_in, c_noise) for sigma, all float64 [N] (Karras et al., table 1, and this module's docstring)."""
    one, time = torch.ones_like(sigma), network_time(settings, sigma)
    kind, data = settings.precondition, settings.sigma_data
    if kind in ("edm", "edm_cm", "cm"):
        power = sigma**2 + data**2
        start = settings.sigma_min if kind == "cm" else 0.0  # where x_hat is y (Song et al., arXiv:2303.01469, appendix C)
        return data**2 / ((sigma - start) ** 2 + data**2), (sigma - start) * data / power.sqrt(), 1 / power.sqrt(), time
    if kind == "ve":
        return one, sigma, one, time
    if kind == "schedule":
        return *_of_schedule(settings, sigma), time
    if kind == "flow":  # z = tau x + (1 - tau) e and output x - e, so that x = z + (1 - tau) output
        return time, 1 - time, time, time
    a = 1 / (sigma**2 + 1).sqrt()  # vp, iddpm and discrete: z = a y has a^2 + s^2 = 1
    if kind == "discrete" and settings.prediction == "x":
        return torch.zeros_like(sigma), one, a, time
    if kind == "discrete" and settings.prediction == "v":  # v = a e - s x, so that x = a z - s v
        return a**2, -sigma * a, a, time
    return one, -sigma, a, time


def _of_schedule(settings: DenoiserSettings, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(c_skip, c_out, c_in), float64 like sigma: z = a x + s e and output = p x + q e, solved for x."""
    schedule = make_schedule(settings.schedule)
    t = schedule.eta_inverse(sigma)
    a = schedule.alpha(t)
    s = sigma * a
    p, q = {
        "x": lambda: (torch.ones_like(a), torch.zeros_like(a)),
        "eps": lambda: (torch.zeros_like(a), torch.ones_like(a)),
        "v": lambda: (-s, a),
        "velocity": lambda: (schedule.d_alpha(t), schedule.d_sigma(t)),
    }[settings.prediction]()
    determinant = a * q - s * p
    return q * a / determinant, -s / determinant, a


def network_time(settings: DenoiserSettings, sigma: Tensor) -> Tensor:
    """c_noise, the time as the network is given it, for sigma; float64 of any shape."""
    kind = settings.precondition
    if kind == "edm":
        return sigma.log() / 4
    if kind in ("edm_cm", "cm"):
        return 250 * (sigma + 1e-44).log()
    if kind == "ve":
        return (sigma / 2).log()
    if kind == "schedule":
        return settings.time_scale * make_schedule(settings.schedule).eta_inverse(sigma)
    if kind == "flow":
        return 1 / (1 + sigma)
    if kind == "vp":
        return (TIMESTEPS - 1) * ((BETA_MIN**2 + 2 * BETA_D * torch.log1p(sigma**2)).sqrt() - BETA_MIN) / BETA_D
    table = sigma_table(settings, sigma.device)
    if kind == "iddpm":  # the nearest
        return position(table, sigma).round()
    time = position(table.log(), sigma.log())
    return time.round() if settings.round_time else time


def sigma_at(settings: DenoiserSettings, time: Tensor) -> Tensor:
    """The inverse of `network_time`; whole times where there are timesteps. float64 of any shape."""
    kind = settings.precondition
    if kind == "edm":
        return (4 * time).exp()
    if kind in ("edm_cm", "cm"):
        return (time / 250).exp()
    if kind == "ve":
        return 2 * time.exp()
    if kind == "schedule":
        return make_schedule(settings.schedule).eta(time / settings.time_scale)
    if kind == "flow":
        return ((1 - time) / time).clamp(max=FLOW_START)
    if kind == "vp":
        t = time / (TIMESTEPS - 1)
        return (0.5 * BETA_D * t**2 + BETA_MIN * t).expm1().sqrt()
    return sigma_table(settings, time.device)[time.round().long()]


def rounded_sigma(settings: DenoiserSettings, sigma: float) -> float:
    """The nearest sigma of a model that knows its timesteps only (iddpm, or discrete with round_time); else sigma itself."""
    if settings.precondition != "iddpm" and not (settings.precondition == "discrete" and settings.round_time):
        return sigma
    return sigma_at(settings, network_time(settings, torch.tensor(sigma, dtype=torch.float64))).item()


@lru_cache(maxsize=64)
def sigma_range(settings: DenoiserSettings) -> tuple[float, float]:
    """Smallest and largest trained sigma."""
    if settings.precondition == "flow":
        return 0.0, FLOW_START
    low, high = settings.sigma_min, settings.sigma_max
    if settings.precondition == "schedule":
        ends = make_schedule(settings.schedule).eta(torch.tensor([0.0, 1.0], dtype=torch.float64, device="cpu")).tolist()
        return max(low, ends[0]), min(high, ends[1])
    if settings.precondition in ("discrete", "iddpm"):
        table = sigma_table(settings, torch.device("cpu"))
        ends = table[0].item(), table[-1].item()
        return ends if settings.precondition == "discrete" else (max(low, ends[0]), min(high, ends[1]))
    return low, high


@lru_cache(maxsize=32)
def sigma_table(settings: DenoiserSettings, device: torch.device) -> Tensor:
    """sigma of each timestep, ascending, float64 [T]: of `discrete` from its betas, of `iddpm` EDM's u_j backwards.

    u_M = 0 and u_{j-1} = sqrt((u_j^2 + 1) / max(alpha-bar_{j-1} / alpha-bar_j, 0.001) - 1), with alpha-bar_j =
    sin^2(pi/2 j / (M 1.008)) (Karras et al., table 1); the network's time of u_j is M - 1 - j.
    """
    if settings.precondition == "iddpm":
        bar = np.sin(0.5 * math.pi * np.arange(TIMESTEPS + 1) / TIMESTEPS / 1.008) ** 2
        u = [0.0]
        for j in range(TIMESTEPS, 0, -1):
            u.append(math.sqrt((u[-1] ** 2 + 1) / max(bar[j - 1] / bar[j], 0.001) - 1))
        return torch.tensor(u[1:], dtype=torch.float64, device=device)
    return betas.sigma_table(settings.betas, settings.beta_start, settings.beta_end, settings.num_timesteps, device)
