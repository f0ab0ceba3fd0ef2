"""A run says when others have its cores, and only then."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from mmgen.training import contention
from mmgen.training.contention import CoreTime, Watch, read_core_times, waited_share

SECOND = 10**9


def times(**threads) -> dict[str, CoreTime]:
    return {name: CoreTime(int(ran * SECOND), int(waited * SECOND)) for name, (ran, waited) in threads.items()}


def test_share_of_the_wanted_time():
    before = times(main=(100, 50), ended=(5, 5))
    after = times(main=(106, 52), new=(1, 1))
    assert waited_share(before, after) == (pytest.approx(0.3), pytest.approx(10.0))
    assert waited_share(after, after) == (0.0, 0.0)


@pytest.mark.parametrize("looks, expected", [
    ([(0, 0), (10, 0.5), (20, 1.0), (30, 1.5)], []),  # an idle machine: 5 %
    ([(0, 0), (0.2, 0.1), (0.3, 0.2)], []),  # images are decoded by others, or data awaited: hardly any time was wanted
    ([(0, 0), (3, 1.5), (6, 4), (9, 8)], [2]),  # shared by halves, after 5 seconds, once
    ([(0, 30), (10, 30.1), (20, 45)], [2]),  # what was before the run began does not count
])  # fmt: skip
def test_says_it_once_and_only_with_reason(monkeypatch, looks, expected):
    """Each look is (seconds run, seconds waited) of the one thread since it began."""
    found = iter([times(main=look) for look in looks])
    monkeypatch.setattr(contention, "read_core_times", lambda: next(found))
    watch = Watch()
    said = [i for i in range(1, len(looks)) if watch.look(1) is not None]
    assert said == expected


def test_what_to_do():
    assert "60%" in contention.note(0.6, 1, 2) and "taskset" in contention.note(0.6, 1, 2)
    assert "OMP_NUM_THREADS=1; now 2" in contention.note(0.6, 2, 2)
    assert "4 threads on 2 cores: set OMP_NUM_THREADS=2" in contention.note(0.6, 4, 2)


def test_other_systems_count_nothing(tmp_path):
    assert read_core_times(tmp_path) == {}
    (tmp_path / "1").mkdir()
    (tmp_path / "1/schedstat").write_text("what is this")
    assert read_core_times(tmp_path) == {} and waited_share({}, {}) == (0.0, 0.0)


@pytest.mark.skipif(not read_core_times(), reason="this system does not count")
def test_linux_counts_what_two_processes_on_one_core_wait_for():
    """Three that work all the time on one core: this one waits for half of the time at least."""
    allowed = os.sched_getaffinity(0)
    work = f"import os; os.sched_setaffinity(0, {{{min(allowed)}}})\nwhile True: pass"
    others = [subprocess.Popen([sys.executable, "-c", work]) for _ in range(2)]
    try:
        os.sched_setaffinity(0, {min(allowed)})
        time.sleep(1)
        before, until = read_core_times(), time.process_time() + 0.3
        while time.process_time() < until:
            pass
        share, seconds = waited_share(before, read_core_times())
    finally:
        os.sched_setaffinity(0, allowed)
        for other in others:
            other.kill()
            other.wait()
    assert share > 0.4 and seconds > 0.5
