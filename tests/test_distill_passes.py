"""Passes of distillation against their definitions, and the networks that take part."""

from dataclasses import replace

import pytest
import torch
from toy_distill import COSINE, V, One, config_for, digits, grads, no_inception, perturb, place, task_for  # noqa: F401
from torch.nn.attention import SDPBackend, sdpa_kernel
from toy_task import Quiet

from mmgen import data
from mmgen.models.denoiser import Denoiser
from mmgen.losses.moment_matching import finite_derivative, forward_derivative
from mmgen.models.files import read_config, save_model
from mmgen.networks import UNetSettings
from mmgen.networks.conditions import Labels
from mmgen.system.random import keys
from mmgen.methods.distill import instant, matching
from mmgen.methods.distill.alternating import turn
from mmgen.methods.distill.method import copy_of, distill_task, find_teacher, student_model_config


# ---------------------------------------------------------------------- one pass, by the definitions


def textbook(objective, batch, k):
    """(x~, z_s, s, w, label) of a pass in float64 by page 1.2 and 1.5: alpha = cos, sigma = sin, posterior by its precision."""
    used = objective.matching
    u = matching.uniform(keys(0, batch.index, matching._TIME), (2,))
    s, t = u[:, 0], (u[:, 0] + u[:, 1] / k).clamp(max=1)

    def at(time):
        angle = torch.pi / 2 * time[:, None, None, None]
        return torch.cos(angle), torch.sin(angle)

    (a_s, s_s), (a_t, s_t) = at(s), at(t)
    x = batch.images.double() / 127.5 - 1
    z_t = a_t * x + s_t * matching.normal(keys(0, batch.index, matching._NOISE), x.shape[1:], torch.float64)
    x_tilde = used.student.x_hat(z_t, t, used.schedule, batch.condition)
    ratio = a_t / a_s
    jump = s_t**2 - ratio**2 * s_s**2  # sigma_{t|s}^2
    variance = 1 / (1 / s_s**2 + ratio**2 / jump)
    mean = variance * (ratio / jump * z_t + a_s / s_s**2 * x_tilde)
    noise = matching.normal(keys(0, batch.index, matching._TARGET), x.shape[1:], torch.float64)
    sigma = (torch.tan(torch.pi / 2 * s)).clamp(0.002, 80.0)
    return x_tilde, (mean + variance.sqrt() * noise).detach(), s, sigma**-2 + 1, batch.condition


def close(a, b, tolerance=1e-4):
    assert (a - b).norm() <= tolerance * b.norm(), ((a - b).norm() / b.norm()).item()


def test_the_students_gradient_is_that_of_algorithm_2(place):
    task, teacher = task_for(place, **{"student.steps": 3})
    objective = task.trained["student"].objective
    (auxiliary,) = objective._others
    perturb(auxiliary.network)
    batch = digits()
    loss, numbers = objective(batch)
    x_tilde, z_s, s, w, label = textbook(objective, batch, 3)
    with torch.no_grad():
        g_phi, g_theta = (m.x_hat(z_s, s, objective.matching.schedule, label) for m in (auxiliary, teacher.model))
    expected = (w * (x_tilde * (g_phi - g_theta)).sum((1, 2, 3))).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3, abs=1e-3)
    close(grads(loss, objective.student.network), grads(expected, objective.student.network))
    rms = (g_phi - g_theta).square().mean((1, 2, 3)).sqrt()
    assert (numbers["moment_gap"][0] / numbers["moment_gap"][1]).item() == pytest.approx(2 * rms.mean().item(), rel=1e-3)
    assert numbers["moment_gap_by_noise"][1].sum() == 16
    level = torch.bucketize(torch.tan(torch.pi / 2 * s).log(), torch.linspace(0.002, 80, 2).log().new_tensor(
        [torch.tensor(0.002).log() + i / 8 * (torch.tensor(80.0) / 0.002).log() for i in range(1, 8)]).double())  # fmt: skip
    for i in range(8):
        assert numbers["moment_gap_by_noise"][1, i] == (level == i).sum()


def test_the_auxiliarys_gradient_is_that_of_algorithm_2(place):
    task, teacher = task_for(place, **{"student.steps": 3})
    objective = task.trained["auxiliary"].objective
    perturb(objective.auxiliary.network)
    perturb(objective.matching.student.network)
    batch = digits()
    loss, _ = objective(batch)
    x_tilde, z_s, s, w, label = textbook(objective, batch, 3)
    g_theta = teacher.model.x_hat(z_s, s, objective.matching.schedule, label)
    g_phi = objective.auxiliary.x_hat(z_s, s, objective.matching.schedule, label)
    errors = (x_tilde.detach() - g_phi) ** 2 + (g_theta - g_phi) ** 2
    expected = (w * errors.sum((1, 2, 3))).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    close(grads(loss, objective.auxiliary.network), grads(expected, objective.auxiliary.network))


