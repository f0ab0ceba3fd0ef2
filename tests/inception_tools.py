"""Inception's networks, for tests."""

from __future__ import annotations

import urllib.error
from pathlib import Path

import pytest
from tiny_inception import write_inception, write_pytorch_inception

from mmgen.metrics.inception import SCRIPT, WEIGHTS


def refuse(*_, **__):
    raise urllib.error.URLError("Name or service not known")


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Path:
    """A folder with full-size random networks under the published names."""
    pytest.importorskip("cleanfid.inception_pytorch")
    folder = tmp_path_factory.mktemp("full")
    write_inception(folder / SCRIPT, tiny=False)
    write_pytorch_inception(folder / WEIGHTS)
    return folder
