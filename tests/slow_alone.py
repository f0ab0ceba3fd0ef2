"""A training on two processes whose collectives give up after some seconds, while what one process does alone takes longer:
decoding the data, drawing a picture, writing a checkpoint. `python slow_alone.py ARGUMENTS OF train-imm`
"""

from __future__ import annotations

import sys
import time
from datetime import timedelta

SECONDS = 8


def slowly(module, name: str) -> None:
    original = getattr(module, name)

    def slow(*arguments, **options):
        print("alone:", name, flush=True)
        time.sleep(SECONDS + 2)
        return original(*arguments, **options)

    setattr(module, name, slow)


if __name__ == "__main__":
    import torch.distributed as dist

    from mmgen.cli import app
    from mmgen.data import cache
    from mmgen.training import checkpoint, evaluation

    dist.init_process_group("gloo", timeout=timedelta(seconds=SECONDS))
    assert dist.get_world_size() == 2
    slowly(cache, "_write")
    slowly(evaluation, "picture")
    slowly(checkpoint, "write_state")
    app(["train-imm", *sys.argv[1:]], standalone_mode=False)
