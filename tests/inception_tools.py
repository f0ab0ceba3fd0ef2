"""Inception's networks, for tests."""

from __future__ import annotations

import urllib.error
import urllib.request
from pathlib import Path

import pytest
from tiny_inception import write_inception, write_pytorch_inception

from mmgen.metrics import inception
from mmgen.metrics.inception import SCRIPT, WEIGHTS


def refuse(*_, **__):
    raise urllib.error.URLError("Name or service not known")


@pytest.fixture(autouse=True)
def nothing_found(tmp_path, monkeypatch):
    """No weights of this machine are found, and nothing is downloaded."""
    monkeypatch.setenv("MMGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("MMGEN_INCEPTION", raising=False)
    monkeypatch.setattr(inception, "_elsewhere", lambda name: [tmp_path / "elsewhere"])
    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Path:
    """A folder with full-size random networks under the published names."""
    pytest.importorskip("cleanfid.inception_pytorch")
    folder = tmp_path_factory.mktemp("full")
    write_inception(folder / SCRIPT, tiny=False)
    write_pytorch_inception(folder / WEIGHTS)
    return folder
