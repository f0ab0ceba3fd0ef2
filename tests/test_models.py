"""Model files, pixels, settings and atomic writing: what is read back, and what is refused with which words."""

from __future__ import annotations

import dataclasses
import json
import pickle
from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file, save_file

import mmgen
from mmgen.sampling.drawing import SampleSettings, draw
from mmgen.errors import ConfigError, MmgenError, ModelError
from mmgen.system.files import remove_leftovers, replacing, replacing_folder, write_json
from mmgen.diffusion.flow_map import FlowMapSettings
from mmgen.models.config import ModelConfig, SamplingSettings
from mmgen.models.files import METADATA_KEY, find_model, load_model, read_config, save_model
from mmgen.models.flow_model import FlowModel
from mmgen.models.pixels import from_uint8, to_uint8
from mmgen.networks import DiTSettings, UNetSettings
from mmgen.system.schema import flatten, from_dict

UNET = UNetSettings(model_channels=16, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), embedding="fourier")
DIT = DiTSettings(hidden_size=16, depth=1, num_heads=2)


def make(network=DIT, **options) -> FlowModel:
    flow = FlowMapSettings("fm", "euler_fm", "t-s", t_min=0.0, t_max=0.994)
    return FlowModel(ModelConfig(network, flow, resolution=8, channels=3, num_classes=4, **options))


def save(path, model: FlowModel | None = None, change=None, metadata=None):
    """A model file, with its tensors or its header's content changed on the way."""
    model = model or make()
    save_model(path, model.config, model.network.state_dict())
    if change or metadata:
        state = load_file(path)
        header = {"format": 1, "config": dataclasses.asdict(model.config)}
        save_file(change(state) if change else state, path, metadata or {METADATA_KEY: json.dumps(header)})
    return path


@pytest.mark.parametrize("network", [UNET, DIT], ids=["unet", "dit"])
def test_round_trip(tmp_path, network):
    """Config and every tensor, bit for bit; ready to sample; one file and nothing beside it."""
    model = make(
        network, class_names=["a", "b", "c", "ü"], class_counts=[4, 3, 2, 1], data="digits", augment_dim=0,
        sampling=SamplingSettings("restart", "edm", 1.5), training={"images": 10**12, "loss": {"k": 12.5}},
    )  # fmt: skip
    path = save(tmp_path / "deep" / "model.safetensors", model)
    loaded = mmgen.load(tmp_path / "deep")
    assert loaded.config == read_config(path) == model.config
    assert isinstance(loaded.config.network, type(network))
    state = model.network.state_dict()
    assert loaded.network.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in loaded.network.state_dict().items())
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert torch.equal(loaded.sample(3, steps=2, seed=1).images, draw(model.eval(), SampleSettings(2, seed=1), range(3))[0])
    assert [p.name for p in path.parent.iterdir()] == ["model.safetensors"]


def test_tensors_that_do_not_fit_are_named(tmp_path):
    changes = {
        "it lacks blocks.0.fc1.bias": lambda s: {k: v for k, v in s.items() if k != "blocks.0.fc1.bias"},
        "it has unknown blocks.0.fc3.bias": lambda s: {**s, "blocks.0.fc3.bias": torch.zeros(2)},
        "shapes differ for out.bias": lambda s: {**s, "out.bias": torch.zeros(5)},
        f"and {len(make().network.state_dict()) - 4} more": lambda s: {"out.bias": s["out.bias"]},
    }
    for message, change in changes.items():
        path = save(tmp_path / "model.safetensors", change=change)
        with pytest.raises(ModelError, match=message):
            load_model(path)


