"""One pass of IMM training: shared dropout masks, label dropout, augmentation, flips, precision, compilation."""

import os
import shutil

import pytest
import torch
from exact import exactly

from mmgen.config import sections as configs
from mmgen import data
from mmgen.diffusion.process import diffuse
from mmgen.models.flow_model import flow_map
from mmgen.config.imm import ImmConfig, resolve
from mmgen.losses.imm import draw_times, earlier_time, kernel_weight, loss_weight
from mmgen.networks.dropout import Dropout
from mmgen.system.random import keys, normal, torch_seed
from mmgen.methods.imm import objective as imm
from mmgen.training.batches import fetch
from mmgen.models.compilation import compile_network
from mmgen.methods.imm.objective import imm_model_config, imm_task

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def make(device="cpu", seed=0, **changes):
    table = {
        "network": {"kind": "unet", "model_channels": 8, "channel_mult": [1, 1], "num_blocks": 1, "attn_resolutions": [4],
                    "dropout": 0.0},
        "data": {"name": "digits", "conditional": True}, "train": {"batch_size": 16, "precision": "fp32"},
        "run": {"batch_per_device": 16},
    }  # fmt: skip
    config = resolve(table, configs.nest(changes, ImmConfig))
    dataset = data.load("digits")
    torch.manual_seed(seed)
    part = imm_task(config, imm_model_config(config, dataset.shape)).trained["model"]
    with torch.no_grad():  # outputs of the order of one, not of the initial 1e-5
        for parameter in part.network.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) / parameter[0].numel() ** 0.5)
    part.objective.to(device)
    return part.objective, fetch(dataset, 0, 16, 0, torch.device(device))


def loss_of(objective, batch):
    loss, numbers = objective(batch)
    assert set(numbers) == {"loss_by_t", "r_is_s", "distance"}
    return loss


def textbook_loss(objective, batch):
    """Equation 67 in float64 from the definitions: y_t and y_r by the flow map, full kernel matrices, direct sums."""
    flow, loss = objective.config.flow, objective.config.loss
    x = batch.images.double() / 127.5 - 1
    noise = flow.sigma_data * normal(keys(0, batch.index, imm.NOISE), x.shape[1:], torch.float32).double()
    s, t = draw_times(loss, flow, keys(0, batch.index[:: loss.group_size], imm.TIME))
    r = earlier_time(loss, flow, s, t)
    schedule, total = flow.get_schedule(), 0.0
    label, target_label = objective._conditions(batch)
    for group in range(len(s)):
        part = slice(group * loss.group_size, (group + 1) * loss.group_size)
        s_, r_, t_ = (time[group].expand(loss.group_size) for time in (s, r, t))
        y_t = flow_map(objective.network, flow, diffuse(schedule, x[part], noise[part], t_), s_, t_, label[part])
        y_r = flow_map(objective.network, flow, diffuse(schedule, x[part], noise[part], r_), s_, r_, target_label[part]).detach()
        weight = kernel_weight(flow, s_[:1], t_[:1]) / y_t[0].numel()

        def kernel(a, b):
            distance = (a.flatten(1)[:, None] - b.flatten(1)[None]).pow(2).sum(-1).clamp(min=1e-16).sqrt()
            return torch.exp(-weight * distance)

        mmd = (kernel(y_t, y_t) + kernel(y_r, y_r) - 2 * kernel(y_t, y_r)).mean()
        total = total + loss_weight(loss, flow, t_[:1])[0] * mmd
    return total / len(s)


@pytest.mark.parametrize("target_labels", ["dropped", "undropped"])
def test_the_loss_is_the_textbooks(target_labels):
    objective, batch = make(**{"loss.k": 4, "data.label_dropout": 0.5, "loss.target_labels": target_labels})
    exactly(objective)
    loss, expected = loss_of(objective, batch), textbook_loss(objective, batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    parameters = list(objective.parameters())
    for ours, theirs in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5 * theirs.abs().max().item() + 1e-9)


def test_hidden_labels_reach_the_target_only_if_wanted():
    losses = {}
    for target_labels in ("dropped", "undropped"):
        objective, batch = make(**{"data.label_dropout": 0.5, "loss.target_labels": target_labels})
        student, target = (condition.classes for condition in objective._conditions(batch))
        hidden = student == 10
        assert 0 < hidden.sum() < 16 and torch.equal(student[~hidden], batch.condition.classes[~hidden])
        assert torch.equal(target, student if target_labels == "dropped" else batch.condition.classes)
        losses[target_labels] = loss_of(objective, batch).item()
    assert losses["dropped"] != losses["undropped"]


