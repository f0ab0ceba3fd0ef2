"""Stand-ins for the published Inception files, in the same interfaces, with random weights.

`write_inception` makes what `inception-2015-12-05.pt` is: a TorchScript whose `forward(images, return_features, use_fp16,
no_output_bias)` resizes images of 0..255 inside, whose `layers` take 299 x 299 images in [-1, 1], and whose `output` holds
the classes. `write_pytorch_inception` makes what `pt_inception-2015-12-05-6726825d.pth` is: the weights of clean-fid's own
class. Their hashes are not the published ones: a test that wants a figure called FID replaces the published hash,

    monkeypatch.setitem(mmgen.metrics.inception.PUBLISHED, "inception-2015-12-05.pt", sha256)

where sha256 is what `write_inception` returns.
"""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn


def write_inception(path: Path, seed: int = 0, tiny: bool = True) -> str:
    """Writes a random network in the interface of the TorchScript file, and returns its SHA-256.

    `tiny`: a milliseconds' network of 2048 features; else a full-size Inception-v3 (needs torchvision, 95 MB).
    """
    with _seeded(seed):
        layers = _tiny_layers() if tiny else _full_layers()
        network = _Inception(layers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated; the published file is TorchScript
        torch.jit.script(network.eval()).save(str(path))
    return _sha256(path)


def write_pytorch_inception(path: Path, seed: int = 0) -> str:
    """Writes random weights of clean-fid's `inception_pytorch.fid_inception_v3` (95 MB), and returns their SHA-256."""
    with _seeded(seed):
        network = _fid_inception()
        _calibrate(network, nn.Sequential(*_until_pool(network)))
    torch.save(network.state_dict(), path)
    return _sha256(path)


class _Inception(nn.Module):
    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers
        self.output = nn.Linear(2048, 1008)

    def forward(self, img: Tensor, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False) -> Tensor:
        x = img.to(torch.float32)
        x = _tensorflow_1(x.shape[2], x.device) @ x @ _tensorflow_1(x.shape[3], x.device).t()
        features = self.layers((x - 128) / 128).reshape(-1, 2048)
        if return_features:
            return features
        bias = torch.zeros_like(self.output.bias) if no_output_bias else self.output.bias
        return torch.softmax(features @ self.output.weight.t() + bias, dim=1)


def _tensorflow_1(size: int, device: torch.device) -> Tensor:
    """Bilinear from `size` pixels to 299, float32 [299, size]: pixel i lies at i size / 299, with no half-pixel centres."""
    at = torch.arange(299, device=device, dtype=torch.float32) * (size / 299)
    low = at.long().clamp(max=size - 1)
    part = (at - low).unsqueeze(1)
    weights = torch.zeros(299, size, device=device)
    weights.scatter_add_(1, low.unsqueeze(1), 1 - part)
    return weights.scatter_add_(1, (low + 1).clamp(max=size - 1).unsqueeze(1), part)


def _tiny_layers() -> nn.Module:
    return nn.Sequential(
        nn.AvgPool2d(23, 23), nn.Conv2d(3, 32, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 36, 2048), nn.LeakyReLU(0.1)
    )


def _full_layers() -> nn.Module:
    network = _fid_inception()
    layers = nn.Sequential(*_until_pool(network), nn.Flatten())
    _calibrate(network, layers)
    return layers


def _fid_inception() -> nn.Module:
    """clean-fid's own Inception with random weights, made without its download."""
    from cleanfid import inception_pytorch

    original = inception_pytorch.load_state_dict_from_url, nn.Module.load_state_dict
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            inception_pytorch.load_state_dict_from_url = lambda *_, **__: {}
            nn.Module.load_state_dict = lambda *_, **__: None
            return inception_pytorch.fid_inception_v3()
        finally:
            inception_pytorch.load_state_dict_from_url, nn.Module.load_state_dict = original


def _until_pool(n: nn.Module) -> list[nn.Module]:
    stem = [n.Conv2d_1a_3x3, n.Conv2d_2a_3x3, n.Conv2d_2b_3x3, nn.MaxPool2d(3, 2)]
    stem += [n.Conv2d_3b_1x1, n.Conv2d_4a_3x3, nn.MaxPool2d(3, 2)]
    mixed = [n.Mixed_5b, n.Mixed_5c, n.Mixed_5d, n.Mixed_6a, n.Mixed_6b, n.Mixed_6c, n.Mixed_6d, n.Mixed_6e]
    return [*stem, *mixed, n.Mixed_7a, n.Mixed_7b, n.Mixed_7c, nn.AdaptiveAvgPool2d(1)]


def _calibrate(network: nn.Module, layers: nn.Module) -> None:
    """Sets the batch norms' statistics by a few images, so that signals neither die nor explode on the way."""
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    blobs = nn.functional.interpolate(torch.rand(4, 3, 8, 8), size=(299, 299), mode="bicubic") * 2 - 1
    with torch.no_grad():
        layers.train()(blobs + 0.1 * torch.randn_like(blobs))
    layers.eval()
    network.eval()


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _sha256(path: Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
