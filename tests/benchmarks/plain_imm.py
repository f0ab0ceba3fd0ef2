"""A step of Inductive Moment Matching (Zhou et al., arXiv:2503.07565, algorithm 1) written down formula by formula.

Nothing of mmgen's own arithmetic is used: flow map, weights and kernels stand here again, on float64 images, and the optimiser
and the average go through the parameters one by one. What is drawn comes in from outside.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mmgen.config.imm import ImmConfig

Network = Callable[..., Tensor]  # (x, t, s, label, augment) -> [N, C, R, R]


@dataclass
class Drawn:
    """What is random in a pass: noise [N, C, R, R] of variance 1; s and t float64 [G], of each group of M images."""

    noise: Tensor
    s: Tensor
    t: Tensor


def draw(config: ImmConfig, x: Tensor) -> Drawn:
    """t and s uniform (appendix C.7)."""
    flow, groups = config.flow, len(x) // config.loss.group_size
    t = flow.t_min + (flow.t_max - flow.t_min) * torch.rand(groups, dtype=torch.float64, device=x.device)
    s = flow.t_min + (t - flow.t_min) * torch.rand_like(t)
    return Drawn(torch.randn_like(x), s, t)


def earlier(config: ImmConfig, s: Tensor, t: Tensor) -> Tensor:
    """r(s, t): a constant step of 160 / 2^k back in eta = t / (1 - t), not below s (appendix C.6)."""
    eta = (t / (1 - t) - 160 / 2**config.loss.k).clamp(min=0)
    return torch.maximum(s, eta / (1 + eta))


def jump(config: ImmConfig, network: Network, x_t: Tensor, s: Tensor, t: Tensor, *conditions: Tensor | None) -> Tensor:
    """f_{s,t}(x_t) on float64 images, OT-FM, Simple-EDM or Euler-FM (section 5, appendix C.5)."""
    flow = config.flow
    s_, t_ = s[:, None, None, None], t[:, None, None, None]
    power = (1 - t_) ** 2 + t_**2
    c_in = 1 / (flow.sigma_data * power.sqrt())
    second = s if flow.second_time == "s" else t - s
    output = network((c_in * x_t).float(), flow.time_scale * t, flow.time_scale * second, *conditions).double()
    if flow.parametrization == "euler_fm":
        return x_t - (t_ - s_) * flow.sigma_data * output
    skip = ((1 - s_) * (1 - t_) + s_ * t_) / power
    return skip * x_t - flow.sigma_data * ((1 - s_) * t_ - s_ * (1 - t_)) / power.sqrt() * output


def kernel(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """The Laplace kernel of all pairs, a and b [G, M, D], weight [G] -> [G, M, M] (appendix C.8)."""
    distance = (a[:, :, None] - b[:, None]).square().sum(3).clamp(min=1e-16).sqrt()
    return torch.exp(-weight[:, None, None] * distance / a.shape[2])


def loss(
    config: ImmConfig, network: Network, x: Tensor, label: Tensor | None, augment: Tensor | None, drawn: Drawn, seed: int
) -> Tensor:
    """The mean loss of a batch (eqs. 12, 13 and 67), a float64 scalar. x float32 [N, C, R, R], consecutive M a group."""
    flow, settings = config.flow, config.loss
    x, noise = x.double(), flow.sigma_data * drawn.noise.double()
    s, t = drawn.s, drawn.t
    r = earlier(config, s, t)
    s_, r_, t_ = (time.repeat_interleave(settings.group_size) for time in (s, r, t))

    def diffused(time: Tensor) -> Tensor:
        time = time[:, None, None, None]
        return (1 - time) * x + time * noise

    torch.manual_seed(seed)
    y_t = jump(config, network, diffused(t_), s_, t_, label, augment)
    with torch.no_grad():
        torch.manual_seed(seed)  # the same dropout
        y_r = jump(config, network, diffused(r_), s_, r_, label, augment)
    y_t, y_r = (y.reshape(len(s), settings.group_size, -1) for y in (y_t, y_r))
    power = (1 - t) ** 2 + t**2
    if flow.parametrization == "euler_fm":
        scale = (t - s) * flow.sigma_data
    else:
        scale = flow.sigma_data * ((1 - s) * t - s * (1 - t)) / power.sqrt()
    near = 1 / scale.abs().clamp(min=1e-12)
    mmd = (kernel(y_t, y_t, near) + kernel(y_r, y_r, near) - 2 * kernel(y_t, y_r, near)).mean((1, 2))
    log_snr = 2 * ((1 - t) / t).log()
    weight = 0.5 * torch.sigmoid(settings.b - log_snr) * (2 / (t * (1 - t))) * (1 - t) ** settings.a / power
    return (weight * mmd).mean()


class Step:
    """The whole step: two passes, backward, clip, optimiser, average."""

    def __init__(self, config: ImmConfig, weights: dict[str, Tensor], trained: set[str], network: Callable[..., Tensor]) -> None:
        """weights: a state dict, of which `trained` are parameters; network(weights, settings, ...) is a plain network."""
        self.config = config
        self.weights = {name: value.detach().clone().requires_grad_(name in trained) for name, value in weights.items()}
        self.parameters = [self.weights[name] for name in weights if name in trained]
        self.averages = [p.detach().clone() for p in self.parameters]
        self.network = lambda *inputs: network(self.weights, config.network, *inputs)
        self.optimizer = plain_optimizer(config.optimizer, self.parameters)

    def __call__(self, x: Tensor, label: Tensor | None, augment: Tensor | None, number: int) -> float:
        value = loss(self.config, self.network, x, label, augment, draw(self.config, x), number)
        value.backward()
        clip(self.parameters, self.config.optimizer.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        average(self.averages, self.parameters, self.config.train.ema_betas[0])
        return value.item()


def plain_optimizer(settings, parameters: list[Tensor]) -> torch.optim.Optimizer:
    """One parameter after the other."""
    kind = {"radam": torch.optim.RAdam, "adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[settings.name]
    return kind(parameters, lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.eps, foreach=False)


def clip(parameters: list[Tensor], limit: float) -> None:
    """The gradient's norm to at most `limit`; 0: as it is."""
    if limit > 0:
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in parameters if p.grad is not None))
        for p in parameters:
            if p.grad is not None and norm > limit:
                p.grad.mul_(limit / norm)


@torch.no_grad()
def average(averages: list[Tensor], parameters: list[Tensor], decay: float) -> None:
    for mean, p in zip(averages, parameters, strict=True):
        mean.copy_(p.lerp(mean, decay))
