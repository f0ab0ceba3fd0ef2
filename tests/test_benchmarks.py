"""The benchmarks' textbook computes what mmgen does, which makes the comparison honest; and each benchmark runs."""

from __future__ import annotations

import json

import pytest
import torch

from mmgen.networks.dropout import drop
from mmgen.system.random import keys, normal
from mmgen.methods.imm import objective as imm
from mmgen.methods.distill import matching
from mmgen.methods.distill.instant import minibatch
from tests.benchmarks import imm_step, matching_step, plain_imm, plain_matching
from tests.benchmarks.__main__ import BENCHMARKS, main
from tests.benchmarks.runs import imm_config, imm_trainer

pytestmark = pytest.mark.slow


def shake(network):
    """Outputs of the order of one, not of the initial 1e-5."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) / parameter[0].numel() ** 0.5)


# Both networks are float32 and sum in orders of their own: outputs differ by 1e-6 of their size, and losses, which are differences
# of near numbers, by ten times as much. In float64 the losses are the textbook's in test_objective.py and test_distill_passes.py.
ROUNDING = 1e-4


@pytest.mark.parametrize("preset", list(imm_step.TINY))
def test_the_textbooks_imm_loss_is_mmgens(preset, monkeypatch):
    masked = lambda x, p, training=True, inplace=False: drop(x, p) if training and p > 0 else x  # noqa: E731
    monkeypatch.setattr(torch.nn.functional, "dropout", masked)  # the textbook draws as torch does: here mmgen's masks
    config = imm_config(preset, **{**imm_step.TINY[preset], "train.batch_size": 8})
    trainer = imm_trainer(config, "cpu")
    shake(trainer.network)
    objective, batch = trainer.task.trained["model"].objective, next(iter(trainer._batches(0)))
    x, augment = objective.inputs.images(batch)
    s, t = imm.draw_times(config.loss, config.flow, keys(0, batch.index[:: config.loss.group_size], imm.TIME))
    drawn = plain_imm.Drawn(normal(keys(0, batch.index, imm.NOISE), x.shape[1:]), s, t)
    step = imm_step.plain_step(trainer, config)
    condition = objective.inputs.condition(batch)
    label = None if condition is None else condition.classes
    seed = imm.torch_seed(0, batch.first)
    expected = plain_imm.loss(config, step.network, x, label, augment, drawn, seed)
    ours, _ = objective(batch)
    assert ours.item() == pytest.approx(expected.item(), rel=ROUNDING)
    gradients = torch.autograd.grad(expected, step.parameters, allow_unused=True)
    ours.backward()
    norm = sum(p.grad.double().square().sum() for p in trainer.network.parameters()).sqrt()
    theirs = sum(g.double().square().sum() for g in gradients if g is not None).sqrt()
    assert norm.item() == pytest.approx(theirs.item(), rel=1e-3)


@pytest.mark.parametrize("method", ["alternating", "instant"])
def test_the_textbooks_matching_losses_are_mmgens(method):
    run = matching_step.distilling(method, 16, "tiny", "cpu")
    parts, batch = run.task.trained, next(iter(run._batches(0)))
    used = next(iter(parts.values())).objective.matching
    shake(used.student.network)
    (student, _), (teacher, parameters) = (matching_step.copied(model) for model in (used.student, used.teacher))

    def drawn(batch):
        noised, (x, _) = used.noised(batch), used.inputs.images(batch)
        noise, later = (
            normal(keys(0, batch.index, purpose), x.shape[1:], torch.float64) for purpose in (matching._NOISE, matching._TARGET)
        )
        return plain_matching.Drawn(x.double(), noise, later, noised.s, noised.t, None if noised.condition is None else noised.condition.classes)

    if method == "instant":
        part = parts["model"]
        part.prepare(lambda: iter([batch]))
        pair = [drawn(minibatch(batch, which)) for which in (0, 1)]
        expected = [plain_matching.instant_loss(student, teacher, parameters, *pair)]
        found = [part.objective(batch)[0]]
    else:
        shake(run.networks["auxiliary"])
        auxiliary, _ = matching_step.copied(parts["auxiliary"].objective.auxiliary)
        losses = plain_matching.auxiliary_loss, plain_matching.student_loss
        expected = [loss(student, auxiliary, teacher, drawn(batch)) for loss in losses]
        found = [parts[name].objective(batch)[0] for name in ("auxiliary", "student")]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.item() == pytest.approx(theirs.item(), rel=ROUNDING)


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name != "fid"])
def test_each_benchmark_runs(name, tmp_path):
    main(["--tiny", "--only", name, "--device", "cpu", "--json", str(tmp_path / "figures.json")])
    rows = json.loads((tmp_path / "figures.json").read_text())
    assert rows and all(row["ours"] > 0 and row["plain"] > 0 and row["ratio"] > 0 for row in rows)


def test_a_side_alone_does_its_part():
    case = imm_step.cases("tiny", "cpu")[0].name
    main(["--tiny", "--device", "cpu", "--peak", "imm", case, "plain"])
