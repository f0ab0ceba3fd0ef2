"""Reference statistics in every layout, written as its tool writes it, and what is refused or warned about."""

# ruff: noqa: F811 (fixtures are imported)

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from statistics_files import FEATURES, MU, SIGMA, TF, edm2, is_ours, npz, own, pkl, read, refused, statistics  # noqa: F401

from mmgen.errors import ConfigError, MmgenError
from mmgen.metrics.frechet import GaussianStatistics, frechet_distance
from mmgen.metrics.references import TAKES, is_statistics, write_statistics

IMAGES = np.zeros((3, 4, 4, 3), np.uint8)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(
    "name, tool",
    [
        ("cifar10-32x32.npz", "EDM"),
        ("imagenet-64x64.npz", "EDM"),
        ("imagenet-64x64-baseline.npz", "EDM"),
        ("ffhq-64x64.npz", "EDM"),
        ("afhqv2-64x64.npz", "EDM"),
        ("VIRTUAL_imagenet256_labeled.npz", "ADM"),
        ("adm_in256_stats.npz", "MAR"),
    ],
)
def test_mu_and_sigma_under_a_known_name(name, tool, save, tmp_path):
    save(tmp_path / name, mu=MU, sigma=SIGMA)
    assert is_statistics(tmp_path / name)
    reference = read(tmp_path / name)
    is_ours(reference)
    assert (reference.name, reference.protocol, reference.num, reference.warnings) == (name, TF, None, ())
    assert tool in reference.source and not reference.has_images
    assert "mode tf (by its name)" in refused(tmp_path / name, mode="clean")


def test_adm_uses_mu_and_sigma_and_keeps_the_images_out(tmp_path):
    spatial = {"mu_s": np.zeros(3), "sigma_s": np.eye(3)}
    path = npz(tmp_path / "renamed.npz", arr_0=IMAGES, arr_1=np.zeros(3, np.int64), mu=MU, sigma=SIGMA, **spatial)
    assert is_statistics(path)
    reference = read(path)
    is_ours(reference)
    assert reference.has_images and reference.protocol == TF and "ADM" in reference.source and reference.warnings == ()
    without = read(npz(tmp_path / "b.npz", mu=MU, sigma=SIGMA, **spatial))
    assert not without.has_images and without.protocol == TF and without.warnings == ()
    assert "arr_0" in refused(npz(tmp_path / "c.npz", arr_0=IMAGES, mu=MU, sigma=SIGMA), mode="torch")
    named = npz(tmp_path / "cats_clean_custom_na.npz", arr_0=IMAGES, mu=MU, sigma=SIGMA)
    assert read(named, mode="clean").source == "clean-fid statistics, clean"  # a name that tells goes before a guess


def test_adm_samples_are_images(tmp_path):
    path = npz(tmp_path / "samples_50000x32x32x3.npz", arr_0=IMAGES, arr_1=np.zeros(3, np.int64))
    assert not is_statistics(path)
    message = refused(path)
    assert "arr_0, arr_1, which are images" in message and TAKES in message


@pytest.mark.parametrize("clean_fid, mode", [("clean", "clean"), ("legacy_tensorflow", "tf"), ("legacy_pytorch", "torch")])
@pytest.mark.parametrize("start, end", [("cifar10", "train_32"), ("ffhq", "trainval70k_1024"), ("my_cats_clean", "custom_na")])
def test_clean_fid_says_its_mode_in_the_name(clean_fid, mode, start, end, tmp_path):
    path = npz(tmp_path / f"{start}_{clean_fid}_{end}.npz", mu=MU.astype(np.float32), sigma=SIGMA)
    reference = read(path, mode=mode)
    np.testing.assert_array_equal(reference.gaussian.mean, MU.astype(np.float32).astype(np.float64))
    assert reference.protocol == {"features": "inception", "mode": mode} and reference.warnings == ()
    assert reference.source == f"clean-fid statistics, {clean_fid}"
    other = {"tf": "clean", "clean": "torch", "torch": "tf"}[mode]
    message = refused(path, mode=other)
    assert f"is of mode {mode} (by its name)" in message and f"--mode {mode}" in message and f"--ref-mode {other}" in message
    (warning,) = read(path, mode=other, ref_mode=other).warnings
    assert f"looks like mode {mode}" in warning and f"taken as {other}" in warning


def test_clean_fids_own_names(tmp_path, monkeypatch):
    features = pytest.importorskip("cleanfid.features", reason="needs clean-fid")
    path = npz(tmp_path / "a.npz", mu=MU, sigma=SIGMA, feats=FEATURES)
    asked = []  # the names of the files that clean-fid looks for
    monkeypatch.setattr(features, "check_download_url", lambda local_folder, url: asked.append(Path(url).name) or str(path))
    for cleans, ours in (("clean", "clean"), ("legacy_tensorflow", "tf"), ("legacy_pytorch", "torch")):
        features.get_reference_statistics("My_Set", 32, mode=cleans, split="train")
        features.get_reference_statistics("My_Set", 32, mode=cleans, split="custom", metric="KID")
        for _ in range(2):
            reference = read(npz(tmp_path / asked.pop(), mu=MU, sigma=SIGMA), mode=ours)
            assert reference.protocol == {"features": "inception", "mode": ours}
        features.get_reference_statistics("My_Set", 32, mode=cleans, split="custom", model_name="clip_vit_b_32")
        assert read(npz(tmp_path / asked.pop(), mu=MU, sigma=SIGMA), features="net").protocol == {"features": "clip"}


