"""What a GPU does with mmgen, in one command: numerics, golden arrays, resuming, compilation, memory, speed, a training.

    python -m tests.gpu --minutes 9 --out gpu-report      # run it again to go on where it stopped
    python -m tests.gpu --only numerics --only presets --out gpu-report
    MMGEN_DATA_DIR=data python -m tests.gpu ...           # trains on data/cifar10, else on noise

It writes report.json after every section, report.md and speed.png. Without a GPU it runs small, which says only that it runs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mmgen.system.files import replacing

from .numerics import numerics
from .report import markdown, speed_picture
from .runs import compiled, golden, resume
from .speed import presets, profile
from .training import training

SECTIONS: dict[str, Callable[..., dict[str, Any]]] = {
    "golden": golden, "numerics": numerics, "resume": resume, "compile": compiled, "profile": profile,
    "presets": presets, "training": training,
}  # fmt: skip
OPTIONAL = ("diffusers", "transformers", "peft", "tensorboard", "datasets", "cleanfid")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="all of it ends by then; the training takes what is left")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--only", action="append", choices=list(SECTIONS), help="some sections; repeat for several")
    parser.add_argument("--preset", action="append", help="of the section `presets`, those whose name has this in it; repeat for several")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--features", default="auto", help="of the training's scores: as run.eval_features")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    device = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    small = device == "cpu"
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "report.json"
    report = json.loads(file.read_text()) if file.is_file() else {}
    report["machine"] = machine(device)
    for name in OPTIONAL:
        if importlib.util.find_spec(name) is None:
            print(f"{name} is not installed: what needs it is left out")
    for name in options.only or list(SECTIONS):
        left = 60 * options.minutes - (time.monotonic() - began)
        if "seconds" in report.get(name, {}):
            print(f"{name}: done before")
            continue
        if left < 20:
            print(f"{name}: no time left; run the command again to go on")
            continue
        run = partial(SECTIONS[name], device, small)
        if name == "presets":
            run = partial(run, names=options.preset or [""], before=report.get(name, {}), keep=partial(keep, options.out, report, name))
        if name == "training":
            root = os.environ.get("MMGEN_DATA_DIR")
            data = "cifar10" if root and (Path(root) / "cifar10").is_dir() and not small else None
            run = partial(run, max(left - 60, 20), options.out, data, options.features)
        report[name] = section(name, run)
        write(options.out, report)
    write(options.out, report)
    failed = [f"{name}: {text}" for name in SECTIONS for text in report.get(name, {}).get("failed", [])]
    print(*(failed or ["nothing failed"]), sep="\n")
    return bool(failed)


def keep(out: Path, report: dict[str, Any], name: str, found: dict[str, Any]) -> None:
    """What there is of a section that is not done: a report that is cut off goes on behind it."""
    report[name] = found
    write(out, report)


def section(name: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Its figures; an error is one of them."""
    start = time.monotonic()
    print(f"{name} ...", flush=True)
    try:
        found = run()
    except Exception:  # noqa: BLE001 a report says what fails and goes on
        found = {"failed": [traceback.format_exc()[-1500:]]}
    found["seconds"] = round(time.monotonic() - start, 1)
    print(f"{name}: {found['seconds']} s, {len(found['failed'])} failed", flush=True)
    return found


def machine(device: str) -> dict[str, Any]:
    if device == "cpu":
        return {"device": "cpu", "torch": torch.__version__, "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(0)
    return {"device": properties.name, "memory_gib": properties.total_memory / 2**30, "torch": torch.__version__}


def write(out: Path, report: dict[str, Any]) -> None:
    for name, content in (("report.json", json.dumps(report, indent=2) + "\n"), ("report.md", markdown(report))):
        with replacing(out / name) as temporary:
            temporary.write_text(content)
    picture = speed_picture(report)
    if picture is not None:
        picture.save(out / "speed.png")


if __name__ == "__main__":
    raise SystemExit(main())
