"""Files of statistics as other tools write them, for tests."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from mmgen.errors import DataError, MmgenError
from mmgen.metrics.frechet import GaussianStatistics
from mmgen.metrics.references import read_reference, write_statistics

D = 8
FEATURES = np.random.default_rng(0).normal(size=(50, D)).astype(np.float32) + 3
MU, SIGMA = FEATURES.mean(0, dtype=np.float64), np.cov(FEATURES, rowvar=False)


def npz(path: Path, **arrays) -> Path:
    np.savez(path, **arrays)
    return path


def pkl(path: Path, content, protocol: int | None = None) -> Path:
    path.write_bytes(pickle.dumps(content, protocol))
    return path


def read(path: Path, **options):
    return read_reference(path, **{"dim": D, **options})


def refused(path: Path, error: type[MmgenError] = DataError, **options) -> str:
    with pytest.raises(error) as raised:
        read(path, **options)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)
    return str(raised.value)


def is_ours(reference) -> None:
    """The statistics are those above, to the last bit where they were stored in float64."""
    assert reference.gaussian.mean.dtype == reference.gaussian.covariance.dtype == torch.float64
    np.testing.assert_array_equal(reference.gaussian.mean, MU)
    np.testing.assert_array_equal(reference.gaussian.covariance, SIGMA)


def statistics() -> GaussianStatistics:
    result = GaussianStatistics()
    result.update(FEATURES)
    return result


TF = {"features": "inception", "mode": "tf"}


def edm2(**more) -> dict:
    other = {"mu": np.zeros(5), "sigma": np.eye(5)}
    return {"num_images": 1281167, "fid": {"mu": MU, "sigma": SIGMA}, "fd_dinov2": other, **more}


@pytest.fixture(params=[".safetensors", ".npz"])
def own(request, tmp_path) -> Path:
    path = tmp_path / f"reference{request.param}"
    protocol = {"features": "inception", "mode": "clean", "sha256": "f58c", "network": "inception-2015-12-05.pt"}
    write_statistics(path, statistics(), protocol, source="cifar10, train", fingerprint="abc")
    return path
