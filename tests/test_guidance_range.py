"""student.guidance_range of class-conditional students: one network for all w, told it in the place of a second time."""

import pytest
import torch
from test_distill_inputs import NETWORKS
from tiny_model import awaken, make_denoiser
from toy_distill import V, config_for, digits, no_inception, run, task_for  # noqa: F401

import mmgen
from mmgen.errors import ConfigError
from mmgen.formats.convert import convert_file
from mmgen.methods.distill.method import find_teacher
from mmgen.models.files import save_model
from mmgen.networks.conditions import Labels
from mmgen.sampling.drawing import SampleSettings, draw, plan

RANGE = {"student.guidance_range": [1, 5]}


def teacher_of(kind, folder, **more):
    return awaken(make_denoiser(folder / "teacher.safetensors", V, **{"channels": 1, "num_classes": 10, "network": NETWORKS[kind], **more}))


@pytest.mark.parametrize("kind", ["unet", "adm", "dit", "uvit"])
def test_student_and_auxiliary_are_told_what_the_teacher_follows(tmp_path, kind):
    task, teacher = task_for(teacher_of(kind, tmp_path), **RANGE)
    matching = task.trained["student"].objective.matching
    noised = matching.noised(digits(count=8))
    w = noised.condition.guidance
    assert w.min() >= 1 and w.max() <= 5 and len(w.unique()) == 8
    together = matching.teacher_x(noised.z_t, noised)
    for i in (0, 5):
        one = teacher.model.x_hat(noised.z_t[[i]], noised.s[[i]], matching.schedule, Labels(noised.condition.classes[[i]], 10), w[i].item())
        torch.testing.assert_close(together[[i]], one, rtol=1e-4, atol=1e-4)
    plain = teacher.model.x_hat(noised.z_t, noised.t, matching.schedule, Labels(noised.condition.classes, 10))
    torch.testing.assert_close(matching.student_x(noised), plain, rtol=1e-5, atol=1e-6)  # they begin as the unguided teacher
    for name in ("student", "auxiliary"):
        task.trained[name].objective(digits(count=8))[0].backward()
        told = task.trained[name].network.second_time_mlp.linear1.weight
        assert not told.any() and told.grad.abs().max() > 0


def test_what_an_image_looks_like_depends_on_w_and_costs_one_evaluation(tmp_path):
    task, _ = task_for(teacher_of("unet", tmp_path), **RANGE)
    student = task.trained["student"].objective.student
    torch.nn.init.normal_(student.network.second_time_mlp.linear1.weight, std=0.3)
    drawn = {w: draw(student, SampleSettings(guidance=w, classes=[3], seed=1), range(2))[0] for w in (1.0, 2.0, 4.5)}
    assert not torch.equal(drawn[1.0], drawn[2.0]) and not torch.equal(drawn[2.0], drawn[4.5])
    assert plan(student.config, SampleSettings(guidance=4.5)).nfe == 2 == student.config.sampling.student_steps
    assert student.config.sampling.guidance == 1.0
    with pytest.raises(ConfigError, match="guidance 6 is outside what this student learned: 1 to 5"):
        plan(student.config, SampleSettings(guidance=6.0))
    with pytest.raises(ConfigError, match="told its guidance in training, so an interval has no effect"):
        plan(student.config, SampleSettings(guidance=2.0, guidance_interval=(0.1, 1.0)))


@pytest.mark.parametrize("kind, more, changes, sentence", [
    ("edm2", {}, {}, "a network of kind 'edm2' has no input for w: give teacher.guidance"),
    ("unet", {"num_classes": 0}, {}, "needs a class-conditional teacher or one of text"),
    ("unet", {"null_trained": False}, {}, "needs a teacher that knows images without a class"),
    ("unet", {}, {"teacher.guidance": 2.0}, "takes the place of teacher.guidance"),
])  # fmt: skip
def test_what_cannot_be_is_refused(tmp_path, kind, more, changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        find_teacher(config_for(teacher_of(kind, tmp_path, **more), **RANGE, **changes))


def test_no_other_project_has_such_an_input(tmp_path):
    task, _ = task_for(teacher_of("dit", tmp_path), **RANGE)
    save_model(tmp_path / "student.safetensors", task.model_config, task.trained["student"].network.state_dict())
    for out, to in (("out", "diffusers"), ("out.pt", "pt")):
        with pytest.raises(ConfigError, match="told its guidance by layers of mmgen's own"):
            convert_file(tmp_path / "student.safetensors", tmp_path / out, to=to)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["alternating", "instant"])
def test_such_a_student_trains_and_its_file_is_sampled(tmp_path, method):
    run(teacher_of("unet", tmp_path), tmp_path / "run", **RANGE, **{"loss.method": method, "train.max_images": 64})
    student = mmgen.load(tmp_path / "run")
    assert student.config.denoiser.told_guidance and student.config.training["distilled"]["guidance_range"] == [1, 5]
    assert student.network.second_time_mlp.linear1.weight.any()
    images = [student.sample(4, guidance=w, seed=2).images for w in (1.0, 4.0)]
    assert not torch.equal(*images) and images[0].shape == (4, 1, 8, 8)
