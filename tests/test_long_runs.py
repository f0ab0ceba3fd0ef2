"""What a long run tells of itself: gradient norms, spikes of the loss, steps that fp16 left out, samples that are all alike."""

import json
import math
import types

import numpy as np
import pytest
import torch
from PIL import Image
from test_checkpoints import together
from test_training import Quiet, tiny

from mmgen.training import collapse, evaluation
from mmgen.training.collapse import Spread, spread_of, spread_of_data
from mmgen.training.gradients import measure_and_clip
from mmgen.training.accumulator import MetricAccumulator
from mmgen.methods import IMM
from mmgen.methods.run import train

pytestmark = pytest.mark.slow


def accelerator(scaler=None):
    return types.SimpleNamespace(num_processes=1, scaler=scaler)


def network_with_gradients(scale: float = 1.0):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    network[1].bias.requires_grad_(False)  # has no gradient
    (network(torch.randn(5, 3)).square().sum() * scale).backward()
    return network


def norm_of(network) -> float:
    return math.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in network.parameters() if p.grad is not None))


@pytest.mark.parametrize("clip", [0.0, 0.5, 1e6])
def test_the_norm_is_that_before_clipping(clip):
    network = network_with_gradients()
    before = norm_of(network)
    assert float(measure_and_clip(network, None, clip, accelerator())) == pytest.approx(before, rel=1e-6)
    assert norm_of(network) == pytest.approx(0.5 if clip == 0.5 else before, rel=1e-5)


