"""`mmgen fid` against clean-fid's own figures, on the same images with the same weights: KID in each mode, FID in one.

The weights are random, in the interface of the published files: a small network where clean-fid lets us choose, a full-size
one for pytorch-fid's.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from tiny_inception import write_inception, write_pytorch_inception
from typer.testing import CliRunner

from mmgen.cli.fid import fid
from mmgen.metrics.inception import PUBLISHED, SCRIPT, WEIGHTS, build_inception

CLEAN_FID = {"tf": "legacy_tensorflow", "clean": "clean", "torch": "legacy_pytorch"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("weights")
    digests = {SCRIPT: write_inception(folder / SCRIPT), WEIGHTS: write_pytorch_inception(folder / WEIGHTS)}
    with pytest.MonkeyPatch.context() as patch:  # taken for the published files, whose figures alone are called FID and KID
        for name, digest in digests.items():
            patch.setitem(PUBLISHED, name, digest)
        yield folder


def write_images(folder: Path, count: int, seed: int, brightness: float) -> None:
    folder.mkdir()
    random = np.random.default_rng(seed)
    for i in range(count):
        small = (random.random((5, 5, 3)) * 255 * brightness).astype(np.uint8)
        Image.fromarray(small).resize((40, 40), Image.Resampling.BICUBIC).save(folder / f"{i}.png")


def clean_fid_figures(a: Path, b: Path, mode: str, weights: Path, monkeypatch) -> dict[str, float]:
    """KID as clean-fid computes it from the same weights; FID, whose matrix root takes it half a minute, in mode clean alone."""
    import scipy.linalg
    from cleanfid import fid as clean_fid
    from cleanfid.inception_torchscript import InceptionV3W

    if mode == "torch":
        network = build_inception("torch", "cpu", file=weights / WEIGHTS).extract
    else:
        network = InceptionV3W(str(weights), download=False, resize_inside=mode == "tf")
    real = scipy.linalg.sqrtm

    def sqrtm(matrix, disp=None):  # SciPy 1.18 took `disp` away, with which clean-fid 0.1.35 calls it
        root = real(matrix)
        return root if disp is None else (root, 0.0)

    monkeypatch.setattr(scipy.linalg, "sqrtm", sqrtm)
    monkeypatch.setattr(clean_fid, "build_feature_extractor", lambda *_, **__: network)
    options = {"mode": CLEAN_FID[mode], "device": torch.device("cpu"), "num_workers": 0, "verbose": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {"kid": clean_fid.compute_kid(str(a), str(b), use_dataparallel=False, **options)}
        if mode == "clean":
            found["fid"] = clean_fid.compute_fid(str(a), str(b), use_dataparallel=False, **options)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("mode, count", [("tf", 24), ("clean", 24), ("torch", 8)])
def test_agrees_with_clean_fid(mode, count, weights, tmp_path, monkeypatch):
    monkeypatch.setenv("MMGEN_CACHE", str(tmp_path / "cache"))
    a, b = tmp_path / "a", tmp_path / "b"
    write_images(a, count, 0, 1.0)
    write_images(b, count, 1, 0.7)
    theirs = clean_fid_figures(a, b, mode, weights, monkeypatch)
    app = typer.Typer()
    app.command()(fid)
    file = weights / (WEIGHTS if mode == "torch" else SCRIPT)
    arguments = [a, "--ref", b, "--mode", mode, "--metrics", ",".join(theirs), "--inception", file, "--device", "cpu"]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    (entry,) = json.loads((a / "scores.json").read_text())["scores"]
    assert entry["figures"]["KID"] == pytest.approx(theirs["kid"], rel=1e-4, abs=1e-6)  # theirs is a difference in float32
    assert mode != "clean" or entry["figures"][f"fid{count}"] == pytest.approx(theirs["fid"], rel=1e-4)
