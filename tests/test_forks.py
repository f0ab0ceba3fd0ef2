"""Forks in place of processes do not hide what went wrong: status, streams, folder, environment and signals are the command's own."""

from __future__ import annotations

import signal
import subprocess

import forks
import pytest

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("code, status, out, error", [
    ("print('said')", 0, "said", ""),
    ("import sys; sys.exit(5)", 5, "", ""),
    ("import sys; sys.exit('why')", 1, "", "why"),
    ("raise ValueError('broken')", 1, "", "ValueError: broken"),
    ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM, "", ""),
    ("import threading; threading.Timer(0.2, print, ['late']).start()", 0, "late", ""),
])  # fmt: skip
def test_how_a_command_ends(code, status, out, error):
    done = forks.run("-c", code)
    assert (done.returncode, done.stdout.strip()) == (status, out)
    assert error in done.stderr and (error or not done.stderr)


@pytest.mark.parametrize("how, said", [({}, ""), ({"FORKS_END": "as Python does"}, "taken apart")])
def test_modules_are_taken_apart_only_where_that_is_asked_for(how, said):
    code = """
import os
class Last:
    def __del__(self, write=os.write):
        write(1, b"taken apart")
os.last = Last()
"""
    done = forks.run("-c", code, **how)
    assert (done.returncode, done.stdout, done.stderr) == (0, said, "")


def test_the_folder_the_arguments_and_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("GONE", "1")
    code = "import os, sys; print(os.getcwd(), sys.argv[1:], os.environ['GIVEN'], 'GONE' in os.environ)"
    assert forks.run("-c", code, "a", cwd=tmp_path, GIVEN="x", GONE=None).stdout == f"{tmp_path} ['a'] x False\n"


def test_one_that_does_not_end_is_killed():
    with pytest.raises(subprocess.TimeoutExpired):
        forks.run("-c", "import time; time.sleep(60)", timeout=0.5)
    process = forks.Process("-c", "import time; time.sleep(60)")
    process.kill()
    assert process.wait(10) == -signal.SIGKILL


def test_a_failure_of_one_of_two_processes_is_one_of_both(tmp_path):
    (tmp_path / "script.py").write_text("import os, sys; sys.exit(int(os.environ['RANK']))")
    assert forks.run(*forks.TWO, "script.py", cwd=tmp_path).returncode != 0
    (tmp_path / "script.py").write_text("import os; print(os.environ['WORLD_SIZE'])")
    done = forks.run(*forks.TWO, "script.py", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.count("2") == 2, done.stderr
