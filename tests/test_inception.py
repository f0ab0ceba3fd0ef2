"""Inception's three modes against clean-fid itself, and how its weights are found, checked and downloaded."""

# ruff: noqa: F811 (fixtures are imported)

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from inception_tools import full, nothing_found  # noqa: F401
from PIL import Image
from tiny_inception import write_inception

from mmgen.errors import ConfigError, ModelError
from mmgen.metrics import inception
from mmgen.metrics.features import build_extractor
from mmgen.metrics.inception import SCRIPT, WEIGHTS

CLEAN_FID = {"tf": "legacy_tensorflow", "clean": "clean", "torch": "legacy_pytorch"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[Path, str]:
    path = tmp_path_factory.mktemp("tiny") / "mine.pt"
    return path, write_inception(path)


def blobs(count: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth random images uint8 [count, height, width, 3], unlike each other."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)
    return (smooth * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def write_images(folder: Path, same_size: bool) -> None:
    folder.mkdir()
    sizes = [(33, 47)] * 4 if same_size else [(32, 32), (33, 47), (400, 310), (299, 299)]
    for i, (size, mode) in enumerate(zip(sizes, ["RGB", "RGB", "L", "RGBA"], strict=True)):
        image = Image.fromarray(blobs(1, *size, seed=i)[0])
        if mode == "RGBA":
            image.putalpha(Image.fromarray(blobs(1, *size, seed=9)[0, :, :, 0]))
        suffix = "jpg" if i == 1 else "png"
        image.convert(mode).save(folder / f"{i}.{suffix}")


def mmgen_features(extractor, folder: Path) -> np.ndarray:
    images = [np.array(Image.open(path).convert("RGB")) for path in sorted(folder.iterdir())]
    prepared = [extractor.prepare(image) if extractor.prepare else image for image in images]
    batch = torch.from_numpy(np.stack(prepared)).permute(0, 3, 1, 2).contiguous()
    return extractor.extract(batch).numpy()


def clean_fid_features(mode: str, weights: Path, folder: Path, monkeypatch) -> np.ndarray:
    fid = pytest.importorskip("cleanfid.fid")
    from cleanfid import features, inception_pytorch
    from cleanfid.inception_torchscript import InceptionV3W

    if mode == "torch":
        state = torch.load(weights / WEIGHTS, weights_only=True)
        monkeypatch.setattr(inception_pytorch, "load_state_dict_from_url", lambda *_, **__: state)
        model = features.feature_extractor("pytorch_inception", device="cpu", use_dataparallel=False)
    else:
        model = InceptionV3W(str(weights), download=False, resize_inside=mode == "tf")
    options = dict(num_workers=0, batch_size=4, device="cpu", mode=CLEAN_FID[mode], verbose=False)
    return fid.get_folder_features(str(folder), model, **options)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["tf", "clean", "torch"])
@pytest.mark.filterwarnings("ignore")
def test_features_are_clean_fids(mode, full, tmp_path, monkeypatch):
    folder = tmp_path / "images"
    write_images(folder, same_size=mode == "tf")
    extractor = build_extractor(mode=mode, inception=full)
    assert extractor.same_size == (mode == "tf") and (extractor.prepare is None) == (mode == "tf")
    ours = mmgen_features(extractor, folder)
    theirs = clean_fid_features(mode, full, folder, monkeypatch)
    assert ours.shape == theirs.shape == (4, 2048) and ours.dtype == np.float32
    # Not by luck of features that are all alike: images differ from each other by far more than the two programs do.
    assert np.linalg.norm(theirs - theirs.mean(0)) > 0.05 * np.linalg.norm(theirs)
    assert np.linalg.norm(ours - theirs) < 2e-5 * np.linalg.norm(theirs)  # rounding: either is 5e-6 from float64's


@pytest.mark.slow
def test_modes_differ(full):
    image = blobs(1, 32, 32)[0]
    found = []
    for mode in ("tf", "clean", "torch"):
        extractor = build_extractor(mode=mode, inception=full)
        prepared = extractor.prepare(image) if extractor.prepare else image
        found.append(extractor.extract(torch.from_numpy(prepared).permute(2, 0, 1)[None])[0])
    tf, clean, torchs = found
    assert (tf - clean).norm() > 1e-3 * clean.norm()  # the same network by another resize
    assert (tf - torchs).norm() > 1e-3 * tf.norm()


def test_a_batch_is_its_images(tiny):
    extractor = build_extractor(inception=tiny[0])
    images = torch.from_numpy(blobs(7, 32, 32)).permute(0, 3, 1, 2).contiguous()
    whole = extractor.extract(images)
    parts = torch.cat([extractor.extract(part) for part in images.split(3)])
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-5)


def test_what_the_extractor_says(tiny, monkeypatch):
    path, sha256 = tiny
    extractor = build_extractor(inception=path)
    assert (extractor.metric, extractor.title) == ("fd-mine", "FD-mine")
    assert extractor.protocol == {"features": "inception", "mode": "tf", "network": "mine.pt", "sha256": sha256}
    assert "not the published" in extractor.warnings[0] and "FD-mine" in extractor.warnings[0]
    assert extractor.colour
    monkeypatch.setitem(inception.PUBLISHED, SCRIPT, sha256)
    extractor = build_extractor(inception=path)
    assert (extractor.metric, extractor.title, extractor.warnings) == ("fid", "FID", ())


@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated
def test_probabilities_leave_the_bias_out(tiny):
    extractor = build_extractor(inception=tiny[0])
    images = torch.from_numpy(blobs(3, 32, 32)).permute(0, 3, 1, 2).contiguous()
    network = torch.jit.load(str(tiny[0]))
    found = extractor.probabilities(extractor.extract(images))
    torch.testing.assert_close(found, network(images, no_output_bias=True), rtol=1e-4, atol=1e-7)
    assert not torch.allclose(found, network(images), rtol=1e-3)
    torch.testing.assert_close(found.sum(1), torch.ones(3))


def test_no_probabilities_by_pytorch_fids_weights(full):
    assert build_extractor(mode="torch", inception=full).probabilities is None


def test_warnings_stay_as_they_were(full):
    import warnings

    before = list(warnings.filters)
    build_extractor(mode="torch", inception=full)  # clean-fid's resizer switches all warnings off
    assert warnings.filters == before


def test_clean_fids_loader_is_put_back(full, tmp_path):
    from cleanfid import inception_pytorch

    original = inception_pytorch.load_state_dict_from_url
    build_extractor(mode="torch", inception=full)
    assert inception_pytorch.load_state_dict_from_url is original
    torch.save({"a": torch.zeros(1)}, tmp_path / "wrong.pth")
    with pytest.raises(ModelError, match="wrong.pth does not hold the weights"):
        build_extractor(mode="torch", inception=tmp_path / "wrong.pth")
    assert inception_pytorch.load_state_dict_from_url is original


def test_weights_that_an_early_torch_saved(full, tmp_path):
    """As the published ones may be, which are of 2020: pickles in front, and no zip."""
    state = torch.load(full / WEIGHTS, weights_only=True)
    torch.save(state, tmp_path / "early.pth", _use_new_zipfile_serialization=False)
    image = torch.rand(1, 3, 299, 299) * 255
    found, expected = (build_extractor(mode="torch", inception=p).extract(image) for p in (tmp_path / "early.pth", full))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_precision_is_put_back(tiny):
    extractor = build_extractor(inception=tiny[0])
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        extractor.extract(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_unknown_mode():
    with pytest.raises(ConfigError, match="mode 'torhc' is unknown: did you mean 'torch'"):
        build_extractor(mode="torhc")


CONTENT = {
    "page.pt": (b"\n<!DOCTYPE html><html>404</html>", "web page"),
    "pointer.pt": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
    "empty.pt": (b"", "is empty"),
    "pickle.pt": (b"\x80\x04K\x01.", "a pickle"),
    "noise.pt": (b"GIF89a", "no known format"),
}


@pytest.mark.parametrize("name", CONTENT)
def test_files_that_are_something_else(name, tmp_path):
    data, words = CONTENT[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ModelError, match=f"{name} is .*{words}|{name} {words}"):
        build_extractor(inception=tmp_path / name)


def test_a_file_cut_short(tiny, tmp_path):
    (tmp_path / "cut.pt").write_bytes(tiny[0].read_bytes()[:-1000])
    with pytest.raises(ModelError, match="cut.pt is cut short"):
        build_extractor(inception=tmp_path / "cut.pt")


def test_weights_of_the_other_kind(tiny, tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "state.pth")
    with pytest.raises(ModelError, match="state.pth is weights without a network, and mode tf takes a TorchScript"):
        build_extractor(inception=tmp_path / "state.pth")
    with pytest.raises(ModelError, match="mine.pt is a TorchScript, and mode torch takes weights"):
        build_extractor(mode="torch", inception=tiny[0])


@pytest.mark.filterwarnings("ignore")
def test_another_torchscript(tmp_path):
    torch.jit.script(torch.nn.Flatten()).save(str(tmp_path / "other.pt"))
    with pytest.raises(ModelError, match="other.pt takes no return_features"):
        build_extractor(inception=tmp_path / "other.pt")
