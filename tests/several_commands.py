"""Several commands of `mmgen`, one after the other in the processes that this script is launched with: loading torch takes longer
than they do. `python several_commands.py '[["train-imm", "--out", "run"], ...]'`
"""

from __future__ import annotations

import json
import sys

from mmgen.system.process import tune

if __name__ == "__main__":
    tune()
    from accelerate import Accelerator

    from mmgen.cli import app

    Accelerator.end_training = lambda self: None  # it would end the group of processes, which cannot be made twice
    for command in json.loads(sys.argv[1]):
        app(command, standalone_mode=False)
