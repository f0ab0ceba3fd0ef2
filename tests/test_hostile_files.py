"""Arrays, tables, model files and run folders that are made to harm, or damaged, by every command that reads them."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hostile import answered, command, refused, tried
from hostile_images import encoded, picture, zip_of
from tiny_model import make_model

from mmgen import data
from mmgen.errors import DataError
from mmgen.training.checkpoint import load_checkpoint
from mmgen.training.ema import EMA
from mmgen.training.run_folder import RunFolder

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_cache"), pytest.mark.filterwarnings("ignore:Duplicate name")]
GOOD = encoded(picture())
CELL = {"bytes": GOOD, "path": None}
DAMAGED = {  # as any JSON file of a folder
    "deep": b"[" * 200_000, "deep objects": b'{"a":' * 100_000, "null": b"null", "a list": b"[]", "a number": b"5", "empty": b"",
    "an object": b"{}", "binary": bytes(range(256)), "not UTF-8": b'{"format": "\xff"}', "a half": b'{"format": 1, "num',
    "thousands of digits": b'{"format": ' + b"9" * 5000 + b"}", "all wrong types":
    json.dumps(dict.fromkeys(("format", "num", "complete", "command", "config", "data", "images", "scores", "latents", "job"), [[]])).encode(),
}  # fmt: skip


# Tables

TABLES = {
    "texts": {"image": ["a.png"] * 2}, "numbers": {"image": [1, 2]}, "lists": {"image": [[1, 2]] * 2}, "nulls": {"image": pa.nulls(2)},
    "no bytes": {"image": [{"bytes": None, "path": None}] * 2}, "objects": {"image": [{"a": 1}] * 2},
    "a null": {"image": [CELL, None]}, "texts for bytes": {"image": [{"bytes": "abc", "path": None}] * 2},
    "an address": {"image": [{"bytes": None, "path": "http://127.0.0.1/x.png"}]}, "no columns": {"a": [1.5]}, "no rows": {"image": []},
    "a path": {"image": [{"bytes": None, "path": "/etc/passwd"}]}, "a path up": {"image": [{"bytes": None, "path": "../../x.png"}]},
    "a path with a zero": {"image": [{"bytes": None, "path": "a\0b"}]},
    "negative labels": {"image": [CELL] * 2, "label": [0, -7]}, "a label missing": {"image": [CELL] * 2, "label": [0, None]},
    "large labels": {"image": [CELL] * 2, "label": [0, 10**9]},
    "labels beyond int64": {"image": [CELL] * 2, "label": pa.array([0, 2**64 - 1], pa.uint64())},
    "two images": {"image": [CELL], "img": [CELL], "png": [CELL]},
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_tables(name, tmp_path):
    pq.write_table(pa.table(TABLES[name]), tmp_path / "a.parquet")
    answered(data.load, str(tmp_path / "a.parquet"))
    answered(data.load, str(tmp_path))


@pytest.mark.parametrize("labels", [[0.5, 1.5], [[0, 1], [1]], [[], [0, 1]], [{"a": 1}, {"a": 2}]])
def test_labels_that_are_no_classes(labels, tmp_path):
    """They are no labels; as the ones asked for they are refused."""
    pq.write_table(pa.table({"image": [CELL] * 2, "label": labels}), tmp_path / "a.parquet")
    answered(data.load, str(tmp_path), label_column="label")
    answered(data.load, str(tmp_path), label_column="none")
    answered(data.load, str(tmp_path), image_column="label")


def test_damaged_tables(tmp_path):
    """Cut at 40 places, 200 with flipped bytes, foreign content, and metadata of features that are none."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [CELL] * 8, "label": list(range(8))}), path)
    whole = path.read_bytes()
    for stop in np.linspace(0, len(whole) - 1, 40).astype(int):
        path.write_bytes(whole[:stop])
        answered(data.load, str(path))
    for content in (
        b"PAR1" + bytes(100) + b"PAR1",
        b"text",
        b"PAR1" + b"\xff" * 12 + b"PAR1",
        b"version https://git-lfs.github.com/spec/v1",
    ):
        path.write_bytes(content)
        answered(data.load, str(path))
    for features in ("[", "[]", '{"info": 5}', '{"info": {"features": []}}', '{"info": {"features": {"image": 5}}}', "[" * 100_000,
                     '{"info": {"features": {"label": {"_type": "ClassLabel", "names": 5}}}}'):  # fmt: skip
        table = pa.table({"image": [CELL], "label": [0]}).replace_schema_metadata({"huggingface": features})
        pq.write_table(table, path)
        tried.append(f"features {features[:20]}")
        with contextlib.suppress(DataError):
            assert len(data.load(str(path))) == 1


