"""Kills commands with SIGKILL at random moments and restarts them: nothing may be lost, half-written, or come out differently.

    python -m tests.chaos                      # 50 kills over seven commands, and a table
    python -m tests.chaos --only sample,convert --rounds 10 --seed 1

Each command first runs undisturbed, which gives the result to compare with and the moments worth killing at: random ones of its
duration, and signs, which are changes among the files it leaves, such as a temporary one that appears. Then it is killed and
restarted by the same command, again and again, until it comes to its end; and anew, until it was killed often enough.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS))
import forks  # noqa: E402
PHASES = ("start-up", "at work", "writing")
KILLS_IN_A_ROW = 4  # of one output, before it may come to its end
CPU = ["--device", "cpu"]
TINY = [
    *CPU, "--set", "network.model_channels=8", "--set", "network.channel_mult=[1]", "--set", "network.attn_resolutions=[]",
    "--set", "network.dropout=0.1",
]  # fmt: skip
RUN = [
    "--batch-size", "16", "--max-images", "480", "--checkpoint-every", "96", "--eval-every", "192", "--eval-num", "32",
    "--preview-every", "144", "--set", "run.log_every=1", "--set", "run.eval_features=pixels", "--set", "run.batch_per_device=64",
]  # fmt: skip
DISTILL = ["distill", "--device", "cpu", "--teacher", "teacher.safetensors", "--teacher-steps", "4", "--steps", "2", *RUN]
EVERY = 96


@dataclass(frozen=True)
class Job:
    """A command, without its output; what that is called in a folder of its own; which files must be the same in the end."""

    name: str
    command: list[str]
    out: str = "out"
    trains: bool = False


JOBS = {
    job.name: job
    for job in (
        Job("train-imm", ["train-imm", *TINY, *RUN, "--set", "run.eval_steps=[1,2]", "--out"], trains=True),
        Job("train-teacher", ["train-teacher", *TINY, *RUN, "--set", "run.eval_steps=[2]", "--out"], trains=True),
        Job("distill", [*DISTILL, "--method", "alternating", "--out"], trains=True),
        Job("distill-instant", [*DISTILL, "--method", "instant", "--out"], trains=True),
        Job("sample", ["sample", "model.safetensors", *CPU, "--steps", "8", "--num", "400", "--batch-size", "20", "--out"]),
        Job("cache-latents", ["cache-latents", *CPU, "--data", "images", "--vae", "vae", "--batch-size", "8", "--out"]),
        Job("convert", ["convert", "dit.pt", "--type", "dit", "--overwrite"], "out.safetensors"),
    )
}  # fmt: skip


@dataclass
class Result:
    job: str
    kills: Counter = field(default_factory=Counter)  # by what the command was at
    resumed: int = 0  # restarts that went on from what was there
    whole: int = 0  # outputs compared, each with several kills behind it
    wrong: list[str] = field(default_factory=list)


def prepare(place: Path) -> None:
    """What the commands read."""
    import original_files
    from golden import state
    from tiny_model import make_denoiser, make_model
    from tiny_vae import write_images, write_vae

    make_denoiser(place / "teacher.safetensors", channels=1, num_classes=10)
    make_model(place / "model.safetensors", channels=1, num_classes=10)
    original_files.write_pt(place / "dit.pt", state("dit_learn_sigma"), wrap="ema", namespace={"num_heads": 4})
    write_images(place / "images", per_class=400)
    with contextlib.suppress(ImportError):  # diffusers is not installed: no cache-latents
        write_vae(place / "vae")


class Process:
    """The command at work in a folder, and how often its files have changed so far."""

    def __init__(self, job: Job, place: Path, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.out, self.folder, self.started = folder / job.out, folder, time.monotonic()
        self.process = forks.Process("-m", "mmgen", *job.command, self.out, cwd=place, MMGEN_CACHE=str(place / "cache"))
        self.changes, self._seen = 0, names(folder)

    def until(self, changes: float, seconds: float) -> bool:
        """Waits for that many changes or seconds, whichever is first; whether the process is still at work."""
        while self.process.poll() is None:
            found = names(self.folder)
            self.changes += found != self._seen
            self._seen = found
            if self.changes >= changes or time.monotonic() - self.started >= seconds:
                return True
            time.sleep(0.001)
        return False

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def said(self) -> str:
        return self.process.communicate()[1]


def names(folder: Path) -> frozenset[str]:
    """Of the files and folders down to the second level, where everything appears."""
    found = set()
    levels = [folder]
    for _ in range(3):
        below = []
        for one in levels:
            with contextlib.suppress(OSError), os.scandir(one) as entries:
                for entry in entries:
                    found.add(entry.path)
                    if entry.is_dir() and not entry.name.startswith(".tmp-"):
                        below.append(entry.path)
        levels = below
    return frozenset(found)


def checkpoints(out: Path) -> list[int]:
    return sorted(int(p.name) for p in (out / "checkpoints").glob("[0-9]*"))


def half_written(folder: Path) -> list[str]:
    """Files under their final names that cannot be read."""
    from PIL import Image
    from safetensors.torch import load_file

    from mmgen.training.checkpoint_sums import damage

    wrong = []
    for path in folder.rglob("*"):
        if any(part.startswith(".tmp-") for part in path.relative_to(folder).parts):
            continue
        try:
            if path.parent.name == "checkpoints" and (found := damage(path, set())) is not None:
                raise ValueError(found)
            if path.suffix == ".safetensors":
                load_file(path)
            elif path.suffix == ".png":
                Image.open(path).load()
            elif path.suffix == ".npy":
                np.load(path, allow_pickle=False)
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".jsonl":
                [json.loads(line) for line in path.read_text().split("\n")[:-1]]
        except Exception as error:  # whatever a reader stumbles over
            wrong.append(f"{path}: {error!r}")
    return wrong


def content(folder: Path) -> dict[str, str]:
    """What must come out the same: file -> its SHA-256, or its text without what tells of time."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or path.name in (".lock", "state.json"):
            continue
        if path.suffix in (".jsonl", ".json") and path.name in ("log.jsonl", "results.json"):
            found[name] = re.sub(r'(, )?"(seconds|images_per_second|flops_per_second|threads)": ([\d.e+]+|\{[^}]*\})', "", path.read_text())
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def stamps(out: Path) -> dict[Path, int]:
    """Samples and latents that are there: they may not be made twice."""
    found = [*out.glob("*.png"), *(out / "shards").glob("*.npy")] if out.is_dir() else []
    return {path: path.stat().st_mtime_ns for path in found if not path.name.startswith(".tmp-") and path.stem.isdecimal()}


