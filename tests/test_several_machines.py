"""examples/slurm.sh and multi_node.sh: two machines that are one, on CPUs; and what accelerate is told where there are GPUs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import forks
import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
TRAIN = [
    "train-imm", "--batch-size", "16", "--batch-per-device", "8", "--max-images", "64", "--eval-num", "0",
    "--set", "network.model_channels=8", "--set", "network.channel_mult=[1]", "--set", "run.threads=1", "--out",
]  # fmt: skip


def program(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)


def environment(path: Path, **more: str) -> dict[str, str]:
    place = f"{path}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": place, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


@pytest.mark.slow
def test_a_job_on_two_machines_trains_as_one_process(tmp_path):
    """Slurm's commands are played: srun starts the command on each of two machines, both of them this one."""
    program(tmp_path / "bin", "scontrol", "echo localhost; echo elsewhere")
    program(tmp_path / "bin", "srun", 'shift; for n in 0 1; do SLURM_NODEID=$n "$@" & all="$all $!"; done; for one in $all; do wait $one || exit 1; done')
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    slurm = {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "[a-b]", "GPUS": "0", "PORT": port, "SCRIPT": str(ROOT / "examples/multi_node.sh")}
    played = environment(tmp_path / "bin", **slurm, **forks.places())
    result = subprocess.run(["bash", str(ROOT / "examples/slurm.sh"), *TRAIN, str(tmp_path / "two")], env=played, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr
    assert "= 2 devices x 1 accumulation step x 8" in result.stderr
    alone = forks.run("-m", "mmgen", *TRAIN, tmp_path / "one", "--device", "cpu", timeout=400)
    assert alone.returncode == 0, alone.stderr
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(value, two[key]) for key, value in one.items())


def test_what_accelerate_is_told(tmp_path):
    program(tmp_path / "bin", "accelerate", 'printf "%s\\n" "$@"')
    told = environment(tmp_path / "bin", NODES="2", NODE="1", MASTER="10.0.0.1", GPUS="8", LAUNCH="--use_fsdp --fsdp_version 2")
    command = ["bash", str(ROOT / "examples/multi_node.sh"), "train-imm", "--data", "a folder/"]
    words = subprocess.run(command, env=told, capture_output=True, text=True, check=True).stdout.splitlines()
    found = launch_command_parser().parse_args(words[1:])
    assert words[0] == "launch" and (found.num_machines, found.machine_rank, found.num_processes) == (2, 1, 16)
    assert (found.main_process_ip, found.main_process_port, found.use_fsdp, found.multi_gpu) == ("10.0.0.1", 29500, True, True)
    assert found.module and [found.training_script, *found.training_script_args] == ["mmgen", "train-imm", "--data", "a folder/"]


@pytest.mark.parametrize("name", ["NODES", "NODE", "MASTER"])
def test_what_is_missing_is_named(name, tmp_path):
    given = {"NODES": "2", "NODE": "0", "MASTER": "localhost", "GPUS": "0"}
    del given[name]
    result = subprocess.run(["bash", str(ROOT / "examples/multi_node.sh")], env=environment(tmp_path, **given), capture_output=True, text=True)
    assert result.returncode != 0 and f"{name}: " in result.stderr


def test_the_scripts_are_what_bash_takes():
    for name in ("slurm.sh", "multi_node.sh"):
        assert subprocess.run(["bash", "-n", str(ROOT / "examples" / name)]).returncode == 0