def test_the_instant_gradient_is_that_of_the_squared_norm_by_double_backward(place):
    """1/2 <grad L_A, grad L_B>, of which only the x~ of B is differentiated; A: even images, B: odd ones."""
    task, teacher = task_for(place, **{"loss.method": "instant"})
    objective, part = task.trained["model"].objective, task.trained["model"]
    batch = digits()
    part.prepare(lambda: iter([batch]))
    loss, _ = objective(batch)
    network = Denoiser(teacher.model.config, teacher.model.network)
    leaves = list(network.network.requires_grad_().parameters())
    gradients = []
    for which in (0, 1):
        half = instant.minibatch(batch, which)
        assert (half.index % 2 == which).all()
        x_tilde, z_s, s, w, label = textbook(objective, half, 2)
        x_tilde = x_tilde.detach() if which == 0 else x_tilde
        with sdpa_kernel(SDPBackend.MATH):  # the one with a second derivative
            x_hat = network.x_hat(z_s, s, objective.matching.schedule, label)
        of_teacher = (w * ((x_hat - x_tilde) ** 2).sum((1, 2, 3))).mean()
        gradients.append(torch.autograd.grad(of_teacher, leaves, create_graph=which == 1))
    expected = 0.5 * sum((a * b).sum() for a, b in zip(*gradients, strict=True))
    assert loss.item() == pytest.approx(expected.item(), rel=2e-3)
    student = objective.student.network
    close(grads(loss, student), grads(expected, student), 1e-3)
    teacher.model.requires_grad_(False)


def test_finite_differences_serve_as_well(place):
    found = {}
    for jvp in ("auto", "finite"):
        task, _ = task_for(place, **{"loss.method": "instant", "loss.jvp": jvp})
        part = task.trained["model"]
        assert part.objective.derivative is (forward_derivative if jvp == "auto" else finite_derivative)
        part.prepare(lambda: iter([digits()]))
        found[jvp] = grads(part.objective(digits())[0], part.network)
    close(found["finite"], found["auto"], 1e-3)


def test_a_network_without_forward_mode_falls_back_and_says_so(place, monkeypatch):
    monkeypatch.setattr(instant, "lacks_forward_mode", lambda *_: "no rule")
    teacher, config = find_teacher(config_for(place, **{"loss.method": "instant"}))
    dataset, reporter = data.load("digits"), Quiet()
    task = distill_task(config, teacher, student_model_config(config, teacher, dataset), dataset, reporter, One())
    assert task.trained["model"].objective.derivative is finite_derivative
    assert any("finite differences" in note and "no rule" in note for note in reporter.notes)


def test_an_objective_trains_its_own_network_alone(place):
    task, _ = task_for(place)
    for name, part in task.trained.items():
        own = {id(p) for p in part.network.parameters()}
        assert {id(p) for p in part.objective.parameters()} == own
        others = [p for other in task.trained.values() if other is not part for p in other.network.parameters()]
        part.objective(digits())[0].backward()
        assert all(p.grad is None for p in others), name
        part.network.zero_grad()
    assert [turn(i) for i in range(4)] == ["auxiliary", "student"] * 2 and next(iter(task.trained)) == "student"


@pytest.mark.parametrize("rollouts", [0.0, 0.5])
@pytest.mark.parametrize("method", ["alternating", "instant"])
def test_results_do_not_depend_on_how_the_batch_is_cut(place, method, rollouts):
    """nu is of the whole of A, whatever the rounds."""
    task, _ = task_for(place, **{"loss.method": method, "student.rollouts": rollouts, "student.rollouts_after": 0})
    found = []
    for size in (16, 4):
        batches = [digits(start, size) for start in range(0, 16, size)]
        total = []
        for part in task.trained.values():
            if part.prepare is not None:
                part.prepare(lambda batches=batches: iter(batches))
            loss = sum(part.objective(batch)[0] for batch in batches) / len(batches)
            total.append(grads(loss, part.network))
        found.append(torch.cat(total))
    close(found[1], found[0], 1e-5)


def test_draws_are_all_different(place):
    task, _ = task_for(place)
    used = task.trained["student"].objective.matching
    noised = used.noised(digits())
    purposes = {v for k, v in vars(matching).items() if k.startswith("_") and k.isupper() and isinstance(v, int)}
    assert len(purposes) == 7 and not purposes & {100, 101, 102, 105, 120, 121}
    zero = replace(noised, z_t=torch.zeros_like(noised.z_t))
    first = used.target(zero, torch.zeros_like(noised.z_t))
    assert not torch.allclose(first, noised.z_t) and not first.requires_grad
    assert ((noised.s < noised.t) & (noised.t <= 1)).all()


# ---------------------------------------------------------------------- the networks


