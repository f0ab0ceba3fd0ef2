"""Extractors by TorchScript, exported programs and pixels; files that are not what they say, or mean harm."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mmgen.errors import ConfigError, ModelError
from mmgen.system.files import sha256_of
from mmgen.metrics.exported_program import ExportedProgram, _read
from mmgen.metrics.features import build_extractor
from mmgen.metrics.frechet import pixel_features
from mmgen.formats.network_file import EXPORTED, STATE_DICT, TORCHSCRIPT, content

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, about its formats


class Net(nn.Module):
    """Branches, several results of one operator, sizes that depend on the batch, buffers, constants, a part without
    gradients: what exported graphs consist of."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2)
        self.norm = nn.BatchNorm2d(8)
        self.linear = nn.Linear(16, 5)
        self.register_buffer("scale", torch.tensor([1.0, 2, 3]).view(1, 3, 1, 1))
        self.register_buffer("shift", torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1), persistent=False)
        self.norm.running_mean.normal_()

    def forward(self, x):
        x = x.float() / 127.5 - 1
        x = nn.functional.interpolate(x, size=(16, 16), mode="bilinear")
        x = self.norm(self.conv(x * self.scale + self.shift + torch.tensor([[[[1.0]], [[2.0]], [[3.0]]]]))).relu()
        a, b = x.chunk(2, 1)
        best, where = b.flatten(2).max(2)
        x = torch.cat([a.mean((2, 3)), best, where.float(), torch.arange(4, device=x.device).expand(x.shape[0], 4) / 4], 1)
        x = x.view(x.shape[0] * 2, -1).reshape(x.shape[0], -1)
        with torch.no_grad():
            return self.linear(x)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().eval()


