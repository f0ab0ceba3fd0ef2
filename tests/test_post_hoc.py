"""Averages under a power function: their profiles, and those made after training, against what defines them (arXiv:2312.02696)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from test_training import tiny
from toy_task import Quiet
from typer.testing import CliRunner

import mmgen
from mmgen.cli import app
from mmgen.errors import ConfigError, ModelError
from mmgen.methods import IMM
from mmgen.methods.run import train
from mmgen.models.files import read_config
from mmgen.models.post_hoc import find_snapshots, make_average
from mmgen.models.power_function import LONGEST, coefficients, exponent, inner_products
from mmgen.training.ema import EMA, ema_decays

LENGTHS = [0.05, 0.1]
RUN = {
    "train.ema_betas": [], "train.ema_half_lives": [], "train.ema_lengths": LENGTHS, "train.max_images": 16 * 32, "optimizer.lr": 3e-3,
    "run.snapshot_every": 16 * 2, "run.checkpoint_every": 16 * 12, "run.eval_num": 0,
}  # fmt: skip


def profile(length: float, end: int, steps: int) -> np.ndarray:
    """What each of `steps` steps counts in the average at step `end`: the integral of the power function over the step."""
    gamma, edges = exponent(length), np.minimum(np.arange(steps + 1), end) / end
    return np.diff(edges ** (gamma + 1))


@pytest.mark.parametrize("length, gamma", [(0.05, 16.97), (0.10, 6.94), (LONGEST, 0.0)])
def test_the_exponent_of_a_length(length, gamma):
    """The published pairs, and the standard deviation of the profile itself."""
    assert exponent(length) == pytest.approx(gamma, abs=5e-3)
    edges = np.linspace(0, 1, 200_001)
    weight, middle = np.diff(edges ** (exponent(length) + 1)), (edges[1:] + edges[:-1]) / 2
    mean = weight @ middle
    assert (weight @ (middle - mean) ** 2) ** 0.5 == pytest.approx(length, rel=1e-6)


def test_a_tracked_average_is_the_sum_over_its_profile():
    train, layer = tiny(**RUN).train, torch.nn.Linear(3, 2).double()
    ema, seen = EMA(layer, ema_decays(train)), []
    for step in range(50):
        with torch.no_grad():
            layer.weight.normal_()
        seen.append(layer.weight.detach().clone())
        ema.update(step * train.batch_size)
    for length in LENGTHS:
        expected = torch.einsum("s,sij->ij", torch.from_numpy(profile(length, 50, 50)), torch.stack(seen))
        torch.testing.assert_close(ema.averages[f"length{length:g}"]["weight"], expected, rtol=1e-12, atol=1e-12)


def test_inner_products_are_integrals():
    t, gamma = np.array([3.0, 10.0]), np.array([2.0, 17.0])
    edges = np.linspace(0, 10, 1_000_001)
    middle = (edges[1:] + edges[:-1]) / 2
    profiles = (gamma[:, None] + 1) * middle ** gamma[:, None] / t[:, None] ** (gamma[:, None] + 1) * (middle < t[:, None])
    expected = profiles @ profiles.T * (edges[1] - edges[0])
    np.testing.assert_allclose(inner_products(t, gamma, t, gamma), expected, rtol=1e-6)


@pytest.mark.parametrize("length", [0.05, 0.07, 0.1, 0.2])
def test_coefficients_are_a_least_squares_fit(length):
    """Of the profiles on a fine grid, by another solver; a length that was tracked is itself."""
    ends = [250 * i for i in range(1, 9) for _ in LENGTHS]
    found, error = coefficients(ends, LENGTHS * 8, 2000, length)
    fine = 10
    columns = np.stack([profile(each, fine * end, fine * 2000) for end, each in zip(ends, LENGTHS * 8, strict=True)], axis=1)
    wanted = profile(length, fine * 2000, fine * 2000)
    best = np.linalg.lstsq(columns, wanted, rcond=None)[0]
    np.testing.assert_allclose(found, best / best.sum(), atol=2e-3)
    assert error == pytest.approx(np.linalg.norm(columns @ found - wanted) / np.linalg.norm(wanted), abs=1e-3)
    if length in LENGTHS:
        np.testing.assert_allclose(found, [0] * 14 + [float(length == each) for each in LENGTHS], atol=1e-9)
    assert error < (1e-6 if length in LENGTHS else 0.1)  # few snapshots: 0.002 for 0.07, 0.08 for 0.2


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run, and another that tracks a third length as well; the same training."""
    folder = tmp_path_factory.mktemp("runs")
    for name, lengths in ("two", LENGTHS), ("three", [*LENGTHS, 0.08]):
        train(IMM, tiny(**RUN | {"train.ema_lengths": lengths}), folder / name, Quiet(), device="cpu")
        AcceleratorState._reset_state(reset_partial_state=True)
    return folder


