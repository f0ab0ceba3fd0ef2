"""The short form of `python -m tests.chaos`: a training and a sampling, killed twice each and restarted."""

import random

import chaos
import pytest

pytestmark = pytest.mark.slow


@pytest.mark.skipif(not hasattr(chaos.signal, "SIGKILL"), reason="this system has no SIGKILL")
@pytest.mark.parametrize("name", ["train-imm", "sample"])
def test_killed_and_restarted_is_undisturbed(name, tmp_path):
    chaos.prepare(tmp_path)
    result = chaos.disturb(chaos.JOBS[name], 2, tmp_path, random.Random(1))
    assert result.wrong == [] and sum(result.kills.values()) == 2 and result.whole >= 1
