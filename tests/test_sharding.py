"""Sharded by FSDP2 over two processes, networks train to the weights of one process, and files are those of one."""

import json
import subprocess
from pathlib import Path

import forks
import pytest
import torch
from safetensors.torch import load_file
from tiny_model import changed, make_denoiser

from mmgen.errors import ConfigError
from mmgen.networks import EDM2Settings, build_network
from mmgen.training.sharding import shard

pytestmark = pytest.mark.slow

on_cpu = pytest.mark.skipif(torch.__version__ < "2.7", reason="torch 2.6 shards on GPUs only")
TINY_DIT = ["network.kind=dit", "network.patch_size=2", "network.hidden_size=32", "network.depth=2", "network.num_heads=2"]
IMM = [
    "train-imm", "--device", "cpu", "--batch-size", "16", "--batch-per-device", "4", "--checkpoint-every", "64",
    "--set", "run.eval_num=32", "--set", "run.eval_steps=[1]", *(word for s in TINY_DIT for word in ("--set", s)),
]  # fmt: skip


def run(cwd: Path, *command: str, launcher=(), fsdp: dict | None = None) -> subprocess.CompletedProcess:
    return forks.run(*launcher, "-m", "mmgen", *command, cwd=cwd, timeout=300, **(fsdp or {}))


def sharded(cwd: Path, *command: str) -> None:
    result = run(cwd, *command, launcher=forks.TWO, fsdp={"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"})
    assert result.returncode == 0, result.stderr
    assert "= 2 device" in result.stderr  # the batch is shared by two


def assert_close(found: Path, expected: Path, relative: float = 1e-4) -> None:
    """The same but for the order of float32 sums, which Adam enlarges where a gradient is near 0."""
    found, expected = load_file(found), load_file(expected)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if key.endswith("qkv.bias"):  # a bias of the keys changes nothing: its gradient is rounding, which Adam makes steps of
            continue
        assert (found[key] - value).norm() <= relative * value.norm() + 1e-7, key


@on_cpu
def test_imm_sharded_is_imm(tmp_path):
    """Weights, averages and optimiser states; gradients are added up over two rounds on each process, which recomputes blocks."""
    assert run(tmp_path, *IMM, "--max-images", "128", "--out", "one").returncode == 0
    sharded(tmp_path, *IMM, "--max-images", "128", "--set", "run.gradient_checkpointing=true", "--out", "two")
    assert_close(tmp_path / "two/model.safetensors", tmp_path / "one/model.safetensors")
    one, two = (next((tmp_path / name / "checkpoints").glob("*128")) for name in ("one", "two"))
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in two.iterdir())
    for file in ("network.safetensors", "optimizer.safetensors"):
        assert_close(two / file, one / file)
    figures = [json.loads((tmp_path / name / "results.json").read_text())["values"]["1"] for name in ("one", "two")]
    assert figures[0] == pytest.approx(figures[1], rel=1e-3)


@on_cpu
def test_bf16_sharded(tmp_path):
    """Two steps in bfloat16, of a size that is found: weights, averages and optimiser states are float32, whole and finite."""
    command = [*IMM, "--max-images", "32", "--precision", "bf16", "--set", "run.eval_num=0", "--set", "run.log_every=1"]
    result = run(
        tmp_path, *command, "--batch-per-device", "auto", "--set", "run.gradient_checkpointing=true", "--out", "run",
        launcher=forks.TWO, fsdp={"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "batch_per_device auto: 8 images in a pass (estimated" in result.stderr
    checkpoint = tmp_path / "run/checkpoints/000000000032"
    names = {path.name for path in checkpoint.glob("*.safetensors")}
    assert names == {"network.safetensors", "optimizer.safetensors", "ema-0.99.safetensors"}
    shapes = {key: value.shape for key, value in load_file(tmp_path / "run/model.safetensors").items()}
    for name in names:
        tensors = load_file(checkpoint / name)
        assert all(value.dtype in (torch.float32, torch.int64) and value.isfinite().all() for value in tensors.values()), name
        assert name == "optimizer.safetensors" or {key: value.shape for key, value in tensors.items()} == shapes
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 2 and all(0 < loss < 100 for loss in losses)


@on_cpu
def test_goes_on_sharded_and_whole_again(tmp_path):
    """64 images on one process, 64 sharded on two, 64 on one again: as 192 on one."""
    assert run(tmp_path, *IMM, "--max-images", "192", "--out", "straight").returncode == 0
    assert run(tmp_path, *IMM, "--max-images", "64", "--out", "turns").returncode == 0
    sharded(tmp_path, *IMM, "--max-images", "128", "--out", "turns")
    assert run(tmp_path, *IMM, "--max-images", "192", "--out", "turns").returncode == 0
    assert_close(tmp_path / "turns/model.safetensors", tmp_path / "straight/model.safetensors")


@on_cpu
def test_distillation_on_two_processes_is_that_on_one(tmp_path):
    """Student, auxiliary, teacher and guide, sharded, and the table at the end. With a copy on each: test_processes.py; the instant method: test_matrix.py."""
    for name in ("teacher", "guide"):
        make_denoiser(tmp_path / f"{name}.safetensors", channels=1, num_classes=10)
    changed(tmp_path / "guide.safetensors")
    command = [
        "distill", "--teacher", "teacher.safetensors", "--guide", "guide.safetensors", "--guidance", "2", "--method", "alternating", "--steps", "2", "--device", "cpu",
        "--batch-size", "16", "--batch-per-device", "4", "--max-images", "96", "--eval-num", "32", "--teacher-steps", "4",
        "--set", "optimizer.warmup_images=16", "--lr", "1e-3",
    ]  # fmt: skip
    one = run(tmp_path, *command, "--out", "one")
    assert one.returncode == 0, one.stderr
    sharded(tmp_path, *command, "--out", "two")
    folder = Path("checkpoints/000000000096")
    for file in ("network", "auxiliary"):
        assert_close(tmp_path / "two" / folder / f"{file}.safetensors", tmp_path / "one" / folder / f"{file}.safetensors")
    results = [json.loads((tmp_path / name / "results.json").read_text())["comparison"]["rows"] for name in ("one", "two")]
    assert len(results[0]) == len(results[1]) >= 4
    for row, other in zip(*results, strict=True):
        assert row["value"] == pytest.approx(other["value"], rel=1e-3)


@pytest.mark.parametrize("fsdp, words", [
    ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "--fsdp_version 2"),
    ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "not supported"),
    ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed is not supported"),
])  # fmt: skip
def test_what_is_not_supported_is_said(tmp_path, fsdp, words):
    result = run(tmp_path, *IMM, "--max-images", "32", "--out", "run", fsdp=fsdp)
    assert result.returncode == 2 and words in result.stderr and "Traceback" not in result.stderr


def test_a_network_of_single_numbers_is_refused():
    """FSDP2 would say so in a traceback."""
    settings = EDM2Settings(model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=(), channels_per_head=8)
    with pytest.raises(ConfigError, match="a network of kind 'edm2' cannot be sharded"):
        shard(build_network(settings, resolution=8, channels=1, second_time=False))
