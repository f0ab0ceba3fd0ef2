"""Training of students: objectives against their definitions, both methods on a toy teacher, resuming, what is refused."""

import json
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tiny_model import make_denoiser, make_model

from mmgen import data
from mmgen.config import DataSettings, nest
from mmgen.denoiser import Denoiser, DenoiserSettings
from mmgen.distill_config import DistillConfig, resolve
from mmgen.errors import ConfigError, ModelError, TrainingError
from mmgen.losses.moment_matching import MomentSettings, finite_derivative, forward_derivative
from mmgen.models import load_model, read_config, save_model
from mmgen.networks import UNetSettings
from mmgen.random import keys
from mmgen.sampling import SampleSettings, draw, plan
from mmgen.schedules import ScheduleSettings
from mmgen.teachers import load_teacher
from mmgen.training import distill as module
from mmgen.training import instant, loop, matching
from mmgen.training.alternating import alternating_parts, turn
from mmgen.training.batches import fetch
from mmgen.training.distill import copy_of, distill, distill_task, find_teacher, student_model_config
from mmgen.training.inputs import Inputs

COSINE = ScheduleSettings("vp_cosine")
V = DenoiserSettings(precondition="schedule", prediction="v", schedule=COSINE, time_scale=100.0)
TINY = {
    "student.steps": 2, "optimizer.lr": 1e-3, "optimizer.warmup_images": 32, "optimizer.grad_clip": 1.0,
    "train.batch_size": 16, "train.max_images": 160, "train.precision": "fp32",
    "run.batch_per_device": 8, "run.checkpoint_every": 48, "run.eval_num": 0, "run.log_every": 2, "run.teacher_steps": 4,
}  # fmt: skip


class Quiet:
    def __init__(self):
        self.notes, self.lines = [], []

    def note(self, text):
        self.notes.append(text)

    def start(self, images, total): ...
    def advance(self, images): ...
    def log(self, line):
        self.lines.append(line)