def test_steps_that_a_scaler_leaves_out_are_counted():
    """torch's own scaler on the CPU: it leaves out a step whose gradients overflowed, and no other."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    numbers = MetricAccumulator(accelerator(scaler), single=True)
    norms, moved = [], []
    for step in range(4):
        network = network_with_gradients(1024.0)
        scaler.scale(torch.zeros(1))  # makes its factor
        factor = scaler.get_scale()
        for parameter in network.parameters():
            if parameter.grad is not None:
                parameter.grad *= factor / 1024.0
        norms.append(norm_of(network) / factor)
        if step == 2:
            network[0].weight.grad[0, 0] = torch.inf
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
        before = network[0].weight.detach().clone()
        norm = measure_and_clip(network, optimizer, 1.0, accelerator(scaler))
        scaler.step(optimizer)
        scaler.update()
        moved.append(not torch.equal(before, network[0].weight))
        numbers.add_step("model", torch.tensor(1.0), norm)
    assert moved == [True, True, False, True]
    found = numbers.flush()
    assert found["skipped_steps"] == 1
    assert found["gradient_norm"] == pytest.approx((norms[0] + norms[1] + norms[3]) / 3, rel=1e-5)


def test_spikes_and_norms_of_each_part():
    numbers = MetricAccumulator(accelerator(), single=False)
    for part, loss, norm in (("a", 1.0, 3.0), ("b", -2.0, 1.0), ("a", 8.0, 5.0), ("a", 3.0, 4.0)):
        numbers.add_step(part, torch.tensor(loss), torch.tensor(norm))
    assert numbers.flush() == {
        "a_loss": 4.0, "a_loss_max": 8.0, "a_gradient_norm": 4.0, "b_loss": -2.0, "b_loss_max": -2.0, "b_gradient_norm": 1.0,
    }  # fmt: skip
    assert numbers.flush() == {}


def test_an_interval_of_which_nothing_is_left():
    numbers = MetricAccumulator(accelerator(), single=False)
    numbers.add_step("a", torch.tensor(1.0), torch.tensor(torch.inf))
    numbers.add_step("b", torch.tensor(2.0), torch.tensor(1.0))
    assert numbers.flush() == {
        "b_loss": 2.0, "b_loss_max": 2.0, "b_gradient_norm": 1.0,
        "a_loss": None, "a_loss_max": None, "a_gradient_norm": None, "a_skipped_steps": 1,
    }  # fmt: skip
    numbers.add_step("a", torch.tensor(1.0), torch.tensor(torch.inf))
    assert numbers.flush()["a_skipped_steps"] == 1


def test_the_curves_show_the_norm():
    line = {"images": 16, "learning_rate": 1e-3, "loss": 1.0, "loss_max": 2.0, "gradient_norm": 3.0, "skipped_steps": 0}
    panels = evaluation._numbers([line, {**line, "images": 32}], ())
    assert [(panel.title, list(panel.series)) for panel in panels] == [("loss", ["loss"]), ("gradient norm", ["gradient norm"])]


# ---- collapse


def test_the_variance_is_that_over_images():
    images = np.random.default_rng(0).integers(0, 256, (60, 3, 4, 4), dtype=np.uint8)
    expected = images.astype(float).var(0).mean()
    assert spread_of(images) == pytest.approx(expected) == pytest.approx(spread_of_data(images))

    def share(process_group):
        spread = Spread()
        for start in range(20 * process_group.index, 20 * process_group.index + 20, 5):
            spread.add(images[start : start + 5])
        return spread.result(process_group)

    assert together(3, share) == [pytest.approx(expected)] * 3
    same = np.repeat(np.random.default_rng(1).integers(0, 256, (1, 3, 4, 4), dtype=np.uint8), 30, axis=0)
    assert spread_of(same) == pytest.approx(0, abs=1e-6) and Spread().result() == 0


def test_when_it_warns():
    look = {"images": 100, "variance": {"1": 0.5}}
    assert "warning" not in collapse.report([], 100, {"1": 0.01}, "")  # the first look of all
    assert "warning" not in collapse.report([look], 100, {"1": 0.01}, "")  # the same look
    assert "warning" not in collapse.report([look], 200, {"1": 0.01, "8": 0.3}, "")
    assert "warning" not in collapse.report([look], 200, {}, "")
    found = collapse.report([look], 200, {"1": 0.01, "8": 0.032}, "a prayer, ")
    assert found["variance"] == {"1": 0.01, "8": 0.032}
    assert "3.2 %" in found["warning"] and "a prayer" in found["warning"] and "optimizer.lr" in found["warning"]


def test_a_run_that_collapsed_says_so_and_goes_on(tmp_path, monkeypatch):
    """The samples become one grey; the looks are the previews and the figures."""
    original = evaluation.draw

    def grey(model, settings, indices, *more):
        images, labels = original(model, settings, indices, *more)
        return (torch.full_like(images, 100) if len(looks) > 1 else images), labels

    looks = []

    class Reporter(Quiet):
        def log(self, line):
            if "variance" in line:
                looks.append(line)

    monkeypatch.setattr(evaluation, "draw", grey)
    config = tiny(**{"run.preview_every": 32, "run.eval_num": 0, "run.eval_steps": [1], "data.conditional": False})
    reporter = Reporter()
    assert train(IMM, config, tmp_path / "run", reporter, device="cpu").finished
    assert [line["images"] for line in looks] == [32, 64, 96, 128]
    assert looks[-1]["variance"] == {"1": 0.0} and "loss.group_size" in looks[-1]["warning"]
    assert looks[-1]["warning"] in reporter.notes and "warning" not in looks[0]
    kept = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line for line in kept if "variance" in line] == looks
    assert Image.open(tmp_path / "run/curves.png").size[0] > 0


def test_figures_look_too(tmp_path, monkeypatch):
    monkeypatch.setattr(collapse, "LEAST", math.inf)
    reporter = Quiet()
    config = tiny(**{"run.eval_every": 64, "run.eval_num": 16, "run.eval_steps": [1], "train.max_images": 128})
    train(IMM, config, tmp_path / "run", reporter, device="cpu")
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    figures = [line for line in lines if "values" in line]
    assert [line["images"] for line in figures] == [64, 128] and all(line["variance"]["1"] > 0 for line in figures)
    assert "warning" in figures[1] and figures[1]["warning"] in reporter.notes
