"""Files and folders of other projects that are damaged, or no weights."""

from __future__ import annotations

import argparse
import pickle
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from original_files import (
    Persistent,
    original_modules,
    write_edm_pickle,
    write_pickle,
    write_pt,
    write_safetensors,
)
from reading_tools import OTHER, STATE, refusal, same

from mmgen.formats.reading import read


# Damage
def pickled(value) -> bytes:
    return pickle.dumps(value)


def test_kinds_of_damage(tmp_path):
    """Each has its own sentence."""
    torch.save(STATE, tmp_path / "whole.pt")
    write_edm_pickle(tmp_path / "whole.pkl", {"model.b.weight": torch.ones(300)})
    write_safetensors(tmp_path / "whole.safetensors", STATE)
    whole, legacy = (tmp_path / "whole.pt").read_bytes(), write_pt(tmp_path / "l.pt", STATE, legacy=True).read_bytes()
    edm, safe = (tmp_path / "whole.pkl").read_bytes(), (tmp_path / "whole.safetensors").read_bytes()
    for name, content, part in [
        ("a.pkl", b"", "is empty"),
        ("a.pkl", b"<!DOCTYPE html><html>404</html>", "web page"),
        ("a.safetensors", b"<html>", "web page"),
        ("a.pt", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 41963912\n", "git lfs pull"),
        ("a.pt", whole[: len(whole) // 2], "damaged or cut short"),
        ("a.pt", legacy[:-1], "damaged or cut short"),
        ("a.pkl", edm[: len(edm) // 2], "damaged or cut short"),
        ("a.safetensors", safe[:-1], "damaged or cut short"),
        ("a.safetensors", safe[:5], "damaged or cut short"),
        ("a.pt", whole.replace(STATE["a.weight"].numpy().tobytes(), bytes(24)), "checksum"),
        ("a.gguf", b"GGUF\x03\x00\x00\x00", "GGUF file, not a format of this field"),
        ("a.onnx", b"\x08\x07\x12\x07pytorch\x1a", "ONNX file, not a format of this field"),
        ("a.h5", b"\x89HDF\r\n\x1a\n", "HDF5"),
        ("a.npy", b"\x93NUMPY\x01\x00", "NumPy array, not a format"),
        ("a.pkl", pickled({"mu": np.zeros(3), "sigma": np.eye(3)}), "NumPy arrays and no network"),
        ("a.pkl", pickled(np.zeros(3)), "holds a NumPy array, and no weights"),
        ("a.pkl", pickled([1, 2]), "holds a list"),
        ("a.pkl", pickled({"a": 1, "b\x1b[2J": 2}), "its entries: a, b"),
        ("a.txt", b"some text of somebody\n", "damaged or cut short"),
    ]:
        (tmp_path / name).write_bytes(content)
        assert part in refusal(tmp_path / name), part
        assert "\x1b" not in refusal(tmp_path / name)


def test_archives_that_are_no_weights(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.zeros(3))
    assert "NumPy .npz" in refusal(tmp_path / "a.npz")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("model.pkl", b"")
    assert "a zip archive, but none of torch.save" in refusal(tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "s.pt", "w") as file:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            file.writestr(f"archive/{name}", b"")
    assert "TorchScript" in refusal(tmp_path / "s.pt")


def rewritten(
    path: Path, target: Path, compression: int = zipfile.ZIP_STORED, twice: str = "", replace: dict | None = None
) -> Path:
    """A zip with the same entries; one of them twice, or with another content."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w", compression) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, (replace or {}).get(entry.filename.split("/", 1)[1], old.read(entry)))
        if twice:
            with pytest.warns(UserWarning, match="Duplicate"):
                new.writestr(next(e.filename for e in old.infolist() if e.filename.endswith(twice)), b"other")
    return target


def test_unusual_zips(tmp_path):
    path = write_pt(tmp_path / "a.pt", {"a": torch.zeros(1_000_000)})
    same(read(rewritten(path, tmp_path / "same.pt")).tensors, {"a": torch.zeros(1_000_000)})
    assert "compressed entries" in refusal(rewritten(path, tmp_path / "bomb.pt", zipfile.ZIP_DEFLATED))
    assert "same name" in refusal(rewritten(path, tmp_path / "twice.pt", twice="data.pkl"))
    assert "big-endian" in refusal(rewritten(path, tmp_path / "big.pt", replace={"byteorder": b"big"}))
    assert "damaged" in refusal(rewritten(path, tmp_path / "short.pt", replace={"data/0": bytes(100)}))
    assert "damaged" in refusal(rewritten(path, tmp_path / "pickle.pt", replace={"data.pkl": b"\x80\x02"}))


def test_entries_that_overlap(tmp_path):
    """A zip whose entries are all the same bytes: declared sizes are more than the file has."""
    path = write_pt(tmp_path / "a.pt", {str(i): torch.zeros(100_000) + i for i in range(8)})
    content = path.read_bytes()
    with zipfile.ZipFile(path) as file:
        entries = {e.filename: e for e in file.infolist()}
        first = next(e for name, e in entries.items() if name.endswith("data/0"))
        start = file.start_dir
    directory, kept = content[start:], content[: first.header_offset + 30 + 200 + first.file_size]
    for name, entry in entries.items():
        if "/data/" in name:
            directory = directory.replace(struct.pack("<I", entry.header_offset) + name.encode(),
                                          struct.pack("<I", first.header_offset) + name.encode())  # fmt: skip
    end = directory.rindex(b"PK\x05\x06")
    directory = directory[:end] + directory[end : end + 16] + struct.pack("<I", len(kept)) + directory[end + 20 :]
    directory = directory[: directory.index(b"PK\x06\x06")] + directory[end:] if b"PK\x06\x06" in directory else directory
    (tmp_path / "b.pt").write_bytes(kept + directory)
    assert "declares more bytes than it has" in refusal(tmp_path / "b.pt")


def test_training_states(tmp_path):
    """EDM's and IMM's training-state files hold whole modules, and EDM2's averages without names."""
    net = Persistent("EDMPrecond", {})
    net._modules["model"] = torch.nn.Linear(2, 2)
    torch_state = {"net": net, "optimizer_state": {"state": {}, "param_groups": []}}
    with original_modules():
        torch.save(torch_state, tmp_path / "a.pt")
    assert "use the network-snapshot .pkl" in refusal(tmp_path / "a.pt")
    torch.save({"state": {"cur_nimg": 1}, "net": STATE, "ema": {"stds": [0.05], "emas": [OTHER]}}, tmp_path / "b.pt")
    assert "whole training state" in refusal(tmp_path / "b.pt")
    torch.save({"model": STATE, "ema": {"decay": 0.99, "shadow_params": list(OTHER.values())}}, tmp_path / "c.pt")
    assert "whole training state" in refusal(tmp_path / "c.pt")
    torch.save({"model": STATE, "ema": [1]}, tmp_path / "d.pt")
    assert "--weights model" in refusal(tmp_path / "d.pt")
    same(read(tmp_path / "d.pt", weights="model").tensors, STATE)


def test_a_module_of_unknown_code(tmp_path):
    """torch.save(model): its class is refused by name, and the sentence says what to do."""
    namespace = argparse.Namespace
    try:
        namespace.__module__ = "models"  # pickled as models.Namespace
        sys.modules["models"] = argparse
        torch.save({"model": namespace(a=1), "ema": STATE}, tmp_path / "a.pt")
    finally:
        namespace.__module__ = "argparse"
        del sys.modules["models"]
    assert "asks for models.Namespace" in (message := refusal(tmp_path / "a.pt")) and "state_dict()" in message


def test_names_that_collide(tmp_path):
    torch.save({"a._orig_mod.b": torch.ones(1), "a.b": torch.ones(1)}, tmp_path / "a.pt")
    assert "two tensors of one name" in refusal(tmp_path / "a.pt")


def test_plain_pickles_of_state_dicts(tmp_path):
    found = read(write_pickle(tmp_path / "a.pkl", {"state_dict": STATE}))
    same(found.tensors, STATE)
    assert found.container == "pickle"