class One:
    """An accelerator of one process."""

    num_processes, process_index, device = 1, 0, torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("MMGEN_INCEPTION", "")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A teacher of digits with random weights."""
    return make_denoiser(tmp_path_factory.mktemp("teacher") / "teacher.safetensors", V, channels=1, num_classes=10)


def config_for(place, **changes):
    return resolve(nest({"teacher.name": str(place), **TINY, **changes}, DistillConfig))


def run(place, out, reporter=None, **changes):
    AcceleratorState._reset_state(reset_partial_state=True)
    return distill(config_for(place, **changes), out, reporter or Quiet(), device="cpu")


def task_for(place, **changes):
    teacher, config = find_teacher(config_for(place, **changes))
    dataset = data.load("digits")
    return distill_task(config, teacher, student_model_config(config, teacher, dataset), dataset, Quiet(), One()), teacher


def digits(first=0, count=16):
    return fetch(data.load("digits"), first, count, 0, torch.device("cpu"))


def weights(folder):
    last = max((folder / "checkpoints").glob("[0-9]*"))
    return {f"{file.stem}.{k}": v for file in sorted(last.glob("*.safetensors")) for k, v in load_file(file).items()}


def assert_same(a, b):
    assert a.keys() == b.keys() and len(a) > 100
    for key in a:
        assert torch.equal(a[key], b[key]), key


def perturb(network, amount=0.1):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(amount * parameter.std(correction=0) * torch.randn(parameter.shape, generator=generator))


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
    x_tilde = used.student.x_hat(z_t, t, used.schedule, batch.labels)
    ratio = a_t / a_s
    jump = s_t**2 - ratio**2 * s_s**2  # sigma_{t|s}^2
    variance = 1 / (1 / s_s**2 + ratio**2 / jump)
    mean = variance * (ratio / jump * z_t + a_s / s_s**2 * x_tilde)
    noise = matching.normal(keys(0, batch.index, matching._TARGET), x.shape[1:], torch.float64)
    sigma = (torch.tan(torch.pi / 2 * s)).clamp(0.002, 80.0)
    return x_tilde, (mean + variance.sqrt() * noise).detach(), s, sigma**-2 + 1, batch.labels


def grads(loss, network):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))])


def close(a, b, tolerance=1e-4):
    assert (a - b).norm() <= tolerance * b.norm(), ((a - b).norm() / b.norm()).item()


def test_the_students_gradient_is_that_of_algorithm_2(place):
    task, teacher = task_for(place, **{"student.steps": 3})
    objective = task.parts["student"].objective
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
    objective = task.parts["auxiliary"].objective
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
    objective, part = task.parts["model"].objective, task.parts["model"]
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
        part = task.parts["model"]
        assert part.objective.derivative is (forward_derivative if jvp == "auto" else finite_derivative)
        part.prepare(lambda: iter([digits()]))
        found[jvp] = grads(part.objective(digits())[0], part.network)
    close(found["finite"], found["auto"], 1e-3)


def test_a_network_without_forward_mode_falls_back_and_says_so(place, monkeypatch):
    monkeypatch.setattr(instant, "lacks_forward_mode", lambda *_: "no rule")
    teacher, config = find_teacher(config_for(place, **{"loss.method": "instant"}))
    dataset, reporter = data.load("digits"), Quiet()
    task = distill_task(config, teacher, student_model_config(config, teacher, dataset), dataset, reporter, One())
    assert task.parts["model"].objective.derivative is finite_derivative
    assert any("finite differences" in note and "no rule" in note for note in reporter.notes)


def test_an_objective_trains_its_own_network_alone(place):
    task, _ = task_for(place)
    for name, part in task.parts.items():
        own = {id(p) for p in part.network.parameters()}
        assert {id(p) for p in part.objective.parameters()} == own
        others = [p for other in task.parts.values() if other is not part for p in other.network.parameters()]
        part.objective(digits())[0].backward()
        assert all(p.grad is None for p in others), name
        part.network.zero_grad()
    assert [turn(i) for i in range(4)] == ["auxiliary", "student"] * 2 and next(iter(task.parts)) == "student"


@pytest.mark.parametrize("method", ["alternating", "instant"])
def test_results_do_not_depend_on_how_the_batch_is_cut(place, method):
    """nu is of the whole of A, whatever the rounds."""
    task, _ = task_for(place, **{"loss.method": method})
    found = []
    for size in (16, 4):
        batches = [digits(start, size) for start in range(0, 16, size)]
        total = []
        for part in task.parts.values():
            if part.prepare is not None:
                part.prepare(lambda batches=batches: iter(batches))
            loss = sum(part.objective(batch)[0] for batch in batches) / len(batches)
            total.append(grads(loss, part.network))
        found.append(torch.cat(total))
    close(found[1], found[0], 1e-5)


def test_draws_are_all_different(place):
    task, _ = task_for(place)
    used = task.parts["student"].objective.matching
    noised = used.noised(digits())
    purposes = {v for k, v in vars(matching).items() if k.startswith("_") and k.isupper() and isinstance(v, int)}
    assert len(purposes) == 6 and not purposes & {100, 101, 102, 105, 120, 121}
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
        label = torch.arange(4)
        used = matching.make_schedule(COSINE)
        own = keys(0, torch.arange(4)) if student.is_random else None
        ours, theirs = student.x_hat(z, t, used, label, noise=own), teacher.model.x_hat(z, t, used, label)
        assert torch.equal(ours, theirs) == (not student.settings.noise_dropout)
        assert not student.training and all(p.requires_grad for p in student.parameters())
    other = student.x_hat(z, t, used, label, noise=own + 1)
    assert not torch.equal(ours, other)


def test_dropout_of_the_teacher_is_off_and_clipping_too(tmp_path):
    """A teacher with dropout: passes are the same twice, no network is in training mode; x_hat of all three is not clipped."""
    path = tmp_path / "teacher.safetensors"
    torch.manual_seed(0)
    from mmgen.models import ModelConfig

    network = UNetSettings(model_channels=8, channel_mult=(1, 1), num_blocks=1, attn_resolutions=(4,), dropout=0.5)
    config = ModelConfig(network=network, flow=None, denoiser=replace(V, clip=True), resolution=8, channels=1, data="digits")
    model = Denoiser(config)
    for weight in model.parameters():
        if not weight.any():
            torch.nn.init.normal_(weight, std=0.3)
    save_model(path, config, model.network.state_dict())
    task, teacher = task_for(path)
    for part in task.parts.values():
        assert part.objective(digits())[0].item() == part.objective(digits())[0].item()
        assert not any(m.training for m in part.network.modules())
    used = task.parts["student"].objective.matching
    assert not teacher.model.training and not used.teacher.training
    noised = used.noised(digits())
    assert used.taught(3 * noised.z_t, noised).abs().max() > 1 and used.answer(noised).abs().max() > 1
    assert teacher.model.settings.clip and read_config(path).denoiser.clip  # its own samples are clipped as ever


def test_guidance_is_the_teachers_alone(place):
    task, teacher = task_for(place, **{"teacher.guidance": 2.5})
    used = task.parts["student"].objective.matching
    noised = used.noised(digits())
    z = noised.z_t
    plain = teacher.model.x_hat(z, noised.s, used.schedule, noised.label)
    none = teacher.model.x_hat(z, noised.s, used.schedule, torch.full_like(noised.label, 10))
    torch.testing.assert_close(used.taught(z, noised), none + 2.5 * (plain - none), rtol=1e-4, atol=1e-4)
    at_t = teacher.model.x_hat(z, noised.t, used.schedule, noised.label)
    torch.testing.assert_close(used.answer(noised), at_t)
    assert task.model_config.sampling.guidance == 1 and task.model_config.training["distilled"]["guidance"] == 2.5


def test_a_students_own_noise_differs_between_images_and_repeats(place):
    task, _ = task_for(place, **{"student.noise_channels": 1})
    objective = task.parts["student"].objective
    with torch.no_grad():
        for name, weight in objective.student.network.named_parameters():
            if weight.ndim == 4 and weight.shape[1] == 2:
                weight.add_(1.0)
    noised = objective.matching.noised(digits())
    answer = objective.matching.answer(noised)
    assert torch.equal(answer, objective.matching.answer(noised))
    assert not torch.allclose(answer, objective.matching.answer(replace(noised, index=noised.index + 16)))


# ---------------------------------------------------------------------- runs


def gradient_norm(place, student, count=256):
    """1/2 <grad L_A, grad L_B> of the teacher on a student's images, from independent halves: how far the moments are off."""
    teacher = load_teacher(place).model.requires_grad_(True)
    used = matching.Matching(
        student, teacher, COSINE, MomentSettings(), Inputs(DataSettings(conditional=True, label_dropout=0.0), 5),
        steps=2, guidance=1.0, seed=5,
    )  # fmt: skip
    found = []
    for first in (0, count):
        noised = used.noised(digits(first, count))
        with torch.no_grad():
            x_tilde = used.answer(noised)
            z_s = used.target(noised, x_tilde)
        error = ((used.taught(z_s, noised) - x_tilde) ** 2).sum((1, 2, 3))
        found.append(grads((used.weight(noised.s) * error).mean(), teacher.network))
    return 0.5 * (found[0] @ found[1]).item()