def test_clean_fids_features(tmp_path):
    path = tmp_path / "cats_clean_custom_na_kid.npz"
    np.savez_compressed(path, feats=FEATURES)
    assert is_statistics(path)
    reference = read(path, mode="clean")
    np.testing.assert_allclose(reference.gaussian.mean, MU, rtol=1e-12)
    np.testing.assert_allclose(reference.gaussian.covariance, SIGMA, rtol=1e-6, atol=1e-9)
    assert reference.num == 50 and reference.features.dtype == torch.float32
    np.testing.assert_array_equal(reference.features, FEATURES)
    assert read(path, mode="clean", keep_features=False).features is None
    assert "is of mode clean" in refused(path, mode="tf")
    assert "numbers per image" in refused(path, mode="clean", dim=2048)
    for broken, part in [
        (FEATURES[:1], "at least 2"),
        (FEATURES[0], "[N, D]"),
        (FEATURES * np.nan, "not finite"),
        (IMAGES, "[N, D]"),
    ]:
        assert part in refused(npz(path, feats=broken), mode="clean")


def test_features_beside_the_statistics(tmp_path):
    path = npz(tmp_path / "cats_clean_custom_na.npz", mu=FEATURES.mean(0), sigma=SIGMA)
    assert read(path, mode="clean").features is None
    neighbour = npz(tmp_path / "cats_clean_custom_na_kid.npz", feats=FEATURES)
    reference = read(path, mode="clean")
    np.testing.assert_array_equal(reference.features, FEATURES)
    np.testing.assert_array_equal(reference.gaussian.covariance, SIGMA)
    assert reference.num == 50 and reference.warnings == ()
    assert read(path, mode="clean", keep_features=False).features is None
    for other in (FEATURES + 1, FEATURES[:, :3]):
        npz(neighbour, feats=other)
        reference = read(path, mode="clean")
        assert reference.features is None and "other images" in reference.warnings[0]


def test_clean_fids_clip(tmp_path):
    path = npz(tmp_path / "cats_clean_clip_vit_b_32_custom_na.npz", mu=MU, sigma=SIGMA)
    assert "is of clip features" in refused(path, mode="clean")
    assert "is of clip features" in refused(path, features="pixels")
    reference = read(path, features="clip.pt2")
    assert reference.protocol == {"features": "clip"} and "CLIP" in reference.warnings[0]


def test_pytorch_fid_cannot_be_told_apart(tmp_path):
    path = tmp_path / "stats.npz"
    np.savez_compressed(path, mu=MU, sigma=SIGMA)  # as pytorch-fid --save-stats
    for mode in ("tf", "clean", "torch"):
        reference = read(path, mode=mode)
        is_ours(reference)
        (warning,) = reference.warnings
        assert f"taken as {mode}" in warning and "--ref-mode" in warning and reference.protocol == {}
        assert read(path, mode=mode, ref_mode=mode).warnings == ()


def test_jax(tmp_path):
    path = npz(tmp_path / "imagenet_256_fid_stats.npz", ref_mu=MU, ref_sigma=SIGMA)
    assert is_statistics(path)
    reference = read(path)
    is_ours(reference)
    assert reference.protocol == {"features": "inception", "mode": "jax"} and "MeanFlow" in reference.source
    assert "may differ" in reference.warnings[0]
    assert "ref_mu" in refused(path, mode="torch")


def test_lucidrains(tmp_path):
    path = tmp_path / "dataset_stats.npz"
    np.savez_compressed(path, m2=MU, s2=SIGMA)
    assert is_statistics(path)
    assert "is of mode torch (it holds m2 and s2)" in refused(path)
    reference = read(path, mode="torch")
    is_ours(reference)
    assert reference.protocol == {"features": "inception", "mode": "torch"} and reference.warnings == ()
    assert "looks like mode torch" in read(path, mode="tf", ref_mode="tf").warnings[0]


@pytest.mark.parametrize("protocol", range(6))
def test_edm2(protocol, tmp_path):
    path = pkl(tmp_path / "img512.pkl", edm2(), protocol)
    assert is_statistics(path)
    reference = read(path)
    is_ours(reference)
    assert (reference.num, reference.protocol, reference.warnings) == (1281167, TF, ())
    assert reference.source == "EDM2 pickle, fid"
    dino = read(path, features="nets/DINOv2_vitl14.pt2", dim=5)
    assert dino.gaussian.covariance.shape == (5, 5) and dino.protocol == {"features": "dinov2"} and dino.warnings == ()
    assert dino.source == "EDM2 pickle, fd_dinov2"


