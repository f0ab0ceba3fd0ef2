"""The losses of moment matching distillation against closed forms, double backward passes and simulation, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from exact import Exact
from torch import Tensor, nn
from torch.func import functional_call

from mmgen.models.denoiser import Denoiser, DenoiserSettings
from mmgen.losses.moment_matching import (
    MomentSettings,
    auxiliary_loss,
    distance,
    draw_target,
    draw_times,
    finite_derivative,
    forward_derivative,
    instant_loss,
    lacks_forward_mode,
    mean_squares,
    moment_gap,
    preconditioned,
    student_loss,
    teacher_gradient,
)
from mmgen.models.config import ModelConfig
from mmgen.networks.conditions import Labels
from mmgen.networks import ADMSettings, DiTSettings, EDM2Settings, UNetSettings, UViTSettings
from mmgen.system.random import keys, normal, uniform
from mmgen.diffusion.schedules import ScheduleSettings, make_schedule

COSINE = make_schedule(ScheduleSettings("vp_cosine"))
MANY = 200_000


def key(purpose: int, count: int = MANY) -> Tensor:
    return keys(0, torch.arange(count), purpose)


# ---- times


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_times(steps):
    """s is uniform, t - s uniform up to 1/k, cut at 1, which happens in one draw of 2k: integral of P(delta > 1 - s) over s."""
    s, t = draw_times(steps, key(1))
    assert s.dtype == t.dtype == torch.float64 and (s > 0).all() and (s < t).all() and (t <= 1).all()
    probability = 1 / (2 * steps)
    error = math.sqrt(probability * (1 - probability) / MANY)
    assert abs((t == 1).double().mean().item() - probability) < 4 * error
    ordered = s.sort().values  # Kolmogorov and Smirnov's distance to the uniform distribution: a logit-normal s has 0.14
    assert (ordered - torch.arange(MANY) / MANY).abs().max() < 2 / math.sqrt(MANY)
    gap = (t - s)[s < 1 - 1 / steps] * steps
    if len(gap):
        ordered = gap.sort().values
        assert (ordered - torch.arange(len(gap)) / len(gap)).abs().max() < 2 / math.sqrt(len(gap))


# ---- z_s


def chain(purpose: int) -> tuple[Tensor, Tensor, Tensor]:
    """x ~ N(0.3, 0.6^2), z_s and z_t by the Markov chain of the diffusion: s = 0.4, t = 0.7, written out. [MANY] each."""
    first, second, third = normal(key(purpose), (3,), torch.float64).unbind(1)
    alpha = [math.cos(0.5 * math.pi * t) for t in (0.4, 0.7)]
    sigma = [math.sin(0.5 * math.pi * t) for t in (0.4, 0.7)]
    x = 0.3 + 0.6 * first
    z_s = alpha[0] * x + sigma[0] * second
    step = alpha[1] / alpha[0]
    z_t = step * z_s + math.sqrt(sigma[1] ** 2 - step**2 * sigma[0] ** 2) * third
    return x, z_s, z_t


def second_moments(*columns: Tensor) -> Tensor:
    return torch.stack([a * b for i, a in enumerate(columns) for b in columns[i:]]).mean(1)


def drawn(settings: MomentSettings, x: Tensor, z_t: Tensor) -> Tensor:
    s, t = (torch.full((len(x),), time, dtype=torch.float64) for time in (0.4, 0.7))
    return draw_target(settings, COSINE, s, t, z_t[:, None], x[:, None], key(3))[:, 0]


def test_target_is_distributed_as_in_the_diffusion():
    """(x, z_s, z_t) has the moments of the Markov chain, those of z_s with z_t among them; partial noise keeps those of z_s.

    The standard deviation sigma_t / sigma_s for sigma_{t|s}, of a public re-implementation, misses by 0.1.
    """
    x, z_s, z_t = chain(1)
    wanted = second_moments(x, z_s, z_t)
    tolerance = 4 / math.sqrt(MANY)
    found = drawn(MomentSettings(), x, z_t)
    assert (second_moments(x, found, z_t) - wanted).abs().max() < tolerance
    partial = drawn(MomentSettings(stochasticity=0.5), x, z_t)
    assert (second_moments(x, partial) - second_moments(x, z_s)).abs().max() < tolerance
    assert (second_moments(x, partial, z_t) - wanted).abs().max() > 10 * tolerance  # nearer to z_t, as intended
    alone = drawn(MomentSettings(posterior="unconditional"), x, z_t)
    assert (second_moments(x, alone) - second_moments(x, z_s)).abs().max() < tolerance
    assert torch.equal(alone, drawn(MomentSettings(posterior="unconditional"), x, 0 * z_t))

    step, sigma = math.cos(0.35 * math.pi) / math.cos(0.2 * math.pi), (math.sin(0.2 * math.pi), math.sin(0.35 * math.pi))
    variance = 1 / (1 / sigma[0] ** 2 + step**2 * (sigma[0] / sigma[1]) ** 2)
    noise = math.sqrt(variance) * normal(key(4), (), torch.float64)
    wrong = variance * (step * (sigma[0] / sigma[1]) ** 2 * z_t + math.cos(0.2 * math.pi) / sigma[0] ** 2 * x) + noise
    assert (second_moments(x, wrong, z_t) - wanted).abs().max() > 10 * tolerance


def test_target_has_no_gradient_and_keeps_the_dtype():
    s, t = draw_times(4, key(1, 6))
    z_t, x = (torch.randn(6, 1, 2, 2).requires_grad_() for _ in range(2))
    z_s = draw_target(MomentSettings(), COSINE, s, t, z_t, x, key(2, 6))
    assert not z_s.requires_grad and z_s.dtype == torch.float32
    exact = draw_target(MomentSettings(), COSINE, s, t, z_t.double(), x.double(), key(2, 6))
    assert torch.equal(z_s, exact.float())  # the arithmetic is float64


# ---- algorithm 2


def test_auxiliary_optimum_is_half_way():
    """z_s takes four values, so that g_phi is a table of four images: the exact minimum by one Newton step of the quadratic."""
    generator = torch.Generator().manual_seed(0)
    group = torch.randint(4, (60,), generator=generator)
    x_tilde = torch.randn(60, 1, 2, 2, generator=generator, dtype=torch.float64) + group[:, None, None, None]
    teacher = torch.randn(4, 1, 2, 2, generator=generator, dtype=torch.float64)
    w = (0.5 + group.double()) ** 2  # as w(s), a function of what g_phi is told

    def loss(table: Tensor) -> Tensor:
        return auxiliary_loss(x_tilde, table.reshape(teacher.shape)[group], teacher[group], w).mean()

    start = torch.zeros(16, dtype=torch.float64)
    gradient = torch.autograd.functional.jacobian(loss, start)
    hessian = torch.autograd.functional.hessian(loss, start)
    best = (start - torch.linalg.solve(hessian, gradient)).reshape(teacher.shape)
    means = torch.stack([x_tilde[group == i].mean(0) for i in range(4)])
    torch.testing.assert_close(best, (means + teacher) / 2)
    gap = (means - teacher).flatten(1).square().mean(1).sqrt()
    torch.testing.assert_close(moment_gap(best, teacher), gap)
    torch.testing.assert_close(distance(best, means), gap / 2)


def test_losses_and_where_their_gradients_go():
    generator = torch.Generator().manual_seed(0)
    x, phi, theta = (torch.randn(5, 2, 3, 3, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3))
    w = torch.rand(5, generator=generator, dtype=torch.float64)
    loss = auxiliary_loss(x, phi, theta, w)
    expected = w * ((x - phi) ** 2 + (theta - phi) ** 2).sum((1, 2, 3))
    torch.testing.assert_close(loss, expected)
    loss.sum().backward()
    torch.testing.assert_close(phi.grad, -2 * w[:, None, None, None] * (x + theta - 2 * phi).detach())
    assert x.grad is None and theta.grad is None
    phi.grad = None
    loss = student_loss(x, phi, theta, w)
    torch.testing.assert_close(loss, w * (x * (phi - theta)).sum((1, 2, 3)))
    loss.sum().backward()
    torch.testing.assert_close(x.grad, (w[:, None, None, None] * (phi - theta)).detach())
    assert phi.grad is None and theta.grad is None
    for function in (auxiliary_loss, student_loss):  # the mean over pixels is another loss: 18 times less
        torch.testing.assert_close(function(x, phi, theta, w, "sum"), 18 * function(x, phi, theta, w, "mean"))
    x.grad = None
    instant_loss(x, theta, phi, w).sum().backward()
    torch.testing.assert_close(x.grad, (w[:, None, None, None] * phi).detach())
    assert phi.grad is None and theta.grad is None


# ---- algorithm 3


def mlp(seed: int, *widths: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = [layer for a, b in zip(widths, widths[1:]) for layer in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).double()


class Toy:
    """A teacher and a student of points in the plane, as networks of (point, time), and two independent minibatches."""

    def __init__(self) -> None:
        self.teacher, self.student = mlp(0, 3, 16, 16, 2), mlp(1, 3, 8, 2)
        self.parameters = {name: value.detach() for name, value in self.teacher.named_parameters()}
        generator = torch.Generator().manual_seed(2)
        self.moments = {n: torch.rand(p.shape, generator=generator, dtype=torch.float64) for n, p in self.parameters.items()}

    def batch(self, purpose: int, count: int = 32) -> tuple[Tensor, Tensor, Tensor]:
        """x~ with gradient, (z_s, s) and w(s)."""
        s, t = draw_times(2, key(purpose, count))
        z_t = normal(key(purpose + 1, count), (2,), torch.float64)
        x_tilde = self.student(torch.cat([z_t, t[:, None]], 1))
        z_s = draw_target(MomentSettings(), COSINE, s, t, z_t, x_tilde, key(purpose + 2, count))
        return x_tilde, torch.cat([z_s, s[:, None]], 1), 1 / COSINE.sigma(s) ** 2

    def g(self, inputs: Tensor):
        return lambda parameters: functional_call(self.teacher, parameters, (inputs,))

    def gradients(self, loss: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(self.student.parameters()), retain_graph=True)])

    def double_backward(self, moments: dict[str, Tensor] | None) -> tuple[Tensor, Tensor]:
        """1/2 <Lambda grad L_A, grad L_B> by two backward passes, and its gradient through x~ of B, which L_B contains."""
        products = []
        first, second = self.batch(10), self.batch(20)
        free = list(self.teacher.parameters())
        names = [name for name, _ in self.teacher.named_parameters()]
        for (x_tilde, inputs, w), keep in ((first, False), (second, True)):
            x_tilde = x_tilde if keep else x_tilde.detach()
            loss = (w * ((x_tilde - self.teacher(inputs)) ** 2).sum(1)).mean()
            products.append(torch.autograd.grad(loss, free, create_graph=keep))
        scale = [1.0 if moments is None else 1 / (moments[name].sqrt() + 1e-8) for name in names]
        value = 0.5 * sum((c * a * b).sum() for c, a, b in zip(scale, *products))
        return value, self.gradients(value)

    def instant(self, derivative, moments: dict[str, Tensor] | None) -> tuple[Tensor, Tensor]:
        x_tilde, inputs, w = self.batch(10)
        nu = preconditioned(teacher_gradient(self.g(inputs), self.parameters, x_tilde, w), moments)
        x_tilde, inputs, w = self.batch(20)
        value = instant_loss(x_tilde, *derivative(self.g(inputs), self.parameters, nu), w).mean()
        return value, self.gradients(value)


@pytest.mark.parametrize("preconditioner", ["identity", "adam"])
@pytest.mark.parametrize(("derivative", "tolerance"), [(forward_derivative, 1e-12), (finite_derivative, 1e-6)])
def test_instant_gradient_is_that_of_double_backward(preconditioner, derivative, tolerance):
    toy = Toy()
    moments = toy.moments if preconditioner == "adam" else None
    value, gradient = toy.instant(derivative, moments)
    wanted_value, wanted = toy.double_backward(moments)
    assert (gradient - wanted).norm() < tolerance * wanted.norm()
    assert abs(value - wanted_value) < tolerance * abs(wanted_value)
    other, _ = toy.instant(derivative, None if moments else toy.moments)
    assert abs(other - wanted_value) > 0.1 * abs(wanted_value)  # the preconditioner matters
    assert all(parameter.grad is None for parameter in toy.teacher.parameters())


def test_one_minibatch_for_both_is_biased():
    """Images that the teacher's mean fits: E grad L = 0. Two independent minibatches estimate 0; one shared does not."""
    toy = Toy()
    count, size = 400, 16
    inputs = torch.cat([normal(key(1, count * size), (2,), torch.float64), uniform(key(2, count * size), (1,))], 1)
    with torch.no_grad():
        x_tilde = toy.teacher(inputs) + normal(key(3, count * size), (2,), torch.float64)
    w = torch.ones(size, dtype=torch.float64)
    gradients, losses = [], {"independent": [], "shared": []}
    for batch, x in zip(inputs.split(size), x_tilde.split(size)):
        gradients.append(teacher_gradient(toy.g(batch), toy.parameters, x, w))
    for i in range(count):
        batch, x = inputs.split(size)[i], x_tilde.split(size)[i]
        for name, other in (("independent", (i + 1) % count), ("shared", i)):
            value, along = forward_derivative(toy.g(batch), toy.parameters, preconditioned(gradients[other]))
            losses[name].append(instant_loss(x, value, along, w).mean())
    independent, shared = (torch.stack(losses[name]) for name in ("independent", "shared"))
    error = independent.std() / math.sqrt(count)
    assert abs(independent.mean()) < 4 * error and shared.mean() > 20 * error
    half = torch.stack([0.5 * torch.nn.utils.get_total_norm(gradient.values()) ** 2 for gradient in gradients])
    torch.testing.assert_close(shared, half)  # what it is: half a squared norm, whose mean is not that of the mean