@pytest.mark.parametrize("method", ["alternating", "instant"])
def test_training_brings_the_moments_nearer(place, tmp_path, method):
    before = gradient_norm(place, load_model(place))
    bytes_before = place.read_bytes()
    changes = {
        "loss.method": method, "optimizer.lr": 3e-3, "train.batch_size": 32, "train.max_images": 32 * 40,
        "run.batch_per_device": 32, "run.checkpoint_every": 10**9,
    }  # fmt: skip
    reporter = Quiet()
    run(place, tmp_path / "run", reporter, **changes)
    after = gradient_norm(place, load_model(tmp_path / "run/model.safetensors"))
    assert after < 0.7 * before, (after, before)
    assert place.read_bytes() == bytes_before
    line = reporter.lines[-1]
    if method == "alternating":
        assert {"auxiliary_loss", "student_loss", "moment_gap", "auxiliary_to_teacher", "auxiliary_to_student"} <= line.keys()
        assert len(line["moment_gap_by_noise"]) == 8
        assert line["auxiliary_to_teacher"] == pytest.approx(line["moment_gap"] / 2)
        assert any("student_loss has no lower bound" in note for note in reporter.notes)
    else:
        losses = [line["loss"] for line in reporter.lines if "loss" in line]
        assert sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.parametrize("changes", [
    {}, {"loss.method": "instant", "loss.preconditioner": "adam"}, {"student.dropout": 0.2, "student.noise_channels": 1},
], ids=["alternating", "instant", "random"])  # fmt: skip
def test_killed_and_resumed_is_the_same_bit_for_bit(place, tmp_path, monkeypatch, changes):
    monkeypatch.setattr(instant, "MOMENT_BATCHES", 2)
    changes = {"train.max_images": 112, "optimizer.warmup_images": 16, **changes}
    run(place, tmp_path / "whole", **changes)
    original = loop.fetch
    for image in (64, 80):  # in the step of either part

        def killed(dataset, first, *rest, image=image):
            if first == image:
                raise KeyboardInterrupt
            return original(dataset, first, *rest)

        monkeypatch.setattr(loop, "fetch", killed)
        with pytest.raises(KeyboardInterrupt):
            run(place, tmp_path / f"killed-{image}", **changes)
        monkeypatch.setattr(loop, "fetch", original)
        reporter = Quiet()
        run(place, tmp_path / f"killed-{image}", reporter, **changes)
        assert any("resuming from" in note for note in reporter.notes)
        assert_same(weights(tmp_path / "whole"), weights(tmp_path / f"killed-{image}"))