@pytest.mark.parametrize("name", DAMAGED)
def test_folders_of_datasets_and_latents(name, tmp_path):
    for file in ("dataset_dict.json", "state.json", "latents.json", "latents-unfinished.json"):
        folder = tmp_path / file
        folder.mkdir()
        (folder / file).write_bytes(DAMAGED[name])
        refused("train-imm", "--data", folder, "--preset", "digits-imm", status=(2, 3))


# Arrays


def npy(shape: str, descr: str = "|u1", content: bytes = b"", version: int = 1) -> bytes:
    header = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}".encode() + b"\n"
    length = struct.pack("<H" if version == 1 else "<I", len(header))
    return b"\x93NUMPY" + bytes([version, 0]) + length + header + content


def saved(**arrays) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


EYE = saved(mu=np.zeros(4), sigma=np.eye(4))
ARRAYS = {
    "objects": saved(arr_0=np.array([{"a": 1}], object), mu=np.array([None]), sigma=np.array([None])),
    "10^15 elements": zip_of([("arr_0.npy", npy("(10**15,)".replace("10**15", str(10**15)))), ("mu.npy", npy(f"({10**15},)", "<f8")),
                              ("sigma.npy", npy(f"({10**15}, {10**15})", "<f8"))]),
    "10^15 images": zip_of([("arr_0.npy", npy(f"({10**15}, 8, 8, 3)"))]),
    "images of 10^9": zip_of([("arr_0.npy", npy(f"(2, {10**9}, {10**9}, 3)"))]),
    "fewer than none": zip_of([("arr_0.npy", npy("(-2, 8, 8, 3)"))]), "of no size": zip_of([("arr_0.npy", npy("(2, 0, 0, 3)"))]),
    "a header that is a program": zip_of([("arr_0.npy", npy("(__import__('os').system('true'), 8, 8, 3)"))]),
    "a shape that is none": zip_of([("arr_0.npy", npy("'abc'"))]), "a deep shape": zip_of([("arr_0.npy", npy("(" * 3000 + ")" * 3000))]),
    "a long header": zip_of([("arr_0.npy", b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31) + bytes(100))]),
    "an unknown version": zip_of([("arr_0.npy", npy("(2, 8, 8, 3)", version=9))]),
    "floats": saved(arr_0=np.zeros((2, 8, 8, 3))), "one image": saved(arr_0=np.zeros((8, 8), np.uint8)), "none": saved(arr_0=np.zeros((0, 8, 8, 3), np.uint8)),
    "a number": saved(arr_0=np.uint8(3)), "other members": saved(a=np.zeros(3)), "no arrays": zip_of([("arr_0.npy", b"text"), ("mu.npy", b"x"), ("sigma.npy", b"")]),
    "a bomb": zip_of([("arr_0.npy", npy(f"({10**9}, 8, 8, 3)", content=bytes(50_000_000)))]), "two of one name": zip_of([("arr_0.npy", b"1"), ("arr_0.npy", b"2")]),
    "no zip": b"PK\x03\x04" + bytes(50), "empty": b"", "text": b"text", "cut short": saved(arr_0=np.zeros((2, 8, 8, 3), np.uint8))[:-40],
}  # fmt: skip
STATISTICS = {
    "other sizes": saved(mu=np.zeros(4), sigma=np.eye(5)), "not finite": saved(mu=np.full(4, np.nan), sigma=np.eye(4)),
    "not positive": saved(mu=np.zeros(4), sigma=-np.eye(4)), "not symmetric": saved(mu=np.zeros(4), sigma=np.triu(np.ones((4, 4)))),
    "texts": saved(mu=np.array(["a"]), sigma=np.array(["b"])), "complex": saved(mu=np.zeros(4, complex), sigma=np.eye(4) * 1j),
    "numbers": saved(mu=np.float64(1), sigma=np.float64(1)), "four axes": saved(mu=np.zeros((1, 1, 1, 4)), sigma=np.zeros((1, 1, 4, 4))),
    "none": saved(mu=np.zeros(0), sigma=np.zeros((0, 0))), "one": saved(mu=np.zeros(1), sigma=np.eye(1)), "of another size": EYE,
    "a statement that is none": saved(mu=np.zeros(4), sigma=np.eye(4), mmgen_statistics=np.array("{" * 100_000)),
    "a statement of no object": saved(mu=np.zeros(4), sigma=np.eye(4), mmgen_statistics=np.array("[]")),
    "a number of 5,000 digits": saved(mu=np.zeros(4), sigma=np.eye(4), mmgen_statistics=np.array('{"format": ' + "9" * 5000 + "}")),
    "features of none": saved(feats=np.zeros((0, 4), np.float32)), "features not finite": saved(feats=np.full((4, 4), np.inf, np.float32)),
    "features of one axis": saved(feats=np.zeros(4, np.float32)), "features of 2^40": zip_of([("feats.npy", npy(f"(2, {2**40})", "<f4"))]),
}  # fmt: skip


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays(name, tmp_path):
    """As samples, and as what they are compared with."""
    (tmp_path / "a.npz").write_bytes(ARRAYS[name])
    refused("fid", "a.npz", "--features", "pixels", "--save-stats", "s.npz")
    refused("fid", "digits", "--features", "pixels", "--num", 8, "--ref", "a.npz")


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics(name, tmp_path):
    (tmp_path / "a.npz").write_bytes(STATISTICS[name])
    refused("fid", "digits", "--features", "pixels", "--num", 8, "--ref", "a.npz")


