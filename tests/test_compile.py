"""Compilation: how often it happens, and that it changes no result. With a backend that only counts, so no C++ compiler is needed."""

import sys
from dataclasses import replace
from pathlib import Path

import forks
import pytest
import torch
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from tiny_model import make_model

sys.path.insert(0, str(Path(__file__).parents[1]))

from mmgen.networks import DiTSettings, UNetSettings, UViTSettings, build_network  # noqa: E402
from mmgen.networks.conditions import Labels  # noqa: E402
from mmgen.models.compilation import compile_network  # noqa: E402
from mmgen.methods.distill import method as distill  # noqa: E402
from mmgen.training import loop  # noqa: E402
from mmgen.training.batches import fetch  # noqa: E402
from tests.gpu.cases import random_teacher, tiny_case, tiny_settings  # noqa: E402

NETWORKS = {
    "dit": DiTSettings(hidden_size=32, depth=1, num_heads=2, patch_size=2),
    "uvit": UViTSettings(model_channels=32, channel_mult=(1, 2), num_blocks=(1,), depth=1, channels_per_head=32, dropout=0.0),
    "unet": UNetSettings(model_channels=16, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(8,), dropout=0.0),
}


def graphs(settings) -> int:
    """How many a step of IMM compiles: a pass with gradient, and one without."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    network = build_network(settings, resolution=16, channels=3, num_classes=10)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    inputs = torch.randn(2, 3, 16, 16), *torch.rand(2, 2, dtype=torch.float64), Labels(torch.tensor([1, 2]), 10)
    expected, keys, counter = network(*inputs), list(network.state_dict()), CompileCounter()
    compile_network(network, counter)
    torch.testing.assert_close(network(*inputs), expected)
    with torch.no_grad():
        torch.testing.assert_close(network(*inputs), expected)
    assert list(network.state_dict()) == keys
    return counter.frame_count


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dit", "uvit"])
def test_a_deep_transformer_compiles_no_more_than_a_shallow_one(kind):
    shallow, deep = (graphs(replace(NETWORKS[kind], depth=depth)) for depth in (1, 6))
    # A UViT has beside it a block on the way down, one on the way up with a skip connection, and two changes of the side
    assert shallow == deep == {"dit": 2, "uvit": 2 * 5}[kind]


@pytest.mark.slow
def test_a_unet_is_compiled_whole():
    assert graphs(NETWORKS["unet"]) == 2


def test_a_run_compiles_all_of_its_networks(monkeypatch):
    """The frozen ones too, before anything is computed."""
    compiled = []
    monkeypatch.setattr(loop, "compile_network", compiled.append)
    monkeypatch.setattr(distill, "compile_network", compiled.append)
    guided = {"teacher.guide": str(random_teacher("cifar10-teacher", tiny_settings("unet"))), "teacher.guidance": 2.0}
    for method in ("alternating", "instant, forward"):
        for changes in ({}, guided):
            trainer = tiny_case(method, "unet", **changes).make("cpu", "fp32", 8, **{"run.compile": True})
            teacher = next(iter(trainer.task.trained.values())).objective.matching.teacher
            frozen = [teacher.network, *([teacher.guide.network] if changes else [])]
            expected = {id(network) for network in (*frozen, *trainer.networks.values())}
            assert {id(network) for network in compiled} == expected and len(compiled) == len(expected)
            compiled.clear()
    tiny_case("alternating", "unet").make("cpu", "fp32", 8)
    assert not compiled


@pytest.mark.slow
@pytest.mark.parametrize("network", ["unet", "dit"])
@pytest.mark.parametrize("derivative", ["forward", "finite"])
def test_a_compiled_teacher_has_the_gradients_and_products_of_the_eager_one(network, derivative):
    """Of the instant method: its weights are arguments there, and it is asked in forward mode."""
    torch._dynamo.reset()
    trainer, counter = tiny_case(f"instant, {derivative}", network).make("cpu", "fp32", 8), CompileCounterWithBackend("aot_eager")
    objective, batch = trainer.task.trained["model"].objective, fetch(trainer.dataset, 0, 8, 0, torch.device("cpu"))

    def found():
        objective.rehearse(batch)
        loss, _ = objective(batch)
        return [*objective.direction.values(), *torch.autograd.grad(loss, list(objective.student.network.parameters()))]

    expected = found()
    compile_network(objective.matching.teacher.network, counter)
    for ours, theirs in zip(found(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6 * theirs.abs().max().item())
    assert counter.frame_count


@pytest.mark.slow
def test_without_a_compiler_one_sentence_says_so(tmp_path):
    model = make_model(tmp_path / "model.safetensors", channels=1)
    environment = {"PATH": "", "CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    command = "-m", "mmgen", "sample", model, "--num", "1", "--compile", "--out", tmp_path / "grid.png"
    done = forks.run(*command, **environment)
    assert done.returncode == 1 and done.stderr.startswith("error: torch.compile does not work here, leave out --compile: ")
    assert done.stderr.count("\n") == 1
