"""The embedded run, shortened, on cores that are idle, and beside one and two processes that work all the time.

Beside mmgen's own choice of threads stands the same run with all threads, as torch takes them.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator

from mmgen.system.process import cores

from .measuring import ROOT, Row, Size, temporary_folder

IMAGES = {"tiny": 256, "quick": 25_600, "full": 256_000}


def rows(size: Size, device: str) -> Iterator[Row]:
    names = ("idle", "beside one busy process", "beside two")
    for others, name in enumerate(names[:1] if size == "tiny" else names):
        with busy(others):
            ours, threads = speed("auto", IMAGES[size])
            plain, _ = speed(str(cores()), IMAGES[size])
        yield Row(f"train-imm --data digits, {name}", "images/s", ours, plain, ours / plain, note=f"threads at the end: {threads}")


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """So many other processes that never wait."""
    others = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def speed(threads: str, images: int) -> tuple[float, int]:
    """(images a second from the first step to the last, threads of the last step) of a run with this run.threads."""
    folder = temporary_folder() / "run"
    command = [sys.executable, "-m", "mmgen", "train-imm", "--data", "digits", "--device", "cpu", "--max-images", str(images)]
    settings = [f"run.threads={threads}", "run.eval_num=0", "run.preview_every=1000000000", "run.checkpoint_every=1000000000"]
    chosen = [part for setting in settings for part in ("--set", setting)]
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [*command, *chosen, "--out", str(folder)], cwd=ROOT, env=environment, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{' '.join(command[2:])} failed: {done.stdout[-2000:]}")
    lines = [json.loads(text) for text in (folder / "log.jsonl").read_text().splitlines()]
    last = [count for line in lines for count in line.get("threads", {}).values()][-1]
    return images / max(line["seconds"] for line in lines), last