def test_second_moments_that_do_not_fit_are_refused():
    """No identity in the place of a preconditioner that is not there."""
    gradient = {"a": torch.ones(2), "b": torch.ones(1)}
    with pytest.raises(ValueError, match="other parameters"):
        preconditioned(gradient, {"a": torch.ones(2)})
    with pytest.raises(ValueError, match="other parameters"):
        preconditioned(gradient, {})
    with pytest.raises(ValueError, match="at least one"):
        mean_squares([])
    moments = mean_squares([{"a": torch.tensor([1.0, 3.0])}, {"a": torch.tensor([2.0, -1.0])}])
    assert torch.equal(moments["a"], torch.tensor([2.5, 5.0]))
    found = preconditioned({"a": torch.tensor([1.0, 1.0, 0.0])}, {"a": torch.tensor([4.0, torch.inf, 0.0])})["a"]
    torch.testing.assert_close(found, torch.tensor([-0.5, 0.0, 0.0]))


# ---- derivatives through networks


NETWORKS = {
    "unet": UNetSettings(model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), dropout=0.1),
    "adm": ADMSettings(
        model_channels=32, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), channels_per_head=16, dropout=0.1
    ),
    "dit": DiTSettings(hidden_size=32, depth=2, num_heads=2, patch_size=2),
    "edm2": EDM2Settings(model_channels=16, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), channels_per_head=16),
    "uvit": UViTSettings(model_channels=16, channel_mult=(1, 2), num_blocks=(1,), depth=1, channels_per_head=16, emb_channels=32),
}


