"""The weights under adapters in half precision: what is computed, trained, kept and counted."""

import pytest
import torch
from test_checkpointing import inputs
from test_cost_lora import model
from test_lora import KINDS, LABELS, make, random_weights
from tiny_pipelines import tiny_pipeline
from toy_distill import One, config_for, digits, place, run, task_for, weights  # noqa: F401
from toy_task import Quiet

from mmgen.config.distill import StudentSettings
from mmgen.config.sections import TrainSettings
from mmgen.errors import ConfigError
from mmgen.methods.distill.lora import LoraNetworks
from mmgen.methods.distill.method import TRAINING
from mmgen.methods.distill.teachers import load_teacher
from mmgen.models.denoiser import Denoiser
from mmgen.models.files import load_model
from mmgen.networks.lora import LoraBase, merged
from mmgen.training.batches import BatchSplit
from mmgen.training.cost import ALTERNATING, Adapters, estimate, pass_cost

HALF = {"student.lora": 2, "train.precision": "bf16", "train.frozen_precision": "half", "run.teacher_steps": 0}


def rounded(network):
    """The same network, its weights in float32 but rounded."""
    with torch.no_grad():
        for module in LoraBase(network).halvable():
            module.weight.copy_(module.weight.bfloat16())
    return network


@pytest.mark.parametrize("kind", KINDS)
def test_in_full_precision_it_is_the_rounded_network_exactly(kind):
    (x, t), found = inputs(), []
    for half in (True, False):
        network = make(kind) if half else rounded(make(kind))
        base = LoraBase(network)
        torch.manual_seed(1)
        student = base.add("student", 4)
        if half:
            base.halve(torch.bfloat16)
        base.add("auxiliary", 2)  # later, as that of an average
        random_weights(student)
        assert all(p.dtype == torch.float32 for p in base.itself().parameters() if p.requires_grad)
        with torch.no_grad():
            found.append([view(x, t, None, LABELS) for view in (student, base.itself())])
        whole = merged(network, student.state_dict())
        assert all(value.dtype == torch.float32 for value in whole.values() if value.is_floating_point())
        found[-1] += list(whole.values())
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "pixart_alpha", "sd3", "sana"])
def test_pipelines(tmp_path, kind):
    """The teacher's x_hat in full precision is float32's of the rounded weights; under autocast adapters learn."""
    folder = tiny_pipeline(kind, tmp_path / "teacher")
    plain, teacher = load_teacher(folder).model, load_teacher(folder)
    networks = LoraNetworks(teacher.model.network, StudentSettings(lora=2), One(), torch.bfloat16)
    kept = sum(p.nbytes for p in networks.base.network.parameters() if not p.requires_grad)
    assert kept < 0.75 * sum(p.nbytes for p in plain.parameters())  # in networks so small, what is no matrix counts
    rounded(plain.network)
    y, sigma = torch.randn(2, *plain.image_shape, dtype=torch.float64), torch.tensor([0.3, 0.8], dtype=torch.float64)
    with torch.no_grad():
        expected = plain.denoise(y, sigma)
        found = Denoiser(plain.config, networks.base.itself()).eval().denoise(y, sigma)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    student = Denoiser(plain.config, networks.student)
    with torch.autocast("cpu", torch.bfloat16):
        loss = (student.denoise(y, sigma) - expected).square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in networks.student.parameters())


def test_a_run(place, tmp_path):  # noqa: F811
    reporter = Quiet()
    run(place, tmp_path / "run", reporter, **HALF, **{"train.max_images": 32})
    assert any("share the teacher's weights, kept in bfloat16" in note for note in reporter.notes)
    state = load_model(tmp_path / "run/model.safetensors").network.state_dict()
    assert all(value.dtype == torch.float32 for value in state.values() if value.is_floating_point())
    teacher = load_model(place).network.state_dict()
    assert all((state[key] - value).abs().max() < 0.02 * value.abs().max() + 1e-3 for key, value in teacher.items() if key in state)


def test_the_small_difference_is_full(place):  # noqa: F811
    """g_phi - g_theta of the student's turn: zero where the auxiliary's adapter is, with whatever weights below."""
    task, _ = task_for(place, **HALF)
    with torch.autocast("cpu", torch.bfloat16):
        _, numbers = task.trained["student"].objective(digits())
    assert numbers["auxiliary_to_teacher"][0] == 0


def test_the_instant_method_refuses(place):  # noqa: F811
    for lora in (2, 0):
        with pytest.raises(ConfigError, match="train.frozen_precision half is of the alternating method"):
            config_for(place, **{**HALF, "student.lora": lora, "loss.method": "instant"})


def test_memory():
    one = pass_cost(model("dit"), "bf16", adapters=Adapters((4, 2)))
    full, half = (
        estimate(TrainSettings(precision="bf16", ema_betas=()), model("dit"), BatchSplit(8, 1, 1), ALTERNATING, one=one,
                 adapters=Adapters((4, 2), half=half))
        for half in (False, True)
    )  # fmt: skip
    network = make("dit")
    base = LoraBase(network)
    base.add("a", 4), base.halve(torch.bfloat16)
    saved = sum(2 * p.numel() for p in network.parameters() if p.dtype == torch.bfloat16)
    assert 0 < full.weights - half.weights == 2 * one.halved == full.copies - half.copies
    assert abs(saved - 2 * one.halved) < 0.05 * saved  # that network has an embedding of classes


def test_a_dry_run_shows_and_counts_it(place):  # noqa: F811
    for changes, first in (({}, "LoRA of rank 2"), ({"train.frozen_precision": "half"}, "LoRA of rank 2, base in half precision")):
        ways = TRAINING.trains(config_for(place, **{**HALF, "train.frozen_precision": "full", **changes}))
        assert ways[0][0] == first and ways[0][1].half == bool(changes) and len(ways) == 3
    assert all(way is None or not way.half for _, way in TRAINING.trains(config_for(place, **{"student.lora": 2})))
