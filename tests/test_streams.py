"""What cannot be shown never ends the work: closed and full streams, pipes that nobody reads, terminals that hang up."""

import errno
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import forks
import original_files
import pytest
from broken_streams import KINDS
from golden import state
from PIL import Image
from safetensors import safe_open
from test_training import Quiet, tiny
from tiny_model import make_denoiser, make_model
from tiny_vae import write_images

from mmgen.sampling.record import read_record
from mmgen.training import run_folder
from mmgen.training.run_folder import RunFolder
from mmgen.methods import IMM
from mmgen.methods.run import train

TESTS = Path(__file__).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent)}
CPU = ["--device", "cpu"]
RUN = [
    *CPU, "--batch-size", "16", "--max-images", "32", "--eval-num", "16", "--set", "run.log_every=1",
    "--set", "run.eval_features=pixels",
]  # fmt: skip
TINY = ["--set", "network.model_channels=8", "--set", "network.channel_mult=[1]", "--set", "network.attn_resolutions=[]"]

# Command -> its arguments but for the last, which is the place of its output; a file that says that its work was done
COMMANDS = {
    "train-imm": ([*TINY, *RUN, "--set", "run.eval_steps=[1]", "--out"], "results.json"),
    "train-teacher": ([*TINY, *RUN, "--set", "run.eval_steps=[2]", "--out"], "results.json"),
    "distill": (["--teacher", "teacher.safetensors", "--teacher-steps", "2", "--steps", "2", *RUN, "--out"], "results.json"),
    "sample": (["model.safetensors", *CPU, "--num", "6", "--out"], "samples.json"),
    "fid": (["images/a", "--ref", "images/b", "--features", "pixels", *CPU, "--out"], ""),
    "convert": (["dit.pt", "--type", "dit"], ""),
    "inspect": (["dit.pt", "--type", "dit"], None),
    "cache-latents": (["--data", "images", "--vae", "vae", *CPU, "--out"], "latents.json"),
    "ema": (["--help"], None),
    "push": (["--help"], None),
    "--help": ([], None),
    "--version": ([], None),
}
SUFFIX = {"fid": ".json", "convert": ".safetensors"}
SAYS_NOTHING_MORE = "error: the standard output cannot be written: No space left on device\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("streams")
    make_denoiser(folder / "teacher.safetensors", channels=1, num_classes=10)
    make_model(folder / "model.safetensors", channels=1, num_classes=10)
    original_files.write_pt(folder / "dit.pt", state("dit_learn_sigma"), wrap="ema", namespace={"num_heads": 4})
    write_images(folder / "images", per_class=8)
    if importlib.util.find_spec("diffusers"):
        from tiny_vae import write_vae

        write_vae(folder / "vae")
    return folder


def output(name: str, kind: str) -> str:
    return f"{name}-{kind.replace(' ', '-')}{SUFFIX.get(name, '')}"


def kinds_of(name: str) -> list[str]:
    return ["pipe", "stdout full"] if COMMANDS[name][1] == "results.json" else list(KINDS)  # trainings take longest