def test_a_student_begins_as_its_teacher_whatever_its_own_noise(place):
    for changes in ({}, {"student.noise_channels": 2}, {"student.dropout": 0.3}):
        teacher, config = find_teacher(config_for(place, **changes))
        student = copy_of(teacher.model, student_model_config(config, teacher))
        z, t = torch.randn(4, 1, 8, 8, dtype=torch.float64), torch.tensor([0.1, 0.5, 0.9, 1.0], dtype=torch.float64)
        label = Labels(torch.arange(4), 10)
        used = matching.make_schedule(COSINE)
        own = keys(0, torch.arange(4)) if student.is_random else None
        ours, theirs = student.x_hat(z, t, used, label, noise=own), teacher.model.x_hat(z, t, used, label)
        if student.settings.noise_dropout:
            assert not torch.equal(ours, theirs)
        elif student.settings.noise_channels:  # a wider convolution may add up in another order: float32's rounding
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())
        else:
            assert torch.equal(ours, theirs)
        assert not student.training and all(p.requires_grad for p in student.parameters())
    other = student.x_hat(z, t, used, label, noise=own + 1)
    assert not torch.equal(ours, other)


def test_dropout_of_the_teacher_is_off_and_clipping_too(tmp_path):
    """A teacher with dropout: passes are the same twice, no network is in training mode; x_hat of all three is not clipped."""
    path = tmp_path / "teacher.safetensors"
    torch.manual_seed(0)
    from mmgen.models.config import ModelConfig

    network = UNetSettings(model_channels=8, channel_mult=(1, 1), num_blocks=1, attn_resolutions=(4,), dropout=0.5)
    config = ModelConfig(network=network, flow=None, denoiser=replace(V, clip=True), resolution=8, channels=1, data="digits")
    model = Denoiser(config)
    for weight in model.parameters():
        if not weight.any():
            torch.nn.init.normal_(weight, std=0.3)
    save_model(path, config, model.network.state_dict())
    task, teacher = task_for(path)
    for part in task.trained.values():
        assert part.objective(digits())[0].item() == part.objective(digits())[0].item()
        assert not any(m.training for m in part.network.modules())
    used = task.trained["student"].objective.matching
    assert not teacher.model.training and not used.teacher.training
    noised = used.noised(digits())
    assert used.teacher_x(3 * noised.z_t, noised).abs().max() > 1 and used.student_x(noised).abs().max() > 1
    assert teacher.model.settings.clip and read_config(path).denoiser.clip  # its own samples are clipped as ever


def test_guidance_is_the_teachers_alone(place):
    task, teacher = task_for(place, **{"teacher.guidance": 2.5})
    used = task.trained["student"].objective.matching
    noised = used.noised(digits())
    z = noised.z_t
    plain = teacher.model.x_hat(z, noised.s, used.schedule, noised.condition)
    none = teacher.model.x_hat(z, noised.s, used.schedule, noised.condition.null())
    torch.testing.assert_close(used.teacher_x(z, noised), none + 2.5 * (plain - none), rtol=1e-4, atol=1e-4)
    at_t = teacher.model.x_hat(z, noised.t, used.schedule, noised.condition)
    torch.testing.assert_close(used.student_x(noised), at_t)
    assert task.model_config.sampling.guidance == 1 and task.model_config.training["distilled"]["guidance"] == 2.5


def test_a_students_own_noise_differs_between_images_and_repeats(place):
    task, _ = task_for(place, **{"student.noise_channels": 1})
    objective = task.trained["student"].objective
    with torch.no_grad():
        for name, weight in objective.student.network.named_parameters():
            if weight.ndim == 4 and weight.shape[1] == 2:
                weight.add_(1.0)
    noised = objective.matching.noised(digits())
    answer = objective.matching.student_x(noised)
    assert torch.equal(answer, objective.matching.student_x(noised))
    assert not torch.allclose(answer, objective.matching.student_x(replace(noised, index=noised.index + 16)))


def test_many_tensors_travel_as_few(monkeypatch):
    """Between processes each has its mean; those of one type go together, as far as a bucket holds them."""
    sent = []

    class Two(One):
        num_processes = 2

        def reduce(self, tensor, reduction):
            assert reduction == "mean"
            sent.append(tensor.numel())
            return 3 * tensor

    monkeypatch.setattr(instant, "BUCKET", 10)
    sizes = {"a": (2, 3), "b": (4,), "c": (1,), "d": (11,), "e": (), "f": (2,)}
    tensors = {name: torch.randn(size, dtype=torch.float64 if name == "f" else torch.float32) for name, size in sizes.items()}
    found = instant.mean_over_processes(tensors, Two())
    assert sent == [10, 1, 11, 1, 2] and list(found) == list(tensors)
    assert all(torch.equal(found[name], 3 * value) and found[name].dtype == value.dtype for name, value in tensors.items())
    assert instant.mean_over_processes(tensors, One()) is tensors and instant.mean_over_processes({}, Two()) == {}