# Model files


def safetensors(header: object, content: bytes = bytes(64), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + content


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    return make_model(tmp_path_factory.mktemp("model") / "model.safetensors", channels=1).read_bytes()


def header_of(content: bytes) -> tuple[dict, bytes]:
    (length,) = struct.unpack_from("<Q", content)
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_config(content: bytes, change) -> bytes:
    header, tensors = header_of(content)
    own = json.loads(header["__metadata__"]["mmgen"])
    own = change(own) or own
    header["__metadata__"]["mmgen"] = own if isinstance(own, str) else json.dumps(own)
    return safetensors(header, tensors)


def setting(section: str | None, key: str, value):
    def change(own):
        (own["config"][section] if section else own["config"])[key] = value

    return change


HUGE = (10**9, 10**15, 10**30, -1, 0, 1.5, "x", None, [1], float("nan"))
NETWORK = ("model_channels", "num_blocks", "dropout")
CHANGES = {
    **{f"network.{key} = {value}": setting("network", key, value) for key in NETWORK for value in HUGE
       if (key, value) not in (("dropout", 0), ("num_blocks", 0))},
    **{f"{key} = {value}": setting(None, key, value) for key in ("resolution", "channels", "num_classes", "augment_dim") for value in HUGE
       if (key, value) not in (("num_classes", 0), ("augment_dim", 0))},
    "many levels": setting("network", "channel_mult", [2] * 10_000), "large levels": setting("network", "channel_mult", [10**9]),
    "no levels": setting("network", "channel_mult", []), "many sides": setting("network", "attn_resolutions", [4] * 10**6),
    "another kind": setting("network", "kind", "dit"), "a kind that is a list": setting("network", "kind", []),
    "a deep DiT": setting(None, "network", {"kind": "dit", "depth": 10**9}), "a wide DiT": setting(None, "network", {"kind": "dit", "hidden_size": 10**9}),
    "a DiT without heads": setting(None, "network", {"kind": "dit", "num_heads": 0}), "a DiT without patches": setting(None, "network", {"kind": "dit", "patch_size": 0}),
    "a UViT": setting(None, "network", {"kind": "uvit", "num_blocks": [10**9]}), "an ADM": setting(None, "network", {"kind": "adm", "channels_per_group": 0}),
    "an ADM without heads": setting(None, "network", {"kind": "adm", "channels_per_head": 0}), "EDM2": setting(None, "network", {"kind": "edm2", "noise_channels": -1}),
    "a UNet2DModel": setting(None, "network", {"kind": "diffusers_unet2d", "config": '{"block_out_channels": [1000000000]}'}),
    **{f"a pipeline's network {i}": setting(None, "network", {"kind": "diffusers_text", "model": "SD3Transformer2DModel", "image_resolution": 8, "config": one})
       for i, one in enumerate(("[" * 100_000, "[]", '{"num_layers": 1000000000}', '{"num_layers": "x"}', '{"num_attention_heads": 1000000000}'))},
    "a UNet2DModel of brackets": setting(None, "network", {"kind": "diffusers_unet2d", "config": "[" * 100_000}),
    "no flow": setting(None, "flow", None), "both": setting(None, "denoiser", {}), "no times": setting("flow", "t_max", None),
    "time beyond": setting("flow", "t_max", 1e300), "sigma_data 0": setting("flow", "sigma_data", 0), "time_scale nan": setting("flow", "time_scale", float("nan")),
    "steps": setting("sampling", "steps", 10**12), "no steps": setting("sampling", "steps", -3), "guidance": setting("sampling", "guidance", float("inf")),
    "a sampler": setting("sampling", "sampler", "x"), "names": setting(None, "class_names", [5]), "counts": setting(None, "class_counts", ["x"]),
    "training": setting(None, "training", []), "training's config": setting(None, "training", {"config": [], "images": []}),
    "latents": setting(None, "latents", {"vae": 5}), "data": setting(None, "data", ["x"]), "unknown": setting(None, "__class__", 1),
    "a format": lambda own: own.update(format=99), "a format that is a list": lambda own: own.update(format=[]), "no config": lambda own: own.pop("config") and None,
    "null": lambda own: "null", "a list": lambda own: "[]", "deep": lambda own: "[" * 100_000, "5,000 digits": lambda own: '{"format": ' + "9" * 5000 + "}",
}  # fmt: skip
HEADERS = {
    "of 2^62 bytes": lambda h, t: safetensors(h, t, 2**62), "of 2^32 bytes": lambda h, t: safetensors(h, t, 2**32),
    "of 0 bytes": lambda h, t: safetensors(h, t, 0), "of brackets": lambda h, t: safetensors(b"{" + b'"a":[' * 100_000),
    "offsets beyond": lambda h, t: safetensors({**h, "x": {"dtype": "F32", "shape": [2], "data_offsets": [2**40, 2**40 + 8]}}, t),
    "offsets that overlap": lambda h, t: safetensors({**h, "x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, t),
    "a shape of 2^80": lambda h, t: safetensors({**h, "x": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}}, t),
    "a key twice": lambda h, t: safetensors(json.dumps(h).encode()[:-1] + b"," + json.dumps({next(iter(h.keys() - {"__metadata__"})): 1}).encode()[1:], t),
    "a tensor more": lambda h, t: safetensors({**h, "x": {"dtype": "F32", "shape": [2], "data_offsets": [len(t), len(t) + 8]}}, t + bytes(8)),
    "no tensors": lambda h, t: safetensors({"__metadata__": h["__metadata__"]}, b""), "no metadata": lambda h, t: safetensors({k: v for k, v in h.items() if k[0] != "_"}, t),
    "metadata that is none": lambda h, t: safetensors({**h, "__metadata__": {"mmgen": 5}}, t), "cut short": lambda h, t: safetensors(h, t[:-9]),
}  # fmt: skip


@pytest.mark.parametrize("name", [*HEADERS, *CHANGES])
def test_model_files(name, whole, tmp_path):
    """By the commands that read them: sample, and of headers inspect, fid, push and distill too."""
    path = tmp_path / "m.safetensors"
    path.write_bytes(HEADERS[name](*header_of(whole)) if name in HEADERS else with_config(whole, CHANGES[name]))
    refused("sample", path, "--num", 1, "--out", tmp_path / "s", status=(1, 2, 4))
    assert not (tmp_path / "s").exists()
    if name in HEADERS:
        refused("fid", path, "--num", 2, "--features", "pixels", "--ref", "digits", status=(1, 2, 4))
        refused("push", path, "user/name", status=(1, 2, 4))
        refused("distill", "--teacher", path, "--data", "digits", "--out", tmp_path / "d", status=(2, 4))


# Folders of samples and scores


@pytest.mark.parametrize("name", DAMAGED)
def test_records_and_scores(name, digits_model, tmp_path):
    for file, out in (("samples.json", "s"), ("b.npz.json", "b.npz")):
        (tmp_path / "s").mkdir(exist_ok=True)
        place = tmp_path / "s" / file if out == "s" else tmp_path / file
        place.write_bytes(DAMAGED[name])
        refused("sample", digits_model, "--num", 1, "--out", tmp_path / out, status=2)
    (tmp_path / "s" / "0.png").write_bytes(GOOD)
    refused("fid", tmp_path / "s", "--features", "pixels", "--save-stats", "s.npz", status=2)
    (tmp_path / "s" / "samples.json").unlink()
    (tmp_path / "s" / "scores.json").write_bytes(DAMAGED[name])
    refused("fid", tmp_path / "s", "--features", "pixels", "--ref", "digits", "--ref-num", 8, status=3)


@pytest.mark.parametrize(
    "key", ["num", "complete", "data", "data_options", "steps", "guidance", "seed", "model", "times", "classes", "digits"]
)
def test_records_with_one_wrong_value(key, digits_model, tmp_path):
    assert command("sample", digits_model, "--num", 2, "--out", tmp_path / "s")[0] == 0
    file = tmp_path / "s" / "samples.json"
    record = json.loads(file.read_text())
    for value in (None, [], {}, "x", -1, 10**30, 1e999, [[[[]]]], {"split": 5}, {"a": 1}):
        file.write_text(json.dumps({**record, key: value}))
        for arguments in (
            ["sample", digits_model, "--num", 2, "--out", tmp_path / "s"],
            ["fid", tmp_path / "s", "--features", "pixels"],
        ):
            tried.append(f"{key}={value}")
            status, _, err = command(*arguments)
            assert status in (0, 1, 2, 3) and "Traceback" not in err


# The folder of a run

RUN = ["--max-images", "32", "--batch-size", "16", "--eval-num", "0", "--device", "cpu", "--set", "run.log_every=1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    status, _, err = command("train-imm", "--out", folder, *RUN)
    assert status == 0, err
    return folder


@pytest.mark.parametrize("name", DAMAGED)
def test_run_folders(name, run, tmp_path):
    """Each of its JSON files damaged in each way."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    found, content = RunFolder(folder), DAMAGED[name]
    (folder / "config.json").write_bytes(content)
    answered(found.open, "train-imm", {}, data.load("digits"))
    (folder / "results.json").write_bytes(content)
    assert found.read_results(128) is None
    (folder / "log.jsonl").write_bytes(content + b"\n" + (run / "log.jsonl").read_bytes())
    if name != "empty":
        answered(found.read_log)
    (state,) = folder.glob("checkpoints/*/state.json")
    state.write_bytes(content)
    network = torch.nn.Linear(1, 1)
    answered(
        load_checkpoint,
        state.parent,
        {"model": network},
        {"model": torch.optim.SGD(network.parameters())},
        EMA(network, {}),
        None,
    )


@pytest.mark.parametrize("file", ["config.json", "log.jsonl", "state.json", "network.safetensors", "optimizer.safetensors"])
def test_runs_are_not_continued(file, run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    place = folder / file if (folder / file).exists() else next(folder.glob(f"checkpoints/*/{file}"))
    place.write_bytes(b"[" * 100_000 + b"\n" + place.read_bytes())
    refused("train-imm", "--out", folder, *RUN, status=5)


def test_other_names_in_zips_of_samples(tmp_path):
    """A zip of samples in which the pictures are in two folders of one name, and one that says it is of another disk."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a\\0.png", GOOD)
        archive.writestr("a/0.png", GOOD)
    tried.append("two ways of writing one name")
    assert command("fid", tmp_path / "a.zip", "--features", "pixels", "--save-stats", "s.npz")[0] in (0, 3)
    if sys.platform == "linux":
        answered(data.load, "/proc/self/mem")