def test_edm2_refusals(tmp_path):
    path = pkl(tmp_path / "img64.pkl", edm2())
    assert "holds fd_dinov2, fid, num_images, and no statistics for pixels" in refused(path, features="pixels")
    assert "is of mode tf (it holds fid" in refused(path, mode="clean")
    only = pkl(tmp_path / "only.pkl", {"fid": {"mu": MU, "sigma": SIGMA}})
    assert read(only).num is None and is_statistics(only)
    assert "no statistics for dinov2" in refused(only, features="dinov2")
    for content in ([1, 2], {"ema": 1}, {3: 4}):
        path = pkl(tmp_path / "other.pkl", content)
        assert not is_statistics(path) and "not of EDM2's statistics" in refused(path)
    for content in ({"fid": 3}, {"fid": {"mu": MU}}, {"fid": {"mu": [[1], [1, 2]], "sigma": SIGMA}}):
        assert "not a dict of the arrays" in refused(pkl(tmp_path / "broken.pkl", content))


class Touch:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return exec, (f"open({str(self.mark)!r}, 'w').close()",)


def test_a_hostile_pickle_is_refused_and_does_nothing(tmp_path):
    mark = tmp_path / "mark"
    path = pkl(tmp_path / "img512.pkl", {"num_images": 5, "fid": {"mu": MU, "sigma": Touch(mark)}})
    assert is_statistics(path)
    assert "asks for builtins.exec" in refused(path)
    objects = np.array([Touch(mark)], dtype=object)
    assert "objects" in refused(pkl(path, edm2(fid={"mu": objects, "sigma": SIGMA})))
    assert "is object, not numbers" in refused(npz(tmp_path / "objects.npz", mu=objects, sigma=SIGMA))
    assert "asks for builtins.exec" in refused(pkl(tmp_path / "model.pkl", Touch(mark)))
    assert not is_statistics(tmp_path / "model.pkl")
    assert not mark.exists()
    pickle.loads((tmp_path / "model.pkl").read_bytes())
    assert mark.exists()  # it would have


CLEAN = {"features": "inception", "mode": "clean", "sha256": "f58c"}


def test_our_own_come_back(own):
    assert is_statistics(own)
    reference = read(own, mode="clean", extractor_protocol=CLEAN)
    assert torch.equal(reference.gaussian.mean, statistics().mean)
    assert torch.equal(reference.gaussian.covariance, statistics().covariance)
    assert frechet_distance(reference.gaussian, statistics()) < 1e-9
    assert (reference.num, reference.fingerprint, reference.warnings) == (50, "abc", ())
    assert reference.protocol == {**CLEAN, "network": "inception-2015-12-05.pt"}
    assert reference.source == "mmgen statistics of cifar10, train"
    assert read(own, mode="clean").num == 50
    assert os.listdir(own.parent) == [own.name]


def test_our_own_are_refused_under_another_protocol(own):
    assert "made with mode clean" in refused(own, mode="tf") and "--mode clean" in refused(own, mode="tf")
    assert "made with mode clean" in refused(own, mode="tf", ref_mode="tf")
    assert "made with features inception" in refused(own, features="pixels")
    other = {**CLEAN, "sha256": "0000"}
    message = refused(own, mode="clean", extractor_protocol=other)
    assert "made with sha256 f58c" in message and "scored with 0000" in message
    both = {"features": "net", "sha256": "0000"}
    assert "made with features inception" in refused(own, features="net", extractor_protocol=both)  # the first that differs


def test_our_own_for_other_features(tmp_path):
    path = tmp_path / "pixels.npz"
    write_statistics(path, statistics(), {"features": "pixels"}, source="digits", fingerprint=None)
    assert read(path, features="pixels", mode="", extractor_protocol={"features": "pixels"}).fingerprint is None
    assert "made with features pixels" in refused(path)
    assert "sha256 not stated" in refused(path, features="pixels", extractor_protocol={"features": "pixels", "sha256": "1"})


def test_other_tools_read_our_npz(tmp_path):
    path = tmp_path / "reference.npz"
    write_statistics(path, statistics(), TF, source="x", fingerprint=None)
    with np.load(path, allow_pickle=False) as file:
        assert file["mu"].dtype == file["sigma"].dtype == np.float64
        np.testing.assert_allclose(file["sigma"], SIGMA, rtol=1e-6, atol=1e-9)
        assert json.loads(str(file["mmgen_statistics"]))["num"] == 50


def test_writing_refuses(tmp_path):
    with pytest.raises(ConfigError, match=".safetensors or .npz"):
        write_statistics(tmp_path / "reference.pkl", statistics(), TF, source="x", fingerprint=None)
    single = GaussianStatistics()
    single.update(FEATURES[:1])
    with pytest.raises(MmgenError, match="at least 2"):
        write_statistics(tmp_path / "reference.npz", single, TF, source="x", fingerprint=None)
    (tmp_path / "file").write_text("")
    with pytest.raises(MmgenError, match="cannot write"):
        write_statistics(tmp_path / "file" / "reference.npz", statistics(), TF, source="x", fingerprint=None)
    assert os.listdir(tmp_path) == ["file"]
