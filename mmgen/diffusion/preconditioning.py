"""Preconditioning: how a network's raw output becomes x_hat, one small class for each kind of diffusion or flow model.

All kinds have one form (Karras et al., arXiv:2206.00364, eq. 7): with y = x + sigma e,

    x_hat(y; sigma) = c_skip(sigma) y + c_out(sigma) F(c_in(sigma) y, c_noise(sigma))

A model that was trained on z = a x + s e has y = z / a and sigma = s / a, and its c_in takes y back to z. Coefficients and
conversions are float64: where sigma is large, x_hat is a small difference of large numbers.

A further kind is one class here and one line in `KINDS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import torch
from torch import Tensor

from ..errors import ConfigError
from . import betas
from .betas import PURE_NOISE, position
from .schedules import ScheduleSettings, make_schedule

BETA_D, BETA_MIN = 19.9, 0.1  # of `vp`
TIMESTEPS = 1000  # M of `vp` and `iddpm`
_WHOLE = 1e-9  # what rounding may have taken from a whole time
EDM_RANGE = 0.002, 80.0  # of sigma, from which EDM samples the models that know more: vp, ve and iddpm


@dataclass(frozen=True)
class DenoiserSettings:
    """How a network's raw output becomes x_hat: the coordinates that it was trained in. Part of the model file.

    The classes of this module say what each `precondition` is.
    """

    precondition: Kind = "edm"
    sigma_data: float = 0.5  # standard deviation of the data: edm, edm_cm and cm
    sigma_min: float = 0.002  # trained range of sigma, noise to signal; `discrete` has that of its betas, `flow` has all, and
    sigma_max: float = 80.0  # these are then the range of the grid `edm`
    prediction: Literal["eps", "x", "v", "velocity"] = "eps"  # the network's output: discrete and schedule, velocity this only
    betas: Literal["linear", "scaled_linear", "cosine"] = "linear"  # discrete only
    beta_start: float = 1e-4  # discrete with linear and scaled_linear
    beta_end: float = 0.02
    zero_snr: bool = False  # discrete: betas rescaled so that the last timestep is pure noise
    num_timesteps: int = 1000  # discrete
    # discrete: the nearest timestep; else between two, linear in log sigma. schedule: the network's time is rounded down to a
    # whole one, as diffusers' DPMSolverMultistepScheduler has it
    round_time: bool = False
    clip: bool = False  # x_hat to [-1, 1]
    clip_eps: bool = True  # ddim with clip: the noise is computed from the clipped x_hat (guided-diffusion), else not (diffusers)
    guided_channels: int | None = None  # guidance acts on the first so many channels only (DiT's and SiT's code: 3); None: on all
    schedule: ScheduleSettings | None = None  # schedule: the process that it was trained on
    time_scale: float = 1000.0  # schedule: network time = time_scale t
    noise_channels: int = 0  # of normal noise that the network is given behind the image: a student's own randomness
    noise_dropout: bool = False  # dropout stays on when sampling: likewise
    told_guidance: bool = False  # of a student: its network's second time is the guidance w, time_scale (w - 1)


class Preconditioning:
    """A kind of model. `kind(sigma)` is (c_skip, c_out, c_in, c_noise), all float64 like sigma."""

    sampler = "heun"  # the usual one
    grid = "edm"  # the usual grid of any sampler but heun, whose is edm
    is_consistency = False  # it jumps to sigma_min and gives no mean of images
    far = False  # on its own grid the first step is from a sigma of hundreds or more
    variance_preserving = False  # its z has the variance 1, so that sampling starts from z = noise
    num_timesteps: int | None = None  # of a model that knows whole timesteps

    def __init__(self, settings: DenoiserSettings) -> None:
        self.settings = settings

    def __call__(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return *self.coefficients(sigma), self.time(sigma)

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(c_skip, c_out, c_in)."""
        raise NotImplementedError

    def time(self, sigma: Tensor) -> Tensor:
        """c_noise, the time as the network is given it."""
        raise NotImplementedError

    def sigma(self, time: Tensor) -> Tensor:
        """The inverse of `time`; whole times where there are timesteps."""
        raise NotImplementedError

    @cached_property
    def range(self) -> tuple[float, float]:
        """Smallest and largest trained sigma."""
        return self.settings.sigma_min, self.settings.sigma_max

    @property
    def edm_range(self) -> tuple[float, float]:
        """Largest part of the range that the grid `edm` has."""
        return self.settings.sigma_min, self.settings.sigma_max

    @property
    def process(self) -> ScheduleSettings:
        """The schedule that it was trained on; EDM's grid, from the ends of the range, for what was trained on y = x + sigma e."""
        low, high = self.range
        return ScheduleSettings("edm", sigma_min=low, sigma_max=high)

    @property
    def data_std(self) -> float:
        """The standard deviation of the data that it is made for."""
        return 1.0

    def rounded(self, sigma: float) -> float:
        """The nearest sigma that the network knows."""
        return sigma

    def even_times(self, count: int, high: float, low: float) -> Tensor:
        """Network times evenly spaced between sigma high and low, float64 [count], the noisiest first."""
        ends = self.time(torch.tensor([high, low], dtype=torch.float64))
        return ends[0] + torch.arange(count, dtype=torch.float64) / max(count - 1, 1) * (ends[1] - ends[0])