def test_teacher_and_inputs_stay_as_they_are(place):
    """Bit for bit, through passes of all objectives."""
    for method in ("alternating", "instant"):
        task, teacher = task_for(place, **{"loss.method": method})
        before = {k: v.clone() for k, v in teacher.model.network.state_dict().items()}
        for part in task.parts.values():
            optimizer = torch.optim.Adam(part.network.parameters(), lr=0.1)
            for _ in range(2):
                if part.prepare is not None:
                    part.prepare(lambda: iter([digits()]))
                part.objective(digits())[0].backward()
                optimizer.step()
        after = teacher.model.network.state_dict()
        assert all(torch.equal(before[k], after[k]) for k in before)
        assert not any(p.requires_grad for p in teacher.model.parameters())


def test_what_a_student_says_of_itself(place, tmp_path):
    outcome = run(place, tmp_path / "run", **{"student.steps": 3, "run.eval_num": 64, "train.max_images": 32})
    config = read_config(tmp_path / "run/model.safetensors")
    assert config.training["distilled"] == {
        "teacher": str(place), "sha256": load_teacher(place).sha256, "method": "alternating", "steps": 3, "guidance": 1.0,
    }  # fmt: skip
    sampling = config.sampling
    assert (sampling.sampler, sampling.steps, sampling.student_steps, sampling.schedule) == ("ancestral", 3, 3, COSINE)
    assert not config.denoiser.clip and config.data == "digits"
    chosen = plan(config, SampleSettings())
    assert (chosen.sampler, chosen.steps, chosen.grid, chosen.nfe, chosen.notes) == ("ancestral", 3, "schedule", 3, ())
    assert plan(config, SampleSettings(steps=2)).notes
    model = load_model(tmp_path / "run/model.safetensors")
    assert draw(model, SampleSettings(), range(4))[0].shape == (4, 1, 8, 8)
    rows = outcome.results["comparison"]["rows"]
    assert [(row["who"], row["sampler"], row["steps"]) for row in rows] == [
        ("teacher", "ancestral", 4), ("teacher", "ddim", 4), ("teacher", "ancestral", 3), ("teacher", "ddim", 3),
        ("student", "ancestral", 3),
    ]  # fmt: skip
    best = outcome.results["comparison"]["best"]
    assert rows[best]["value"] == min(row["value"] for row in rows[:2])
    assert rows[-1]["value"] == outcome.results["values"]["3"]
    assert json.loads((tmp_path / "run/results.json").read_text())["comparison"] == outcome.results["comparison"]
    assert (tmp_path / "run/samples.png").is_file()


def test_the_same_noise_and_classes_in_all_rows(place, monkeypatch):
    """With the student still the teacher, its row is the teacher's of as many steps."""
    teacher, config = find_teacher(config_for(place))
    student = copy_of(teacher.model, student_model_config(config, teacher))
    seen = []
    original = module.report.labelled_rows
    monkeypatch.setattr(module.report, "labelled_rows", lambda rows, **options: seen.append(rows) or original(rows, **options))
    comparison = module.Comparison(teacher, config, COSINE, data.load("digits"), Quiet(), torch.device("cpu"))
    comparison.picture(student, 0)
    (many, few, ours, real) = seen[0]
    assert (many[0], few[0], ours[0], real[0]) == (
        "teacher, 4 steps, ancestral", "teacher, 2 steps, ancestral", "student, 2 steps, ancestral", "real"
    )  # fmt: skip
    assert (few[1].int() - ours[1].int()).abs().max() <= 1 and not torch.equal(many[1], few[1])


def test_second_moments_are_the_mean_squares_of_gradients_on_the_data(place, monkeypatch):
    monkeypatch.setattr(instant, "MOMENT_BATCHES", 3)
    task, teacher = task_for(place, **{"loss.method": "instant"})
    used = task.parts["model"].objective.matching
    found = instant.data_second_moments(used, data.load("digits"), One(), 8, 4)
    teacher.model.requires_grad_(True)
    expected = {}
    for first in (0, 8, 16):
        noised, x = used.noised_at_s(digits(first, 8))
        loss = (used.weight(noised.s) * (used.teacher.x_hat(noised.z_t, noised.s, used.schedule, noised.label) - x)
                .square().sum((1, 2, 3))).mean()  # fmt: skip
        named = dict(teacher.model.network.named_parameters())
        for name, gradient in zip(named, torch.autograd.grad(loss, list(named.values())), strict=True):
            expected[name] = expected.get(name, 0) + gradient**2 / 3
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-2, atol=1e-4 * value.max().item())