def largest(a: dict, b: dict) -> float:
    return max(float((a[key].double() - b[key].double()).abs().max()) for key in a)


@pytest.mark.slow
def test_a_length_made_after_training_is_the_one_tracked_while_training(run):
    """To the distance of the profiles, times how far the weights moved meanwhile; a tracked length to float32."""
    tracked = load_file(run / "three/model-ema-length0.08.safetensors")
    own = load_file(run / "two/checkpoints/000000000512/network.safetensors")
    made = make_average(run / "two", 0.08)
    assert (made.images, made.snapshots) == (512, 32) and 0 < made.error < 0.01
    found = load_file(made.file)
    assert largest(found, tracked) < 0.01 * largest(tracked, own)
    again = make_average(run / "two", 0.1)
    assert largest(load_file(again.file), load_file(run / "two/model-ema-length0.1.safetensors")) < 1e-6
    config = read_config(made.file).training
    assert (config["ema"], config["images"], config["length"]) == ("posthoc0.08", 512, 0.08)
    assert mmgen.load(run / "two", ema="posthoc0.08").sample(2, steps=1).images.shape == (2, 1, 8, 8)


@pytest.mark.slow
def test_a_run_that_was_stopped_has_the_same_snapshots(run, tmp_path):
    """It goes on from image 192; snapshots of later images are of a training that did not happen."""
    folder = tmp_path / "run"
    train(IMM, tiny(**RUN | {"train.max_images": 16 * 15}), folder, Quiet(), device="cpu")
    assert [one.images for one in find_snapshots(folder)][-1] == 240
    AcceleratorState._reset_state(reset_partial_state=True)
    newest = folder / "checkpoints/000000000240"
    newest.rename(folder / "elsewhere")
    with pytest.raises(RuntimeError, match="stop"):
        train(IMM, tiny(**RUN), folder, Stopping(), device="cpu")
    AcceleratorState._reset_state(reset_partial_state=True)
    assert [one.images for one in find_snapshots(folder)][-1] == 192
    train(IMM, tiny(**RUN), folder, Quiet(), device="cpu")
    for one, other in zip(find_snapshots(folder), find_snapshots(run / "two"), strict=True):
        assert one.file.name == other.file.name and largest(load_file(one.file), load_file(other.file)) == 0


class Stopping(Quiet):
    def start(self, images, total):
        raise RuntimeError("stop")


def test_one_command_scores_several_lengths(run):
    command = ["fid", str(run / "two"), "--ema-lengths", "0.05,0.08", "--features", "pixels", "--num", "64", "--steps", "1"]
    printed = CliRunner().invoke(app, command, catch_exceptions=False).stdout
    assert "two, posthoc0.05" in printed and "two, posthoc0.08" in printed
    with pytest.raises(ConfigError, match="--ema and --ema-lengths: give one of them"):
        CliRunner().invoke(app, [*command, "--ema", "length0.1"], catch_exceptions=False)
    printed = CliRunner().invoke(app, ["ema", str(run / "two"), "--length", "0.06"], catch_exceptions=False).stdout
    assert "posthoc0.06" in printed and "--ema posthoc0.06" in printed


def test_what_cannot_be_averaged(run, tmp_path):
    with pytest.raises(ConfigError, match="between 0 and 0.2887, not 0.3"):
        make_average(run / "two", 0.3)
    with pytest.raises(ModelError, match="no snapshots to average: train with --set train.ema_lengths"):
        make_average(tmp_path, 0.1)
    with pytest.raises(ConfigError, match="train.ema_lengths must lie between 0 and 0.2887, not 0.5"):
        tiny(**{"train.ema_lengths": [0.5]})
    with pytest.raises(ConfigError, match="one length twice"):
        tiny(**{"train.ema_lengths": [0.1, 0.1]})
