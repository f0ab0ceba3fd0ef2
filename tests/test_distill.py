"""Training of students: both methods on a toy teacher, resuming, teachers of all coordinates, what is refused."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tiny_model import make_denoiser, make_model
from toy_distill import COSINE, V, One, assert_same, config_for, digits, grads, no_inception, place, run, task_for, weights  # noqa: F401
from toy_task import Quiet

from mmgen import data
from mmgen.config.sections import DataSettings
from mmgen.models.denoiser import DenoiserSettings
from mmgen.errors import ConfigError, ModelError, TrainingError
from mmgen.losses.moment_matching import MomentSettings
from mmgen.models.files import load_model, read_config, save_model
from mmgen.sampling.drawing import SampleSettings, draw, plan
from mmgen.diffusion.schedules import ScheduleSettings
from mmgen.methods.distill.teachers import load_teacher
from mmgen.methods.distill import method as module
from mmgen.methods.distill import instant, matching
from mmgen.training import loop
from mmgen.methods.distill.alternating import alternating_parts
from mmgen.methods.distill.method import copy_of, find_teacher, student_model_config
from mmgen.training.inputs import Inputs


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
            x_tilde = used.student_x(noised)
            z_s = used.target(noised, x_tilde)
        error = ((used.teacher_x(z_s, noised) - x_tilde) ** 2).sum((1, 2, 3))
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


@pytest.mark.slow
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
        for part in task.trained.values():
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
        "teacher, 4 ancestral steps", "teacher, 2 ancestral steps", "student, 2 ancestral steps", "real"
    )  # fmt: skip
    assert (few[1].int() - ours[1].int()).abs().max() <= 1 and not torch.equal(many[1], few[1])


def test_second_moments_are_the_mean_squares_of_gradients_on_the_data(place, monkeypatch):
    monkeypatch.setattr(instant, "MOMENT_BATCHES", 3)
    task, teacher = task_for(place, **{"loss.method": "instant"})
    used = task.trained["model"].objective.matching
    found = instant.data_second_moments(used, data.load("digits"), One(), 8, 4)
    teacher.model.requires_grad_(True)
    expected = {}
    for first in (0, 8, 16):
        noised, x = used.noised_at_s(digits(first, 8))
        loss = (used.weight(noised.s) * (used.teacher.x_hat(noised.z_t, noised.s, used.schedule, noised.condition) - x)
                .square().sum((1, 2, 3))).mean()  # fmt: skip
        named = dict(teacher.model.network.named_parameters())
        for name, gradient in zip(named, torch.autograd.grad(loss, list(named.values())), strict=True):
            expected[name] = expected.get(name, 0) + gradient**2 / 3
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-2, atol=1e-4 * value.max().item())


@pytest.mark.slow
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
        for part in task.trained.values():
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
    ({"student.steps": 10**9}, "student.steps must be at most 100,000"),
    ({"run.teacher_steps": 10**9}, "run.teacher_steps must be at most 100,000"),
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