def small(kind: str) -> Denoiser:
    denoiser = DenoiserSettings("schedule", prediction="v", schedule=ScheduleSettings())
    torch.manual_seed(0)
    model = Denoiser(ModelConfig(NETWORKS[kind], None, 8, 1, num_classes=3, denoiser=denoiser)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.requires_grad_(False)


class XHat(nn.Module):
    def __init__(self, model: Denoiser) -> None:
        super().__init__()
        self.model = model

    def forward(self, *arguments) -> Tensor:
        return self.model.x_hat(*arguments)


@pytest.mark.parametrize("kind", NETWORKS)
def test_forward_mode_through_every_network(kind):
    """Attention included, with guidance: <u, J nu> by forward-mode AD is <J' u, nu> by a backward pass, and central differences
    come near. In float64, but for EDM2's norms of weights, which are float32: there each output has some 1e-7 of rounding."""
    model, rounding = small(kind), 1e-6 if kind == "edm2" else 1e-12
    model.network = Exact(model.network)
    module = XHat(model)
    parameters = {name: value.detach() for name, value in module.named_parameters()}
    generator = torch.Generator().manual_seed(2)
    direction = {name: torch.randn(value.shape, generator=generator) for name, value in parameters.items()}
    z = torch.randn(3, 1, 8, 8, generator=generator, dtype=torch.float64)
    arguments = z, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), COSINE, Labels(torch.tensor([0, 1, 2]), 3), 1.5

    def g(values):
        return functional_call(module, values, arguments)

    assert lacks_forward_mode(g, parameters) is None
    value, exact = forward_derivative(g, parameters, direction)
    assert (value - module(*arguments)).abs().max() < rounding  # another kernel of attention
    free = {name: tensor.clone().requires_grad_() for name, tensor in parameters.items()}
    for u in torch.randn(3, *z.shape, generator=generator, dtype=torch.float64):
        backward = torch.autograd.grad((g(free) * u).sum(), list(free.values()), allow_unused=True)
        wanted = sum((a * b).sum() for a, b in zip(backward, direction.values()) if a is not None)
        assert abs((exact * u).sum() - wanted) < 10 * rounding * exact.norm()
    step, near = (6e-3, 0.02) if kind == "edm2" else (None, 1e-6)
    middle, difference = finite_derivative(g, parameters, direction, step)
    assert (difference - exact).norm() < near * exact.norm() and (middle - value).norm() < near * value.norm()


