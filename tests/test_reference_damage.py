"""Files of statistics that are damaged, of other sizes, or none: each is refused in one sentence."""

# ruff: noqa: F811 (fixtures are imported)

from __future__ import annotations

import io
import json
import struct
import zipfile

import numpy as np
import pytest
import torch
from statistics_files import MU, SIGMA, TF, D, edm2, is_ours, npz, own, pkl, read, refused  # noqa: F401

from mmgen.errors import ConfigError
from mmgen.metrics.references import TAKES, is_statistics


@pytest.mark.parametrize("change", [{"format": 2}, {"protocol": 3}, {"num": "many"}, None])
def test_a_statement_that_is_damaged_or_newer(change, own):
    text = json.dumps({"format": 1, "num": 3, "protocol": TF, "source": "x", "fingerprint": None, **(change or {})})
    text = text if change else "{"
    if own.suffix == ".npz":
        npz(own, mu=MU, sigma=SIGMA, mmgen_statistics=np.array(text))
    else:
        from safetensors.numpy import save_file

        save_file({"mu": MU, "sigma": SIGMA}, own, metadata={"mmgen_statistics": text})
    assert ("newer mmgen" if change == {"format": 2} else "is damaged") in refused(own)


def test_a_model_file_is_no_statistics(tmp_path):
    from safetensors.numpy import save_file

    path = tmp_path / "model.safetensors"
    save_file({"mu": MU, "sigma": SIGMA}, path, metadata={"mmgen": "{}"})
    assert not is_statistics(path) and "perhaps a model" in refused(path)
    save_file({"mu": MU}, path, metadata={"mmgen_statistics": json.dumps({"format": 1, "num": 3, "protocol": TF, "source": "x"})})
    assert "is damaged" in refused(path)
    torch.save({"mu": torch.zeros(3)}, tmp_path / "model.pt")
    assert not is_statistics(tmp_path / "model.pt") and TAKES in refused(tmp_path / "model.pt")
    torch.save({"mu": torch.zeros(3)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert not is_statistics(tmp_path / "old.pt")
    refused(tmp_path / "old.pt")


@pytest.mark.parametrize(
    "name, dim, part",
    [
        ("inception", 2048, "holds 8 numbers per image, Inception has 2048: give another"),
        ("net.pt2", 1280, "holds 8 numbers per image, net.pt2 has 1280"),
    ],
)
def test_another_size(name, dim, part, tmp_path):
    assert part in refused(npz(tmp_path / "a.npz", mu=MU, sigma=SIGMA), features=name, dim=dim)


@pytest.mark.parametrize("size, network", [(1024, "DINOv2"), (512, "CLIP")])
def test_the_size_of_a_known_network(size, network, tmp_path):
    path = npz(tmp_path / "a.npz", mu=np.zeros(size), sigma=np.eye(size))
    assert f"holds {size} numbers per image, Inception has 2048: is it for {network}?" in refused(path, dim=2048)
    assert read(path, dim=None).gaussian.mean.shape == (size,)


NAN, LOPSIDED, NEGATIVE = SIGMA.copy(), SIGMA.copy(), SIGMA.copy()
LOPSIDED[1, 2] += 0.01
NAN[2, 3] = NAN[3, 2] = np.nan
NEGATIVE[4, 4] = -0.5
SHAPES = "they must be [D] and [D, D]"


@pytest.mark.parametrize(
    "mu, sigma, part",
    [
        (MU, NAN, "not finite"),
        (MU * np.inf, SIGMA, "not finite"),
        (MU, LOPSIDED, "not symmetric"),
        (MU, NEGATIVE, "negative variance"),
        (MU, SIGMA[:4], SHAPES),
        (MU[:4], SIGMA, SHAPES),
        (MU[None], SIGMA, SHAPES),
        (MU[:1].reshape(()), SIGMA[:1, 0].reshape(()), SHAPES),
        (MU[:0], SIGMA[:0, :0], SHAPES),
        (MU, SIGMA.astype(complex), "real numbers"),
        (np.array(["a"] * D), SIGMA, "real numbers"),
    ],
)
def test_numbers_that_are_no_statistics(mu, sigma, part, tmp_path):
    assert part in refused(npz(tmp_path / "a.npz", mu=mu, sigma=sigma))
    if mu.dtype.kind == "f" and sigma.dtype.kind == "f":
        assert part in refused(pkl(tmp_path / "a.pkl", edm2(fid={"mu": mu, "sigma": sigma})))


def test_what_rounding_does_is_let_through(tmp_path):
    rounded = SIGMA.astype(np.float32)
    rounded[0, 1] = np.nextafter(rounded[0, 1], np.float32(9))
    rounded[5], rounded[:, 5] = 0, 0
    rounded[5, 5] = -1e-9
    reference = read(npz(tmp_path / "a.npz", mu=MU.astype(np.float32), sigma=rounded), ref_mode="tf")
    np.testing.assert_array_equal(reference.gaussian.covariance, rounded.astype(np.float64))
    assert read(npz(tmp_path / "b.npz", mu=MU, sigma=np.zeros((D, D)))).gaussian.covariance.abs().max() == 0
    fortran = read(npz(tmp_path / "c.npz", mu=MU.astype(">f8"), sigma=np.asfortranarray(SIGMA)))
    is_ours(fortran)


def test_modes_that_do_not_exist_or_differ(tmp_path):
    path = npz(tmp_path / "a.npz", mu=MU, sigma=SIGMA)
    with pytest.raises(ConfigError, match="--mode 'tensorflow' does not exist.* Valid: tf, clean, torch"):
        read(path, mode="tensorflow")
    with pytest.raises(ConfigError, match="--ref-mode 'clea' does not exist: did you mean 'clean'"):
        read(path, ref_mode="clea")
    message = refused(path, ConfigError, mode="tf", ref_mode="torch")
    assert "--ref-mode torch" in message and "--mode torch" in message
    with pytest.raises(ConfigError, match="is not Inception: leave it out"):
        read(path, features="pixels", ref_mode="tf")


def test_other_features(tmp_path):
    (warning,) = read(npz(tmp_path / "a.npz", mu=MU, sigma=SIGMA), features="net.pt2").warnings
    assert "does not say of which features" in warning
    assert "is of inception features (by its name)" in refused(
        npz(tmp_path / "cifar10-32x32.npz", mu=MU, sigma=SIGMA), features="net.pt2"
    )


@pytest.mark.parametrize(
    "content, part",
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 33570310\n", "git lfs pull"),
        (b"<!DOCTYPE html>\n<html>Not found</html>", "web page"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "--ref takes"),
        (b"PK\x03\x04" + bytes(200), "damaged"),
        (b"PK\x05\x06" + bytes(18), "no arrays"),
        (b"\x80\x04 nothing", "damaged"),
        (struct.pack("<Q", 10) + b"{}" + bytes(50), "damaged"),
    ],
)
@pytest.mark.parametrize("name", ["a.npz", "a.pkl", "a.safetensors"])
def test_what_is_no_file_of_statistics(content, part, name, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert not is_statistics(tmp_path / name)
    assert part in refused(tmp_path / name)


def test_no_file_at_all(tmp_path):
    for path in (tmp_path, tmp_path / "missing.npz"):
        assert not is_statistics(path) and "there is no file" in refused(path) and TAKES in refused(path)


def test_every_shortened_file_is_refused(tmp_path, own):
    pkl(tmp_path / "a.pkl", edm2())
    npz(tmp_path / "a.npz", mu=MU, sigma=SIGMA)
    np.savez_compressed(tmp_path / "b.npz", mu=MU, sigma=SIGMA)
    for path in (own, tmp_path / "a.pkl", tmp_path / "a.npz", tmp_path / "b.npz"):
        content = path.read_bytes()
        for stop in {*range(1, len(content), 37), len(content) - 1}:
            path.write_bytes(content[:stop])
            is_statistics(path)
            refused(path, mode="clean")


def test_flipped_bits_are_noticed(tmp_path):
    path = npz(tmp_path / "a.npz", mu=MU, sigma=SIGMA)
    content = bytearray(path.read_bytes())
    content[content.index(SIGMA.tobytes()) + 20] ^= 1
    path.write_bytes(content)
    assert "damaged" in refused(path)  # by the checksum of the zip


def header(shape: str, descr: str = "'<f8'") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


@pytest.mark.parametrize(
    "member, part",
    [
        (header("(2**20,)"), "damaged"),
        (header("(1048576,)"), "mu states 8388608 bytes and has 0"),
        (header("(1000000, 1000000)"), "mu states 8000000000000 bytes and has 0"),
        (header("(-1,)"), "mu states -8 bytes"),
        (header("(0, -5)"), "mu states 0 bytes"),
        (header("(1,)", "'|O'"), "not numbers"),
        (header("(1,)", "[('a', '<f8')]"), "not numbers"),
        (b"text", "damaged"),
    ],
)
def test_a_declared_shape_takes_no_memory(member, part, tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, SIGMA)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("mu.npy", member)
        archive.writestr("sigma.npy", buffer.getvalue())
    assert part in refused(tmp_path / "a.npz")


def test_is_statistics_needs_the_first_bytes_only(tmp_path, own):
    large = {"mu": np.zeros(1000), "sigma": np.zeros((1000, 1000))}
    pkl(tmp_path / "a.pkl", {"num_images": 5, "fid": large})
    npz(tmp_path / "a.npz", **large)
    for path in (tmp_path / "a.pkl", tmp_path / "a.npz", own):
        path.write_bytes(path.read_bytes()[:4096])
        assert is_statistics(path)
