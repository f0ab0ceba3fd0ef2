"""What the command line does before it loads torch, for tests that train in this process; and fixtures of several files."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from pathlib import Path

import pytest

from mmgen.system.process import tune

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of networks as small as these a second thread costs more than it gains
tune()


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps its device and precision for the whole process, of which every test is to begin anew."""
    yield
    if (state := sys.modules.get("accelerate.state")) is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)


def pytest_configure(config) -> None:
    """`python -m pytest` runs the fast part. What is named runs whole: `python -m pytest tests` is everything."""
    config.addinivalue_line("markers", "slow: left out by `python -m pytest` without a file or folder")
    if config.args_source is not config.ArgsSource.ARGS and not config.option.markexpr:
        config.option.markexpr = "not slow"


@pytest.fixture(autouse=True, scope="module")
def freed_memory():
    """Trainings in this process tell malloc to keep every block (`keep_large_blocks`): given back here, as no process ends."""
    yield
    gc.collect()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A cache of the test's own, and a folder of its own to work in."""
    monkeypatch.setenv("MMGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MMGEN_INCEPTION", "")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def digits_model(tmp_path_factory) -> Path:
    from tiny_model import NAMES, make_model  # here: torch is not to be loaded before tune

    folder = tmp_path_factory.mktemp("run")
    return make_model(folder / "model.safetensors", channels=1, num_classes=10, class_names=NAMES, class_counts=[5] * 10)


@pytest.fixture(scope="module")
def tiny_network(tmp_path_factory) -> tuple[Path, str]:
    """(file, SHA-256) of a stand-in for the published Inception."""
    from tiny_inception import write_inception

    path = tmp_path_factory.mktemp("inception") / "inception-2015-12-05.pt"
    return path, write_inception(path)


@pytest.fixture
def published(tiny_network, monkeypatch) -> Path:
    """The stand-in, taken for the published network."""
    from mmgen.metrics import inception

    path, digest = tiny_network
    monkeypatch.setitem(inception.PUBLISHED, path.name, digest)
    return path


tried: list[str] = []  # hostile inputs of all processes of `pytest -n`


def pytest_sessionfinish(session) -> None:
    if (hostile := sys.modules.get("hostile")) is not None:
        tried.extend(hostile.tried)
    if hasattr(session.config, "workeroutput"):  # a process of pytest-xdist: what it leaves here reaches the one that prints
        session.config.workeroutput["hostile"] = tried


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
    tried.extend(getattr(node, "workeroutput", {}).get("hostile", []))  # none of a process that crashed


def pytest_terminal_summary(terminalreporter) -> None:
    if tried:
        terminalreporter.write_line(f"{len(tried):,} hostile inputs were tried, {len(set(tried)):,} of them different")
