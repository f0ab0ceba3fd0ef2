"""Several commands of `mmgen`, one after the other in the processes that this script is launched with: loading torch takes longer
than they do. `python several_commands.py '[["train-imm", "--out", "run"], ...]'`

Each process then says in process-NUMBER.json what it was: {"size": how many they were, "seconds": until a collective gives up}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mmgen.system.process import tune


def report() -> None:
    import torch
    import torch.distributed as dist
    from accelerate import PartialState

    state, seconds = PartialState(), None
    if dist.is_initialized():
        seconds = dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    Path(f"process-{state.process_index}.json").write_text(json.dumps({"size": state.num_processes, "seconds": seconds}))


if __name__ == "__main__":
    tune()
    from accelerate import Accelerator

    from mmgen.cli import app

    Accelerator.end_training = lambda self: None  # it would end the group of processes, which cannot be made twice
    for command in json.loads(sys.argv[1]):
        app(command, standalone_mode=False)
    report()