class Squared(torch.autograd.Function):
    """An operation without a forward-mode rule."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


def test_network_without_forward_mode():
    x = torch.tensor([[0.3, -0.4]], dtype=torch.float64)
    parameters, direction = {"a": torch.tensor([2.0, 3.0], dtype=torch.float64)}, {"a": torch.tensor([1.0, -1.0]).double()}

    def g(values):
        return Squared.apply(values["a"]) * x

    assert "jvp" in lacks_forward_mode(g, parameters)
    with pytest.raises(NotImplementedError):
        forward_derivative(g, parameters, direction)
    _, found = finite_derivative(g, parameters, direction)
    torch.testing.assert_close(found, 2 * parameters["a"] * direction["a"] * x, rtol=1e-8, atol=0)
    with pytest.raises(RuntimeError, match="size"):  # another error is not taken for that
        lacks_forward_mode(lambda values: values["a"] @ torch.ones(3, dtype=torch.float64), parameters)


def test_finite_differences_are_taken_in_full_precision():
    """bfloat16 has a spacing of 2^-8, in which a step of 5e-3 drowns; torch's settings are left as they were."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 4))
    parameters = {name: value.detach() for name, value in network.named_parameters()}
    direction = {name: torch.randn_like(value) for name, value in parameters.items()}
    x = torch.randn(8, 4)

    def g(values):
        return functional_call(network, values, (x,))

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        _, exact = forward_derivative(g, parameters, direction)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            _, found = finite_derivative(g, parameters, direction)
            _, half = forward_derivative(g, parameters, direction)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert (found - exact).norm() < 2e-3 * exact.norm() < (half - exact).norm()
    zero = {name: torch.zeros_like(value) for name, value in direction.items()}
    assert not finite_derivative(g, parameters, zero)[1].any()  # no step at all, and no division by it