@pytest.mark.parametrize("denoiser", [
    DenoiserSettings("edm"), DenoiserSettings("vp"), DenoiserSettings("ve", sigma_max=50.0), DenoiserSettings("iddpm"),
    DenoiserSettings("discrete", prediction="v", num_timesteps=50), DenoiserSettings("discrete", round_time=True, clip=True),
    DenoiserSettings("flow"), DenoiserSettings("schedule", prediction="velocity", schedule=ScheduleSettings("fm", 2.0)),
], ids=lambda d: d.precondition)  # fmt: skip
def test_teachers_of_all_coordinates(tmp_path, denoiser):
    """Both objectives at the ends of the schedule and between, and the row of a student that is still the teacher."""
    place = make_denoiser(tmp_path / "teacher.safetensors", denoiser, channels=1)
    for method in ("alternating", "instant"):
        task, _ = task_for(place, **{"loss.method": method, "loss.weighting": "output", "student.steps": 1})
        for part in task.parts.values():
            if part.prepare is not None:
                part.prepare(lambda: iter([digits(0, 64)]))
            loss, numbers = part.objective(digits(0, 64))
            loss.backward()
            assert loss.isfinite() and all(p.grad.isfinite().all() for p in part.network.parameters() if p.grad is not None)
    assert (part.objective.matching.noised(digits(0, 64)).t == 1).any()
    student = copy_of(load_model(place), task.model_config)
    assert draw(student, SampleSettings(), range(2))[0].shape == (2, 1, 8, 8)


# ---------------------------------------------------------------------- what is refused


def test_a_flow_map_is_no_teacher(tmp_path):
    path = make_model(tmp_path / "imm.safetensors", channels=1)
    with pytest.raises(ModelError, match="teacher"):
        run(path, tmp_path / "run")


@pytest.mark.parametrize(("changes", "message"), [
    ({"student.steps": 0}, "student.steps must be more than 0"),
    ({"teacher.name": ""}, "--teacher"),
    ({"data.resolution": 16}, "data.resolution"),
    ({"data.augment": 0.1}, "data.augment"),
    ({"loss.method": "instant", "train.batch_size": 15, "run.batch_per_device": 15}, "even"),
    ({"loss.preconditioner": "adam"}, "instant"),
    ({"loss.stochasticity": 0.0}, "loss.stochasticity"),
    ({"student.dropout": 1.0}, "student.dropout"),
])  # fmt: skip
def test_what_cannot_be_is_refused(place, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        run(place, tmp_path / "run", **changes)
    assert "\n" not in str(caught.value)


def test_data_and_guidance_must_suit_the_teacher(tmp_path, place):
    unconditional = make_denoiser(tmp_path / "teacher.safetensors", V, channels=1)
    with pytest.raises(ConfigError, match="guidance.*class-conditional|guidance.*classes"):
        run(unconditional, tmp_path / "run", **{"teacher.guidance": 2.0})
    few = make_denoiser(tmp_path / "few.safetensors", V, channels=1, num_classes=3)
    with pytest.raises(ConfigError, match="3 classes, and digits has 10"):
        run(few, tmp_path / "run")
    config = replace(read_config(place), data="")
    save_model(tmp_path / "nameless.safetensors", config, load_file(place))
    with pytest.raises(ConfigError, match="--data"):
        run(tmp_path / "nameless.safetensors", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_teacher_does_not_continue_a_run(tmp_path, place):
    path = tmp_path / "teacher.safetensors"
    path.write_bytes(place.read_bytes())
    run(path, tmp_path / "run", **{"train.max_images": 64})
    copied = tmp_path / "copied.safetensors"
    copied.write_bytes(path.read_bytes())
    run(copied, tmp_path / "run", **{"train.max_images": 64})  # the same one from elsewhere does
    state = load_file(path)
    save_model(path, read_config(path), {k: v * 1.01 for k, v in state.items()})
    with pytest.raises(TrainingError, match="teacher.sha256"):
        run(path, tmp_path / "run", **{"train.max_images": 64})


def test_alternating_parts_hold_the_student_first(place):
    model = load_model(place)
    used = matching.Matching(model, model, COSINE, MomentSettings(), Inputs(DataSettings(), 0), steps=2, guidance=1.0, seed=0)
    assert list(alternating_parts(used, load_model(place))) == ["student", "auxiliary"]