class EDM(Preconditioning):
    """EDM (Karras et al., arXiv:2206.00364, table 1)."""

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self._from(0.0, sigma)

    def _from(self, start: float, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x_hat is y at sigma = start."""
        data = self.settings.sigma_data
        power = sigma**2 + data**2
        return data**2 / ((sigma - start) ** 2 + data**2), (sigma - start) * data / power.sqrt(), 1 / power.sqrt()

    def time(self, sigma: Tensor) -> Tensor:
        return sigma.log() / 4

    def sigma(self, time: Tensor) -> Tensor:
        return (4 * time).exp()

    @property
    def data_std(self) -> float:
        return self.settings.sigma_data


class EDMOfConsistencyModels(EDM):
    """EDM's scalings with network time 250 ln(sigma + 1e-44), as consistency_models has it."""

    def time(self, sigma: Tensor) -> Tensor:
        return 250 * (sigma + 1e-44).log()

    def sigma(self, time: Tensor) -> Tensor:
        return (time / 250).exp()


class Consistency(EDMOfConsistencyModels):
    """A consistency model, whose x_hat at sigma_min is y (Song et al., arXiv:2303.01469, appendix C)."""

    sampler, is_consistency = "restart", True

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self._from(self.settings.sigma_min, sigma)


class VE(Preconditioning):
    """Song et al.'s variance-exploding SDE (Karras et al., table 1)."""

    edm_range = EDM_RANGE

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        one = torch.ones_like(sigma)
        return one, sigma, one

    def time(self, sigma: Tensor) -> Tensor:
        return (sigma / 2).log()

    def sigma(self, time: Tensor) -> Tensor:
        return 2 * time.exp()


class VP(Preconditioning):
    """Song et al.'s variance-preserving SDE (Karras et al., table 1): the output is e of z = a y, a^2 + s^2 = 1."""

    edm_range = EDM_RANGE

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ones_like(sigma), -sigma, 1 / (sigma**2 + 1).sqrt()

    def time(self, sigma: Tensor) -> Tensor:
        return (TIMESTEPS - 1) * ((BETA_MIN**2 + 2 * BETA_D * torch.log1p(sigma**2)).sqrt() - BETA_MIN) / BETA_D

    def sigma(self, time: Tensor) -> Tensor:
        t = time / (TIMESTEPS - 1)
        return (0.5 * BETA_D * t**2 + BETA_MIN * t).expm1().sqrt()

    @property
    def process(self) -> ScheduleSettings:
        return ScheduleSettings("ddpm_linear")


class IDDPM(VP):
    """EDM's reading of iDDPM (Karras et al., table 1): the nearest of its timesteps. Its process is nearly the cosine one."""

    num_timesteps = TIMESTEPS

    def table(self, device: torch.device) -> Tensor:
        return betas.iddpm_table(TIMESTEPS, device)

    def time(self, sigma: Tensor) -> Tensor:
        return position(self.table(sigma.device), sigma).round()

    def sigma(self, time: Tensor) -> Tensor:
        return self.table(time.device)[time.round().long()]

    def rounded(self, sigma: float) -> float:
        return self.sigma(self.time(torch.tensor(sigma, dtype=torch.float64))).item()

    @cached_property
    def range(self) -> tuple[float, float]:
        low, *_, high = self.table(torch.device("cpu")).tolist()
        return max(self.settings.sigma_min, low), min(self.settings.sigma_max, high)

    @property
    def process(self) -> ScheduleSettings:
        return ScheduleSettings("vp_cosine")


class Discrete(IDDPM):
    """DDPM's betas, timesteps 0 to num_timesteps - 1 (Ho et al., arXiv:2006.11239); the output is e, x or v = a e - s x."""

    sampler, grid, far, variance_preserving = "ddim", "uniform", True, True

    @property
    def num_timesteps(self) -> int:
        return self.settings.num_timesteps

    @property
    def edm_range(self) -> tuple[float, float]:
        return self.settings.sigma_min, self.settings.sigma_max

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        one, a = torch.ones_like(sigma), 1 / (sigma**2 + 1).sqrt()
        if self.settings.prediction == "x":
            return torch.zeros_like(sigma), one, a
        if self.settings.prediction == "v":  # x = a z - s v
            return a**2, -sigma * a, a
        return one, -sigma, a

    def table(self, device: torch.device) -> Tensor:
        """sigma of each timestep, ascending, float64 [num_timesteps]."""
        given = self.settings
        return betas.sigma_table(given.betas, given.beta_start, given.beta_end, given.num_timesteps, device, given.zero_snr)

    def time(self, sigma: Tensor) -> Tensor:
        """Between two timesteps linear in log sigma."""
        time = position(self.table(sigma.device).log(), sigma.log())
        return time.round() if self.settings.round_time else time

    def rounded(self, sigma: float) -> float:
        return super().rounded(sigma) if self.settings.round_time else sigma

    @cached_property
    def range(self) -> tuple[float, float]:
        low, *_, high = self.table(torch.device("cpu")).tolist()
        return low, high

    @property
    def process(self) -> ScheduleSettings:
        """Its own timesteps, whatever the betas, so that diffusers' schedulers draw from a student as mmgen does."""
        given = self.settings
        return ScheduleSettings(
            "discrete", betas=given.betas, beta_start=given.beta_start, beta_end=given.beta_end,
            num_timesteps=given.num_timesteps, zero_snr=given.zero_snr,
        )  # fmt: skip

    def even_times(self, count: int, high: float, low: float) -> Tensor:
        """Every T/n-th timestep, beginning with the last one, T - 1 (Lin et al., arXiv:2305.08891, table 2, "trailing")."""
        return (self.num_timesteps * (1 - torch.arange(count, dtype=torch.float64) / count)).round() - 1


class Flow(Preconditioning):
    """SiT's linear path z = tau x + (1 - tau) e (Ma et al., arXiv:2401.08740): network time tau, 1 is data; the output is x - e."""

    sampler, grid, far = "ddim", "uniform", True

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tau = self.time(sigma)
        return tau, 1 - tau, tau  # x = z + (1 - tau) output

    def time(self, sigma: Tensor) -> Tensor:
        return 1 / (1 + sigma)

    def sigma(self, time: Tensor) -> Tensor:
        return ((1 - time) / time).clamp(max=PURE_NOISE)

    @cached_property
    def range(self) -> tuple[float, float]:
        return 0.0, PURE_NOISE

    @property
    def process(self) -> ScheduleSettings:
        return ScheduleSettings("fm")

    def even_times(self, count: int, high: float, low: float) -> Tensor:
        return torch.arange(count, dtype=torch.float64) / count


class Process(Preconditioning):
    """What mmgen trains: z = a x + s e of `schedule`, network time time_scale t, t = 1 is noise.

    The output is e, x, v = a e - s x (Salimans & Ho, arXiv:2202.00512, appendix D) or the velocity a' x + s' e = dz/dt (Lipman et
    al., arXiv:2210.02747).
    """

    sampler, grid = "ddim", "uniform"

    @property
    def edm_range(self) -> tuple[float, float]:
        return self.settings.sigma_min, min(self.settings.sigma_max, EDM_RANGE[1])

    @property
    def process(self) -> ScheduleSettings:
        return self.settings.schedule

    @property
    def variance_preserving(self) -> bool:
        return make_schedule(self.process).keeps == "variance"

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z = a x + s e and output = p x + q e, solved for x."""
        schedule = make_schedule(self.process)
        t = schedule.eta_inverse(sigma)
        a = schedule.alpha(t)
        s = sigma * a
        p, q = {
            "x": lambda: (torch.ones_like(a), torch.zeros_like(a)),
            "eps": lambda: (torch.zeros_like(a), torch.ones_like(a)),
            "v": lambda: (-s, a),
            "velocity": lambda: (schedule.d_alpha(t), schedule.d_sigma(t)),
        }[self.settings.prediction]()
        determinant = a * q - s * p
        return q * a / determinant, -s / determinant, a

    def time(self, sigma: Tensor) -> Tensor:
        time = self.settings.time_scale * make_schedule(self.process).eta_inverse(sigma)
        return (time + _WHOLE).floor() if self.settings.round_time else time

    def sigma(self, time: Tensor) -> Tensor:
        return make_schedule(self.process).eta(time / self.settings.time_scale)

    @cached_property
    def range(self) -> tuple[float, float]:
        ends = make_schedule(self.process).eta(torch.tensor([0.0, 1.0], dtype=torch.float64, device="cpu")).tolist()
        return max(self.settings.sigma_min, ends[0]), min(self.settings.sigma_max, ends[1])


KINDS: dict[str, type[Preconditioning]] = {
    "edm": EDM, "vp": VP, "ve": VE, "iddpm": IDDPM, "edm_cm": EDMOfConsistencyModels, "cm": Consistency, "discrete": Discrete,
    "flow": Flow, "schedule": Process,
}  # fmt: skip
Kind = Literal[tuple(KINDS)]


@lru_cache(maxsize=64)
def preconditioning(settings: DenoiserSettings) -> Preconditioning:
    """The kind of model that the settings name."""
    return KINDS[settings.precondition](settings)


def check_settings(settings: DenoiserSettings) -> None:
    """Raises ConfigError for settings that contradict each other, or make no denoiser."""
    if (settings.schedule is None) == (settings.precondition == "schedule"):
        raise ConfigError(
            f"denoiser.precondition {settings.precondition!r} "
            + ("needs denoiser.schedule" if settings.schedule is None else "has no denoiser.schedule: that is for 'schedule'")
        )
    if settings.prediction == "velocity" and settings.precondition != "schedule":
        raise ConfigError("denoiser.prediction 'velocity' needs denoiser.precondition 'schedule'")
    if settings.zero_snr and (settings.precondition != "discrete" or settings.prediction == "eps"):
        raise ConfigError(
            "denoiser.zero_snr needs denoiser.precondition 'discrete' and prediction 'v' or 'x': where there is no signal, the "
            "noise (eps) says nothing of the image"
        )
    if settings.noise_channels < 0:
        raise ConfigError(f"denoiser.noise_channels cannot be negative: {settings.noise_channels}")
    if settings.time_scale <= 0:
        raise ConfigError(f"denoiser.time_scale must be more than 0, not {settings.time_scale}")
    low, high = preconditioning(settings).range
    if not 0 <= low < high:
        raise ConfigError(f"a denoiser's range of sigma must not be empty, and this one is from {low:g} to {high:g}")