@pytest.fixture(scope="module")
def results(place) -> dict[tuple[str, str], tuple[int, str]]:
    """(command, kind) -> the exit status, what it said."""
    if not Path("/dev/full").exists():
        pytest.skip("no device that is always full")
    keys = [(name, kind) for name in COMMANDS for kind in kinds_of(name) if name != "cache-latents" or (place / "vae").exists()]
    cases = []
    for name, kind in keys:
        arguments, done = COMMANDS[name]
        cases.append([kind, [name, *arguments, *([output(name, kind)] if done is not None else [])]])
    script = forks.run(TESTS / "broken_streams.py", json.dumps(cases), cwd=place, timeout=900, MMGEN_CACHE=str(place / "cache"))
    assert script.returncode == 0, script.stderr
    return dict(zip(keys, json.loads(script.stdout), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name, kind", [(name, kind) for name in COMMANDS for kind in kinds_of(name)])
def test_streams_that_do_not_work(name, kind, place, results):
    if (name, kind) not in results:
        pytest.skip("diffusers is not installed")
    (status, said), done, out = results[name, kind], COMMANDS[name][1], place / output(name, kind)
    full = kind == "stdout full"
    assert status == int(full), said
    assert "Traceback" not in said and "nterrupted" not in said and "Aborted" not in said, said
    assert said.count("error: ") == int(full) and (not full or said.endswith(SAYS_NOTHING_MORE)), said
    assert said or kind != "stderr full"  # the result
    if done is not None:
        assert (out / done).is_file() if done else out.is_file()
    if done == "results.json":
        assert (out / "checkpoints/000000000032/state.json").is_file() and (out / "samples.png").is_file()


def test_without_python_between(tmp_path):
    """As a shell starts it; the first line of many is enough for `head`."""
    mmgen = f"{sys.executable} -m mmgen"
    for command, status in (
        (f"{mmgen} train-imm --help | head -1 >first; exit ${{PIPESTATUS[0]}}", 0),
        (f"{mmgen} --help >&- 2>&- <&-", 0),
        (f"{mmgen} --help >/dev/full 2>&1", 1),
    ):
        result = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
        assert (result.returncode, result.stdout, result.stderr) == (status, "", ""), command
    assert (tmp_path / "first").read_text().count("\n") == 1


# ---- hang-ups


def on_a_terminal(arguments, folder) -> tuple[forks.Process, int]:
    """The command at a terminal of its own, which it controls; the other end of that."""
    ours, theirs = os.openpty()
    process = forks.Process("-m", "mmgen", *arguments, cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs, own_terminal=True)
    os.close(theirs)
    return process, ours


def until(ready, process, terminal, seconds=90) -> str:
    """Reads what the terminal shows until it is time."""
    shown, end = b"", time.monotonic() + seconds
    os.set_blocking(terminal, False)
    while not ready() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
        try:
            shown += os.read(terminal, 1 << 16)
        except BlockingIOError:
            pass
    assert process.poll() is None, shown.decode()
    return shown.decode()


@pytest.mark.slow
def test_a_terminal_that_hangs_up_saves_the_training(tmp_path):
    log = tmp_path / "run/log.jsonl"
    options = ["--set", "run.log_every=1", "--batch-size", "16", "--max-images", "1000000", "--out", "run", *CPU, *TINY]
    process, terminal = on_a_terminal(["train-imm", *options], tmp_path)
    until(lambda: log.exists() and log.read_text().count("\n") > 2, process, terminal)
    os.close(terminal)
    assert process.wait(60) == 129
    (checkpoint,) = (tmp_path / "run/checkpoints").iterdir()
    last = json.loads(log.read_text().splitlines()[-1])
    assert int(checkpoint.name) == last["images"] and (checkpoint / "state.json").is_file()
    with safe_open(tmp_path / "run/model.safetensors", "pt") as file:
        assert len(list(file.keys())) > 10


@pytest.mark.slow
def test_nohup_is_obeyed(tmp_path):
    """A hang-up that is ignored stays so."""
    command = "-m", "mmgen", "train-imm", *TINY, *RUN, "--max-images", "320", "--out", "run"
    process = forks.Process(*command, cwd=tmp_path, ignored=signal.SIGHUP)
    log = tmp_path / "run/log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text()):
        time.sleep(0.01)
    process.send_signal(signal.SIGHUP)
    assert process.wait(90) == 0 and (tmp_path / "run/checkpoints/000000000320").is_dir()


@pytest.mark.slow
def test_a_terminal_that_hangs_up_leaves_whole_samples(place):
    out = place / "hung-up"
    process, terminal = on_a_terminal(["sample", "model.safetensors", *CPU, "--num", "4000", "--batch-size", "4", "--out", out], place)
    until(lambda: len(list(out.glob("0*.png"))) > 8, process, terminal)
    os.close(terminal)
    assert process.wait(60) == 129
    assert not read_record(out / "samples.json")["complete"] and not list(out.glob(".tmp-*"))
    for path in out.glob("0*.png"):
        Image.open(path).load()


# ---- a full disk under the log


def test_a_log_on_a_full_disk_does_not_end_the_training(tmp_path, monkeypatch):
    """It is said once, and the lines are there once there is room, each whole."""
    calls = []

    def full(path, mode="r"):
        if mode != "a":
            return open(path, mode)
        calls.append(path)
        if len(calls) in (2, 3, 6):
            with open(path, "a") as file:
                file.write('{"images": 4')
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return open(path, mode)

    monkeypatch.setattr(run_folder, "open", full, raising=False)
    reporter = Quiet()
    config = tiny(**{"run.log_every": 1, "run.eval_num": 0})
    assert train(IMM, config, tmp_path / "run", reporter, device="cpu").finished
    said = [note for note in reporter.notes if "log.jsonl" in note]
    assert len(said) == 2 and all("No space left on device" in note and "training goes on" in note for note in said)
    assert [line["images"] for line in RunFolder(tmp_path / "run").read_log()] == list(range(16, 161, 16))
