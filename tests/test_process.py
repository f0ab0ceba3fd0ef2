"""The process's memory: what a step frees is there for the next one, also beyond what glibc keeps by itself."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
from mmgen.system.process import keep_large_blocks, tune
tune()
if "large" in sys.argv:
    keep_large_blocks()
import torch
def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    several = [torch.ones(int(sys.argv[1]) * 2**18) for _ in range(3)]  # MiB
    del several
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(max([pages() for _ in range(12)][8:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's malloc")
@pytest.mark.parametrize("size, large, fetched", [("24", "", False), ("64", "", True), ("64", "large", False)])
def test_freed_memory_is_kept(size, large, fetched):
    run = subprocess.run([sys.executable, "-c", FAULTS, size, large], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    least = int(size) * 3 // 2  # pages of 2 MiB, the largest kind
    assert int(run.stdout) >= least if fetched else int(run.stdout) < least // 2