def disturb(job: Job, kills: int, place: Path, chance: random.Random) -> Result:
    """Runs a job undisturbed, then kills it `kills` times in all."""
    result = Result(job.name)
    whole = Process(job, place, place / f"{job.name}-whole")
    whole.until(float("inf"), float("inf"))
    if whole.process.returncode:
        result.wrong.append(f"undisturbed, it ended with status {whole.process.returncode}: {whole.said()[-500:]}")
        return result
    duration, changes, expected = time.monotonic() - whole.started, whole.changes, content(whole.folder)
    expected = {name: text.replace(f"{job.name}-whole", "X") for name, text in expected.items()}
    round_ = 0
    while sum(result.kills.values()) < kills and not result.wrong:
        folder = place / f"{job.name}-{round_}"
        round_ += 1
        left = min(KILLS_IN_A_ROW, kills - sum(result.kills.values()))
        for attempt in range(left):
            one(job, result, place, folder, chance, attempt, duration, changes)
        finish(job, result, place, folder, expected)
        shutil.rmtree(folder, ignore_errors=True)
    return result


def one(
    job: Job, result: Result, place: Path, folder: Path, chance: random.Random, attempt: int, duration: float, changes: int
) -> None:
    """One start and, if it comes to that, one kill, with what must hold between."""
    number = sum(result.kills.values())
    before = checkpoints(folder / job.out) if job.trains else []
    there = stamps(folder / job.out)
    process = Process(job, place, folder)
    # Every fifth at any moment, start-up too; the others at a sign, a little after it
    limits = (
        (float("inf"), chance.uniform(0.2, 1) * duration) if number % 5 == 0 else (chance.randint(1, max(1, changes // 3)), 1e9)
    )
    if process.until(*limits):
        time.sleep(chance.choice((0, 0, 0.001, 0.003, 0.01)))
        process.kill()
        result.kills[phase(process, names(folder))] += 1
    elif process.process.returncode:
        result.wrong.append(f"{folder}: it ended with status {process.process.returncode}: {process.said()[-500:]}")
    check(job, result, process, folder, before, there)


def phase(process: Process, files: frozenset[str]) -> str:
    if process.changes == 0:
        return "start-up"
    return "writing" if any("/.tmp-" in name for name in files) else "at work"


def check(job: Job, result: Result, process: Process, folder: Path, before: list[int], there: dict[Path, int]) -> None:
    out, said = folder / job.out, process.said()
    result.wrong += half_written(folder)
    resumed = re.findall(r"resuming from \S*?(\d{12})", said)
    if resumed:
        result.resumed += 1
        if int(resumed[0]) != before[-1]:
            result.wrong.append(f"{folder}: resumed from {resumed[0]}, not from {before[-1]}")
    if there:
        result.resumed += 1
        now = stamps(out)
        changed = [str(path) for path, stamp in there.items() if now.get(path) != stamp]
        result.wrong += [f"{folder}: {len(changed)} files were made again, such as {changed[0]}"] if changed else []
    if job.trains and (out / "log.jsonl").is_file():
        logged = [json.loads(line)["images"] for line in (out / "log.jsonl").read_text().split("\n")[:-1]]
        if before and max(logged, default=0) < before[-1]:
            result.wrong.append(f"{folder}: began anew, with checkpoints {before}")
        lost = max(logged, default=0) - max(checkpoints(out), default=0)
        if lost > EVERY:
            result.wrong.append(f"{folder}: {lost} images after the last checkpoint are lost")


def finish(job: Job, result: Result, place: Path, folder: Path, expected: dict[str, str]) -> None:
    """Lets it come to its end, and compares."""
    before, there = checkpoints(folder / job.out) if job.trains else [], stamps(folder / job.out)
    process = Process(job, place, folder)
    process.until(float("inf"), float("inf"))
    if process.process.returncode:
        result.wrong.append(f"{folder}: it ended with status {process.process.returncode}: {process.said()[-500:]}")
        return
    check(job, result, process, folder, before, there)
    found = {name: text.replace(folder.name, "X") for name, text in content(folder).items()}
    differing = sorted(name for name in found.keys() | expected if found.get(name) != expected.get(name))
    result.wrong += [f"{folder}: other than undisturbed: {', '.join(differing[:5])}"] if differing else []
    result.whole += not differing


def table(results: list[Result]) -> str:
    head = ("command", "kills", "at start-up", "at work", "writing", "resumed", "compared", "wrong")
    rows = [
        (
            r.job,
            sum(r.kills.values()),
            *(r.kills[p] for p in ("start-up", "at work", "writing")),
            r.resumed,
            r.whole,
            len(r.wrong),
        )
        for r in results
    ]
    rows.append(("all", *(sum(row[i] for row in rows) for i in range(1, len(head)))))
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50, help="kills in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(JOBS), help="of " + ", ".join(JOBS))
    options = parser.parse_args()
    chosen = [JOBS[name] for name in options.only.split(",")]
    results = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        prepare(place)
        for i, job in enumerate(chosen):
            kills = options.rounds // len(chosen) + (i < options.rounds % len(chosen))
            results.append(disturb(job, kills, place, random.Random(f"{options.seed} {job.name}")))
            print(table(results[-1:]).splitlines()[2], flush=True)
    print(table(results))
    wrong = [text for result in results for text in result.wrong]
    print("\n".join(wrong) or "nothing lost, nothing half-written, all as undisturbed", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
