"""Extractors by TorchScript and pixels; files that are not what they say, or mean harm."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mmgen.errors import ConfigError, ModelError
from mmgen.formats.network_file import EXPORTED, STATE_DICT, TORCHSCRIPT, content
from mmgen.metrics.features import build_extractor
from mmgen.metrics.frechet import pixel_features
from mmgen.system.files import sha256_of

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, about its formats


def images(count: int, size: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


class Harm:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def script(module: nn.Module, path: Path) -> str:
    torch.jit.script(module).save(str(path))
    return str(path)


class Writes(nn.Module):
    def forward(self, x):
        torch.save(x, "harm")
        return x.float().flatten(1)


def test_a_torchscript_that_writes_files_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = script(Writes(), tmp_path / "writes.pt")
    with pytest.raises(ModelError, match="writes.pt holds a program that reads or writes files"):
        build_extractor(path)
    assert not (tmp_path / "harm").exists()


class Plain(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x):
        means = x.float().mean((2, 3), keepdim=True)
        if self.kind == "flat":
            return means.flatten(1)
        if self.kind == "half":
            return means.half().flatten(1)
        if self.kind == "integers":
            return means.long().flatten(1)
        if self.kind == "maps":
            return x.float()
        if self.kind == "fewer":
            return means.flatten(1)[1:]
        return means


def test_what_the_extractor_says(tmp_path):
    path = script(Plain("flat"), tmp_path / "means.pt")
    extractor = build_extractor(path)
    assert (extractor.metric, extractor.title, extractor.warnings) == ("fd-means", "FD-means", ())
    assert extractor.same_size and extractor.colour and extractor.prepare is None and extractor.probabilities is None
    digest = sha256_of(path)
    assert extractor.protocol == {"features": "means", "network": "means.pt", "sha256": digest} and len(digest) == 64


@pytest.mark.parametrize("kind", ["flat", "half", "four"])
def test_torchscript(kind, tmp_path):
    found = build_extractor(script(Plain(kind), tmp_path / "net.pt")).extract(images(5))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, images(5).float().mean((2, 3)), rtol=1e-3, atol=0.1)


@pytest.mark.parametrize(
    "kind, message", [("integers", r"int64 \[5, 3\]"), ("maps", r"float32 \[5, 3, 8, 8\]"), ("fewer", r"float32 \[4, 3\]")]
)
def test_networks_that_return_something_else(kind, message, tmp_path):
    extractor = build_extractor(script(Plain(kind), tmp_path / "net.pt"))
    with pytest.raises(ModelError, match=rf"net.pt returns {message} for 5 images: features are floats \[5, D\]"):
        extractor.extract(images(5))


class Pair(nn.Module):
    def forward(self, x):
        return x.float().flatten(1), x


def test_a_network_that_returns_two(tmp_path):
    with pytest.raises(ModelError, match="net.pt returns a tuple"):
        build_extractor(script(Pair(), tmp_path / "net.pt")).extract(images(5))


def test_images_that_a_network_cannot_take(tmp_path):
    path = script(nn.Sequential(nn.Flatten(), nn.Linear(10, 2)), tmp_path / "net.pt")
    with pytest.raises(ModelError, match="net.pt cannot take images of 5x3x8x8, torch.uint8"):
        build_extractor(path).extract(images(5))


def test_kinds_of_files(tmp_path):
    torch.export.save(torch.export.export(Plain("flat"), (images(4),)), tmp_path / "net.pt2")
    assert content(tmp_path / "net.pt2") == EXPORTED
    with pytest.raises(ModelError, match="net.pt2 is an exported program: features come from a TorchScript; torch.jit.trace makes"):
        build_extractor(str(tmp_path / "net.pt2"))
    script(Plain("flat"), tmp_path / "net.pt")
    assert content(tmp_path / "net.pt") == TORCHSCRIPT
    torch.save({"a": torch.zeros(1)}, tmp_path / "state.pt")
    assert content(tmp_path / "state.pt") == STATE_DICT
    with pytest.raises(ModelError, match="state.pt is weights without a network: features come from a TorchScript"):
        build_extractor(str(tmp_path / "state.pt"))
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("a/readme.txt", "")
    with pytest.raises(ModelError, match="other.pt is a zip archive, and holds no network"):
        build_extractor(str(tmp_path / "other.pt"))
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Harm(tmp_path / "harm")))
    with pytest.raises(ModelError, match="pickle.pt is a pickle, which could run code and is never read"):
        build_extractor(str(tmp_path / "pickle.pt"))
    assert not (tmp_path / "harm").exists()


def test_pixels():
    extractor = build_extractor("pixels")
    assert (extractor.metric, extractor.title, extractor.protocol) == ("fd-pixels", "FD-pixels", {"features": "pixels"})
    assert extractor.same_size and not extractor.colour
    grey = np.arange(2 * 4, dtype=np.uint8).reshape(2, 1, 2, 2)
    np.testing.assert_array_equal(extractor.extract(torch.from_numpy(grey)), pixel_features(grey))
    assert extractor.extract(torch.from_numpy(grey)).shape == (2, 4)


def test_unknown_words_and_missing_files(tmp_path):
    with pytest.raises(ConfigError, match="features 'inceptoin' are unknown, and no file: did you mean 'inception'"):
        build_extractor("inceptoin")
    with pytest.raises(ModelError, match="none.pt2 does not exist"):
        build_extractor(str(tmp_path / "none.pt2"))
    with pytest.raises(ModelError, match="runs/net.pt does not exist"):
        build_extractor("runs/net.pt")  # no hub id