def record_masks(objective, batch, monkeypatch):
    """The masks of all dropout layers in one pass: the student's, then the target's."""
    masks, original = [], Dropout.forward

    def forward(self, x):
        masks.append(original(self, torch.ones_like(x)))
        return x * masks[-1]

    monkeypatch.setattr(Dropout, "forward", forward)
    loss_of(objective, batch)
    monkeypatch.undo()
    half = len(masks) // 2
    return masks[:half], masks[half:]


@pytest.mark.parametrize("device", DEVICES)
def test_both_passes_have_the_same_dropout_masks(device, monkeypatch):
    objective, batch = make(device, **{"network.dropout": 0.5})
    student, target = record_masks(objective, batch, monkeypatch)
    assert len(student) > 4 and all(torch.equal(a, b) for a, b in zip(student, target, strict=True))
    assert any((mask == 0).any() for mask in student)
    batch.first += 16  # another part of the training has other masks
    others, _ = record_masks(objective, batch, monkeypatch)
    assert any(not torch.equal(a, b) for a, b in zip(student, others, strict=True))


def test_with_one_time_the_loss_is_zero_with_dropout():
    """min_gap 0 and a k so large that r = t to the last bit: equal masks make y_t = y_r, other masks would not."""
    objective, batch = make(**{"network.dropout": 0.5, "loss.k": 60})
    assert loss_of(objective, batch).item() == pytest.approx(0.0, abs=1e-9)


def test_flips_and_augmentation_come_with_their_label():
    objective, batch = make(**{"data.xflip": True})
    x, label = objective.inputs.pixels(batch)
    plain = batch.images.float() / 127.5 - 1
    flipped = [not torch.equal(a, b) for a, b in zip(x, plain, strict=True)]
    assert label is None and 0 < sum(flipped) < 16
    assert all(torch.equal(x[i], plain[i].flip(2)) for i in range(16) if flipped[i])
    objective, batch = make(**{"data.augment": 0.9})
    x, label = objective.inputs.pixels(batch)
    assert label.shape == (16, 9) and label.abs().sum() > 0
    assert loss_of(objective, batch).isfinite()
    before = loss_of(objective, batch).item()
    with torch.no_grad():
        objective.network.augment_embed.weight.mul_(3)
    assert loss_of(objective, batch).item() != before  # the network sees the label


def test_draws_depend_on_the_number_of_the_image_only():
    objective, batch = make()
    whole = loss_of(exactly(objective), batch)
    parts = []
    for start in (0, 8):
        part = fetch(data.load("digits"), start, 8, 0, torch.device("cpu"))
        parts.append(loss_of(objective, part))
    assert whole.item() == pytest.approx(sum(parts).item() / 2, rel=1e-6)
    assert torch_seed(0, 1) != torch_seed(0, 2) != torch_seed(1, 2)


def test_bfloat16_is_used_by_the_student_alone():
    objective, batch = make()
    dtypes = []
    objective.network.out_conv.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(objective, batch)
    assert dtypes == [torch.bfloat16, torch.float32] and loss.dtype == torch.float64
    loss.backward()
    assert all(p.grad.isfinite().all() for p in objective.parameters() if p.grad is not None)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.skipif(os.environ.get("ATEN_CPU_CAPABILITY") == "default", reason="torch.compile writes vector instructions")
def test_compiled_is_the_same_loss_and_gradient_with_dropout():
    objective, batch = make(**{"network.dropout": 0.3, "network.channel_mult": [1], "loss.k": 4})
    eager = loss_of(objective, batch)
    expected = torch.autograd.grad(eager, list(objective.parameters()))
    compile_network(objective.network)
    compiled = loss_of(objective, batch)
    assert compiled.item() == pytest.approx(eager.item(), rel=1e-4)
    for ours, theirs in zip(torch.autograd.grad(compiled, list(objective.parameters())), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-4 * theirs.abs().max().item() + 1e-9)
    assert all("_orig_mod" not in key for key in objective.network.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["radam", "adamw", "adam"])
def test_optimisers_lower_the_loss(optimizer):
    from mmgen.training.optim import build_optimizer

    objective, batch = make(**{"optimizer.name": optimizer, "optimizer.lr": 2e-3, "loss.k": 4})
    optimiser = build_optimizer(objective.config.optimizer, objective.parameters())
    first = loss_of(objective, batch).item()
    for _ in range(30):
        optimiser.zero_grad()
        loss = loss_of(objective, batch)
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.95 * first