def test_damaged_files_are_refused(tmp_path):
    path = save(tmp_path / "model.safetensors")
    whole = path.read_bytes()
    for part in (whole[: len(whole) // 2], whole[:100], whole[:4], b"", b"\xff" * 1000):
        path.write_bytes(part)
        with pytest.raises(ModelError, match="model.safetensors cannot be read"):
            load_model(path)
    with pytest.raises(ModelError, match="cannot be read"):
        load_model(tmp_path / "none.safetensors")


def test_foreign_files_and_headers_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ModelError, match="not one of mmgen's"):
        load_model(path)
    good = dataclasses.asdict(make().config)
    headers = {
        "format 2, this version of mmgen reads 1": json.dumps({"format": 2, "config": good}),
        "damaged": "{",
        "header of .* is damaged": json.dumps([1, 2]),
        "damaged.*config": json.dumps({"format": 1}),
        "damaged.*resolutoin": json.dumps({"format": 1, "config": {**good, "resolutoin": 8}}),
        "damaged.*kind": json.dumps({"format": 1, "config": {**good, "network": {"kind": "unit"}}}),
        "damaged.*schedule": json.dumps({"format": 1, "config": {**good, "flow": {"schedule": "linear"}}}),
    }
    for message, header in headers.items():
        with pytest.raises(ModelError, match=message):
            load_model(save(path, metadata={METADATA_KEY: header}))


class Exploding:
    """Writes a file when unpickled."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_nothing_is_executed(tmp_path):
    """A pickle under the name of a model file is refused without being unpickled."""
    path, trace = tmp_path / "model.safetensors", tmp_path / "trace"
    path.write_bytes(pickle.dumps(Exploding(trace)))
    with pytest.raises(ModelError):
        mmgen.load(tmp_path)
    torch.save(Exploding(trace), path)
    with pytest.raises(ModelError):
        mmgen.load(path)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Exploding(trace))).close()
    assert trace.exists()  # the trap works


def test_find_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "runs" / "digits"
    run.mkdir(parents=True)
    with pytest.raises(ModelError, match="folder without model.safetensors"):
        find_model(run)
    for name in ("model", "model-ema-0.999", "model-ema-0.9999"):
        (run / f"{name}.safetensors").touch()
    main, other = run / "model.safetensors", run / "model-ema-0.999.safetensors"
    assert find_model(run) == find_model(main) == main
    assert find_model("runs/digits") == main.relative_to(tmp_path)
    assert find_model(run, "0.999") == find_model(main, "0.999") == other
    for place in (run, main):
        with pytest.raises(ModelError, match="its other averages: 0.999, 0.9999"):
            find_model(place, "0.99")
    with pytest.raises(ModelError, match="there is nothing at runs/none.safetensors"):
        find_model("runs/none.safetensors")
    for place in ("/nowhere/at-all", "./no", "no-slash", "a/b/c"):
        with pytest.raises(ModelError, match=f"there is no model at {place}"):
            find_model(place)
    for place in ("someone/some-model", "hf://someone/some-model"):
        with pytest.raises(ModelError, match="someone/some-model is not in the local cache"):
            find_model(place)


# Pixels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_pixel_value_survives(dtype):
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(every).to(dtype)), every)
    assert from_uint8(every).dtype == torch.float32 and from_uint8(every)[[0, 255]].tolist() == [-1, 1]


def test_pixels_are_clipped_and_truncated():
    """x * 127.5 + 128: -1 is 0.5, truncated to 0; 0 is 128; 1 is 255.5."""
    x = torch.tensor([-1e9, -1.5, -1.01, -1.0, -0.997, 0.0, 0.0078, 0.0079, 0.99, 1.0, 1.2, 1e9])
    assert to_uint8(x).tolist() == [0, 0, 0, 0, 0, 128, 128, 129, 254, 255, 255, 255]


# Settings


@dataclass(frozen=True)
class Inner:
    width: int = 3
    kernel: Literal["laplace", "rbf"] = "laplace"
    sides: tuple[int, ...] = (1, 2)


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner = Inner()
    rate: float = 0.5
    flag: bool = False
    limit: float | None = None
    network: UNetSettings | DiTSettings = UNetSettings()  # noqa: RUF009


def test_settings_are_converted():
    content = {
        "name": "x", "inner": {"width": 4.0, "sides": [3]}, "rate": 1, "flag": True, "limit": 2, "network": {"kind": "dit", "depth": 3},
    }  # fmt: skip
    found = from_dict(Outer, content)
    assert found == Outer("x", Inner(4, sides=(3,)), 1.0, True, 2.0, DiTSettings(depth=3))
    assert isinstance(found.inner.width, int) and isinstance(found.rate, float)
    assert from_dict(Outer, {"name": "x", "limit": None}) == Outer("x")
    assert from_dict(Outer, json.loads(json.dumps(dataclasses.asdict(found)))) == found


@pytest.mark.parametrize(
    "content, message",
    [
        (
            {"inner": {"widht": 3}},
            r"unknown setting 'inner.widht': did you mean 'inner.width'\? Valid: inner.width, inner.kernel, inner.sides",
        ),
        ({"ratee": 1}, "unknown setting 'ratee': did you mean 'rate'"),
        ({"inner": {"kernel": "laplac"}}, "inner.kernel = 'laplac' is not possible: did you mean 'laplace'"),
        ({"inner": {"kernel": 3}}, "inner.kernel = 3 is not possible"),
        ({"inner": {"width": 2.5}}, "inner.width must be a whole number, not 2.5"),
        ({"inner": {"width": True}}, "inner.width must be a whole number, not True"),
        ({"inner": {"width": "3"}}, "inner.width must be a whole number, not '3'"),
        ({"inner": {"sides": [1, "2"]}}, r"inner.sides\[1\] must be a whole number"),
        ({"inner": {"sides": 3}}, "inner.sides must be a list"),
        ({"inner": 3}, "inner must be a table, not 3"),
        ({"rate": "fast"}, "rate must be a number, not 'fast'"),
        ({"rate": float("nan")}, "rate must be a number"),
        ({"rate": False}, "rate must be a number"),
        ({"flag": 1}, "flag must be true or false, not 1"),
        ({"limit": "none"}, "limit must be a number"),
        ({"name": 3}, "name must be a text, not 3"),
        ({"network": {"kind": "dot"}}, "network.kind = 'dot' is not possible: did you mean 'dit'"),
        ({"network": {"depth": 3}}, "network.kind = None"),
        ({"network": {"kind": "dit", "dept": 3}}, "unknown setting 'network.dept': did you mean 'network.depth'"),
        ({}, None),
    ],
)
def test_impossible_settings_are_refused(content, message):
    if message is None:
        with pytest.raises(ConfigError, match="missing settings: name"):
            from_dict(Outer, content)
        return
    with pytest.raises(ConfigError, match=message):
        from_dict(Outer, {"name": "x", **content})


def test_flatten():
    assert dict(flatten({"a": 1, "b": {"c": 2, "d": {"e": [3]}}})) == {"a": 1, "b.c": 2, "b.d.e": [3]}


# Files


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_interrupted_writing_leaves_the_old(tmp_path, error):
    file, folder = tmp_path / "a.txt", tmp_path / "b"
    file.write_text("old")
    folder.mkdir()
    (folder / "kept").write_text("old")
    for replace, path in ((replacing, file), (replacing_folder, folder)):
        with pytest.raises(MmgenError if error is OSError else error), replace(path) as temporary:
            (temporary if replace is replacing else temporary / "part").write_text("half")
            raise error("stop")
    assert file.read_text() == "old" and [p.name for p in folder.iterdir()] == ["kept"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "b"]


def test_finished_writing_replaces_the_old(tmp_path):
    for content in ({"a": 1}, {"a": [2]}):
        write_json(tmp_path / "new" / "a.json", content)
        assert json.loads((tmp_path / "new" / "a.json").read_text()) == content
        with replacing_folder(tmp_path / "new" / "b") as temporary:
            (temporary / f"{len(str(content))}").write_text("x")
        assert [p.name for p in (tmp_path / "new" / "b").iterdir()] == [f"{len(str(content))}"]
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["a.json", "b"]


def test_a_folder_as_good_is_kept_and_never_missing(tmp_path):
    path = tmp_path / "b"
    path.mkdir()
    (path / "first").write_text("x")
    before = path.stat().st_ino
    with replacing_folder(path, keep=lambda: (path / "first").exists()) as temporary:
        (temporary / "second").write_text("x")
    assert path.stat().st_ino == before and [p.name for p in path.iterdir()] == ["first"]
    (path / "first").rename(path / "damaged")
    with replacing_folder(path, keep=lambda: (path / "first").exists()) as temporary:
        (temporary / "second").write_text("x")
    assert [p.name for p in path.iterdir()] == ["second"] and [p.name for p in tmp_path.iterdir()] == ["b"]


def test_unseen_until_finished(tmp_path):
    with replacing(tmp_path / "a.bin") as temporary:
        temporary.write_bytes(b"1")
        assert not (tmp_path / "a.bin").exists() and temporary.parent == tmp_path and temporary.suffix == ".bin"
    assert (tmp_path / "a.bin").read_bytes() == b"1"


def test_leftovers_of_a_killed_process(tmp_path):
    (tmp_path / ".tmp-x.safetensors").touch()
    (tmp_path / ".tmp-folder").mkdir()
    (tmp_path / ".tmp-folder" / "a").touch()
    (tmp_path / "kept").touch()
    remove_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]


def test_unwritable_place(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(MmgenError, match="cannot write"), replacing(tmp_path / "file" / "a.txt"):
        pass