def images(count: int, size: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def exported(net, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exported")
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = {"fixed": None, "dynamic": ({0: batch},)}
    for name, shape in shapes.items():
        torch.export.save(torch.export.export(net, (images(4),), dynamic_shapes=shape), folder / f"{name}.pt2")
    return {name: folder / f"{name}.pt2" for name in shapes}


@pytest.mark.parametrize("name", ["fixed", "dynamic"])
@pytest.mark.parametrize("count", [1, 4, 7, 8])
def test_exported_programs_compute_what_the_network_does(name, count, net, exported):
    extractor = build_extractor(str(exported[name]))
    found = extractor.extract(images(count))
    torch.testing.assert_close(found, net(images(count)).detach(), rtol=1e-6, atol=1e-6)
    assert found.shape == (count, 5) and not found.requires_grad


class Means(nn.Module):
    def forward(self, x):
        return x.float().sqrt().mean((2, 3))


def test_an_exported_program_again_by_torchs_own_loader(tmp_path):
    path = save(Means(), tmp_path / "means.pt2", images(4))
    theirs = torch.export.load(path).module()(images(4))
    torch.testing.assert_close(ExportedProgram(Path(path), "cpu")(images(4)), theirs, rtol=0, atol=0)


def test_what_the_extractor_says(exported):
    extractor = build_extractor(str(exported["fixed"]))
    assert (extractor.metric, extractor.title, extractor.warnings) == ("fd-fixed", "FD-fixed", ())
    assert extractor.same_size and extractor.colour and extractor.prepare is None and extractor.probabilities is None
    digest = sha256_of(exported["fixed"])
    assert extractor.protocol == {"features": "fixed", "network": "fixed.pt2", "sha256": digest} and len(digest) == 64


def layout(path: Path, target: Path, version: str) -> None:
    """Writes an archive of this torch anew, in the layout of an earlier one."""
    with zipfile.ZipFile(path) as archive:
        program, state, constants = _read(archive)
    names = {
        "2.6": ("serialized_exported_program.json", "serialized_state_dict.pt", "serialized_constants.pt"),
        "2.7": ("old/models/model.json", "old/data/weights/model.pt", "old/data/constants/model.pt"),
    }[version]
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr(names[0], json.dumps(program))
        for name, tensors in zip(names[1:], (state, constants), strict=True):
            with archive.open(name, "w") as file:
                torch.save(tensors, file)


@pytest.mark.parametrize("version", ["2.6", "2.7"])
def test_layouts_of_earlier_torch(version, net, exported, tmp_path):
    layout(exported["dynamic"], tmp_path / "old.pt2", version)
    assert content(tmp_path / "old.pt2") == EXPORTED
    found = ExportedProgram(tmp_path / "old.pt2", "cpu")(images(5))
    torch.testing.assert_close(found, net(images(5)), rtol=1e-6, atol=1e-6)


def test_images_of_another_size(exported):
    with pytest.raises(ModelError, match="fixed.pt2 was exported for images of 3x8x8, not 3x9x9"):
        build_extractor(str(exported["fixed"])).extract(images(4, 9))


def save(module: nn.Module, path: Path, *inputs: torch.Tensor) -> str:
    torch.export.save(torch.export.export(module, inputs), path)
    return str(path)


class Floats(nn.Module):
    def forward(self, x):
        return x.flatten(1)


class Two(nn.Module):
    def forward(self, x):
        return x.float().flatten(1), x.float()


class Both(nn.Module):
    def forward(self, x, y):
        return (x.float() + y).flatten(1)


class Dropped(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x.float().flatten(1), 0.5, training=True)


@pytest.mark.parametrize(
    "module, inputs, message",
    [
        (Floats(), [images(2).float()], "takes images of torch.float32: it must take uint8"),
        (Floats(), [images(2)[0]], "takes images of 3 dimensions"),
        (Two(), [images(2)], "takes 1 inputs and returns 2"),
        (Both(), [images(2), images(2)], "takes 2 inputs"),
        (Dropped(), [images(2)], "was exported in training mode: call eval"),
    ],
)
def test_programs_of_another_kind(module, inputs, message, tmp_path):
    path = save(module, tmp_path / "odd.pt2", *inputs)
    with pytest.raises(ModelError, match=f"odd.pt2 {message}"):
        build_extractor(path)


# Files that mean harm: what torch.export.load would run.


class Harm:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def rewritten(source: Path, target: Path, change) -> Path:
    """A copy of an archive with members changed: change(inner name, bytes) gives the new bytes."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            inner = name.partition("/")[2] or name
            new.writestr(name, change(inner, old.read(name)))
    return target


def is_program(name: str) -> bool:
    return name.startswith("models/") or name == "serialized_exported_program.json"


def with_program(source: Path, target: Path, change) -> Path:
    def edit(name, data):
        if not is_program(name):
            return data
        program = json.loads(data)
        change(program)
        return json.dumps(program).encode()

    return rewritten(source, target, edit)


def test_example_inputs_are_never_read(exported, net, tmp_path):
    harm = tmp_path / "harm"

    def poison(name, data):
        return pickle.dumps(Harm(harm)) if "inputs" in name else data

    path = rewritten(exported["dynamic"], tmp_path / "inputs.pt2", poison)
    found = build_extractor(str(path)).extract(images(3))
    torch.testing.assert_close(found, net(images(3)), rtol=1e-6, atol=1e-6)
    assert not harm.exists()


def test_pickled_weights_are_refused(exported, tmp_path):
    harm = tmp_path / "harm"
    layout(exported["dynamic"], tmp_path / "old.pt2", "2.6")

    def poison(name, data):
        return pickle.dumps(Harm(harm)) if name == "serialized_state_dict.pt" else data

    path = rewritten(tmp_path / "old.pt2", tmp_path / "weights.pt2", poison)
    with pytest.raises(ModelError, match="weights.pt2 holds pickled objects other than tensors"):
        build_extractor(str(path))
    assert not harm.exists()


def test_pickled_constants_of_an_archive_are_refused(tmp_path, exported):
    harm = tmp_path / "harm"
    layout(exported["dynamic"], tmp_path / "old.pt2", "2.7")

    def poison(name, data):
        return pickle.dumps(Harm(harm)) if name == "data/constants/model.pt" else data

    path = rewritten(tmp_path / "old.pt2", tmp_path / "constants.pt2", poison)
    with pytest.raises(ModelError, match="constants.pt2 holds pickled objects"):
        build_extractor(str(path))
    assert not harm.exists()


def test_symbolic_sizes_are_not_evaluated(exported, net, tmp_path):
    harm = tmp_path / "harm"

    def poison(program):
        for value in program["graph_module"]["graph"]["sym_int_values"].values():
            value["as_expr"]["expr_str"] = f"open({str(harm)!r}, 'w')"
        program["guards_code"] = [f"open({str(harm)!r}, 'w')"]

    path = with_program(exported["dynamic"], tmp_path / "sizes.pt2", poison)
    found = build_extractor(str(path)).extract(images(3))
    torch.testing.assert_close(found, net(images(3)), rtol=1e-6, atol=1e-6)
    assert not harm.exists()


@pytest.mark.parametrize(
    "target",
    [
        "torch.serialization.os.system",
        "_operator.methodcaller",
        "_operator.attrgetter",
        "torch.load",
        "torch.ops.aten.from_file.default",
        "torch.ops.aten.__class__.mro",
        "torch.ops.load_library",
        "torch.ops.aten.relu.__init__",
        "math.__loader__",
        "os.system",
    ],
)
def test_operators_outside_the_allowed_are_refused(target, exported, tmp_path):
    def poison(program):
        program["graph_module"]["graph"]["nodes"][-1]["target"] = target

    path = with_program(exported["dynamic"], tmp_path / "calls.pt2", poison)
    with pytest.raises(ModelError) as caught:
        build_extractor(str(path))
    assert f"calls {target}, which is none of the operators that are run here" in str(caught.value)


def test_damaged_programs(exported, tmp_path):
    path = with_program(exported["fixed"], tmp_path / "damaged.pt2", lambda program: program.pop("graph_module"))
    with pytest.raises(ModelError, match="damaged.pt2 is damaged, or its layout is not known"):
        build_extractor(str(path))
    path = with_program(exported["fixed"], tmp_path / "later.pt2", lambda p: p["schema_version"].update(major=9))
    with pytest.raises(ModelError, match="later.pt2 is of schema version 9"):
        build_extractor(str(path))


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


def test_kinds_of_files(tmp_path, exported):
    assert content(exported["fixed"]) == EXPORTED
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
