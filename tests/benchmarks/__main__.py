"""mmgen against plain references, side by side.

    python -m tests.benchmarks                      # all but fid, with small networks: a quarter of an hour on one core
    python -m tests.benchmarks --only imm --full    # the real networks; repeat --only for several
    python -m tests.benchmarks --json figures.json

Each line has mmgen's figure, the plain reference's, and how many times as good mmgen's is; then the peak memory (MiB) of a
process that does mmgen's part alone, and of one that does the plain part. Both sides run in turns in one process and the least
time of each counts. NOTES.md has figures, and what was tried.
"""

from __future__ import annotations

from mmgen.system.process import tune

tune()  # as the command does, before torch is loaded

import argparse  # noqa: E402
import importlib  # noqa: E402
import json  # noqa: E402
import platform  # noqa: E402
from dataclasses import asdict  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402

from mmgen.system.files import replacing  # noqa: E402

from .measuring import show  # noqa: E402

# name -> module: `rows(size, device)`, and `cases(size, device)` where sides are measured alone as well
BENCHMARKS = {"imm": "imm_step", "matching": "matching_step", "sampling": "sampling", "data": "pipeline",
              "startup": "startup", "first": "first_run", "scaling": "scaling", "text": "text_to_image", "fid": "fid"}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(BENCHMARKS), metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--full", action="store_true", help="the real sizes: hours on a CPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures go as well")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # the tests'
    parser.add_argument("--peak", nargs=3, metavar=("NAME", "CASE", "SIDE"), help=argparse.SUPPRESS)  # memory of one side
    options = parser.parse_args(arguments)
    size = "tiny" if options.tiny else "full" if options.full else "quick"
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.peak:
        run_one_side(*options.peak, size, device)
        return
    names = options.only or [name for name in BENCHMARKS if name != "fid"]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {device}, {platform.machine()}, {size}")
    rows = show(row for name in names for row in module(name).rows(size, device))
    if options.json:
        with replacing(options.json) as temporary:
            temporary.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


def module(name: str):
    return importlib.import_module(f".{BENCHMARKS[name]}", __package__)


def run_one_side(name: str, case: str, side: str, size: str, device: str) -> None:
    """Twice, so that what is kept for the next step is counted."""
    (found,) = (one for one in module(name).cases(size, device) if one.name == case)
    run = getattr(found, side)()
    run()
    run()


if __name__ == "__main__":
    main()
