"""Tensors out of pickles and torch files, against torch itself; nothing of a file is ever executed."""

from __future__ import annotations

import argparse
import contextlib
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from original_files import (
    BUFFERS,
    EasyDict,
    Persistent,
    golden_state,
    original_modules,
    persistent_network,
    write_edm_pickle,
    write_pickle,
)
from torch import nn

from mmgen.formats.contents import choose, constructor_arguments
from mmgen.formats.safe_pickle import Holder, StoredTensor, materialise
from mmgen.formats.torch_files import opened
from mmgen.errors import ModelError

PROTOCOLS = [2, 3, 4, 5]
LAYOUTS = ["zip", "legacy", *(f"pickle {protocol}" for protocol in PROTOCOLS)]


def save(path: Path, value, layout: str) -> Path:
    if layout.startswith("pickle"):
        return write_pickle(path, value, int(layout[-1]))
    torch.save(value, path, _use_new_zipfile_serialization=layout == "zip")
    return path


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    with opened(path) as file:
        return materialise(choose(file.value, "ema", str(path)).tensors, str(path), path.stat().st_size)


def same(found: dict, expected: dict) -> None:
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert found[key].dtype == value.dtype and found[key].shape == value.shape, key
        assert found[key].is_contiguous() and not found[key].requires_grad, key
        bits = [torch.atleast_1d(v.detach().contiguous()).view(torch.uint8) for v in (found[key], value)]
        assert torch.equal(*bits), key


def refusal(content: bytes, tmp_path: Path) -> str:
    path = tmp_path / "file.pkl"
    path.write_bytes(content)
    with pytest.raises(ModelError) as error:
        tensors_of(path)
    message = str(error.value)
    assert "\n" not in message and len(message) < 400
    return message


def of_all_kinds() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 8, generator=generator)
    dtypes = [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
    return {
        **{str(dtype): (10 * base).to(dtype) for dtype in dtypes},
        "bool": base > 0,
        "complex": torch.complex(base, -base),
        "transposed": base.T,
        "part": base[2:5, ::3],
        "last": base[-1, -1:],
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 3),
        "tied": base,
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
        "parameter": nn.Parameter(base.clone()),
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_are_those_that_were_saved(layout, tmp_path):
    """Bit for bit; views, shared storages, every type of number."""
    expected = of_all_kinds()
    same(tensors_of(save(tmp_path / "a", expected, layout)), expected)
    if not layout.startswith("pickle"):
        theirs = torch.load(tmp_path / "a", weights_only=True)
        same(tensors_of(tmp_path / "a"), {key: value.detach() for key, value in theirs.items()})


@pytest.mark.parametrize("layout", ["zip", "legacy"])
def test_newer_types(layout, tmp_path):
    """Types without a storage class of their own: torch saves untyped storages."""
    numbers = torch.arange(6)
    expected = {"a": numbers.to(torch.uint16), "b": numbers.float().to(torch.float8_e4m3fn)[1:], "c": numbers.to(torch.uint64)}
    same(tensors_of(save(tmp_path / "a", expected, layout)), expected)


class Small(nn.Module):
    """Parameters, buffers of both kinds, names that share a part, nothing where something could be."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.ModuleList([nn.Linear(2, 2, bias=False)]))
        self.table = nn.ModuleDict({"8x8_block0": nn.Embedding(3, 2), "none": nn.Identity()})
        self.tied = self.net[2][0]
        self.register_buffer("fixed", torch.ones(3, dtype=torch.float16))
        self.register_parameter("absent", None)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_modules_flatten_to_their_state_dict(layout, tmp_path):
    module = Small()
    same(tensors_of(save(tmp_path / "a", {"model": module.net, "steps": 3}, layout)), module.net.state_dict())
    state = module.state_dict()
    same(tensors_of(save(tmp_path / "b", state, layout)), state)  # an OrderedDict with _metadata


def test_a_persistent_module_flattens_to_its_state_dict(tmp_path):
    """Also tied modules, which state_dict names twice, and buffers that it leaves out."""
    module = Persistent("Net", {"depth": 2}, tmp_path / "mark")
    inner = Small()
    module._modules.update(inner._modules)
    module.register_buffer("kept", torch.ones(2))
    expected = module.state_dict()
    same(tensors_of(save(tmp_path / "a", {"ema": module}, "pickle 4")), expected)
    module.register_buffer("passing", torch.zeros(2), persistent=False)
    found = tensors_of(save(tmp_path / "b", {"ema": module}, "pickle 4"))
    assert found.keys() - expected.keys() == {"passing"}
    assert [path.name for path in tmp_path.iterdir() if path.name == "mark"] == []


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", ["edm_ncsnpp_cond", "edm_adm_cond", "imm_ddpmpp_simple_edm_fm", "imm_dit_euler_fm_stride"])
def test_golden_networks_from_edm_pickles(name, protocol, tmp_path):
    """Every tensor, bit for bit, in the order of the original, and the source text inside stays text."""
    inner = "DiT" if "dit" in name else "SongUNet"
    state, given = golden_state(name), {"img_resolution": 8, "img_channels": 3, "label_dim": 10, "model_type": inner, "T": 0.9}
    path = write_edm_pickle(
        tmp_path / "a.pkl", state, "IMMPrecond", given, inner_class=inner, mark=tmp_path / "mark", protocol=protocol
    )
    same(tensors_of(path), state)
    assert not (tmp_path / "mark").exists()


def test_the_trap_works(tmp_path):
    path = write_edm_pickle(tmp_path / "a.pkl", {"model.b.weight": torch.ones(2)}, mark=tmp_path / "mark")
    with original_modules():
        pickle.loads(path.read_bytes())
    assert (tmp_path / "mark").exists()


def test_constructor_arguments(tmp_path):
    given = {"img_resolution": 8, "img_channels": 3, "label_dim": 10, "model_type": "SongUNet", "channel_mult": (1, 2), "x": None}
    state = {"model.enc.8x8_conv.weight": torch.ones(1, 1, 1, 1), "model.map_noise.freqs": torch.ones(2)}
    network = persistent_network(state, "EDMPrecond", given, sigma_data=np.float64(0.5), sizes=[1, 2], options=EasyDict(a=1))
    with opened(write_pickle(tmp_path / "a.pkl", network)) as file:
        assert type(file.value) is Holder
        found = constructor_arguments(file.value)
    assert found["class_name"] == "EDMPrecond"
    assert found["init_kwargs"] == {**given, "channel_mult": [1, 2]}
    assert found["attributes"] == {"sigma_data": 0.5, "sizes": [1, 2], "options": {"a": 1}}
    inner = found["modules"]["model"]
    assert inner["class_name"] == "SongUNet" and inner["init_kwargs"]["in_channels"] == 3
    assert inner["modules"]["enc"]["modules"]["8x8_conv"] == {"class_name": "Conv2d", "init_kwargs": {"eps": 1e-6}}
    assert {key.rsplit(".", 1)[1] for key in tensors_of(tmp_path / "a.pkl")} == {"weight", BUFFERS[1]}


def test_what_else_a_file_holds(tmp_path):
    """Plain values of the kinds that checkpoints carry."""
    value = {
        "a": torch.float16, "b": torch.Size([1, 2]), "c": torch.device("cuda:0"), "d": argparse.Namespace(x=1, path=Path("u/v")),
        "e": {1, 2}, "f": frozenset({"w"}), "g": np.float32(2), "h": np.eye(2), "i": 2**70, "j": -1.5, "k": (None, True),
    }  # fmt: skip
    for layout in LAYOUTS:
        if layout == "legacy":
            continue  # numbers above 2^63 are fine there too; one layout of torch.save is enough
        with opened(save(tmp_path / "a", value, layout)) as file:
            found = file.value
        assert found["a"] is torch.float16 and found["b"] == (1, 2) and found["c"].startswith("cuda")
        assert found["d"].name == "argparse.Namespace" and found["d"].state == {"x": 1, "path": "u/v"}
        assert sorted(found["e"]) == [1, 2] and found["f"] == ["w"] and found["g"] == 2 and (found["h"] == np.eye(2)).all()
        assert found["i"] == 2**70 and found["j"] == -1.5 and found["k"] == (None, True)


def test_tensors_are_read_when_asked_for(tmp_path):
    """Opening makes notes of tensors, and no tensor."""
    torch.save({"model": {"a": torch.ones(3)}, "ema": {"a": torch.ones(2)}}, tmp_path / "a.pt")
    with opened(tmp_path / "a.pt") as file:
        note = file.value["model"]["a"]
        assert type(note) is StoredTensor and (note.shape, note.dtype, note.numel) == ((3,), torch.float32, 3)


class Calls:
    """Pickles as a call of a function, which is made when the file is opened by pickle."""

    def __init__(self, function, *arguments):
        self.parts = (function, arguments)

    def __reduce__(self):
        return self.parts

    def __call__(self):  # so that a call may give the function of another
        raise AssertionError


def attacks(mark: Path) -> dict:
    """What creates `mark` when opened by pickle, by the name that is refused."""
    run = Calls(exec, f"open({str(mark)!r}, 'w').close()")
    persistent = Persistent("Net", {"options": run})
    stored = torch.ones(2)
    return {
        "builtins.exec": run,
        "builtins.eval": Calls(eval, f"open({str(mark)!r}, 'w').close()"),
        f"{os.system.__module__}.system": Calls(os.system, f"echo > '{mark}'"),
        f"{os.mkdir.__module__}.mkdir": Calls(os.mkdir, str(mark)),
        "builtins.getattr": Calls(Calls(getattr, Calls(__import__, "os"), "system"), f"echo > '{mark}'"),
        "builtins.exec in a state": nn.Sequential(nn.Linear(1, 1), _with(nn.Identity(), run)),
        "builtins.exec in constructor arguments": persistent,
        "builtins.exec beside tensors": {"a": stored, "b": [{"c": (run,)}]},
        "torch.serialization.load": Calls(torch.load, str(mark)),
        "torch.hub.load": Calls(torch.hub.load, str(mark.parent), "x"),
    }


def _with(module: nn.Module, value) -> nn.Module:
    module.hidden = value
    return module


@pytest.mark.parametrize("layout", LAYOUTS)
def test_attacks_are_refused_by_name(layout, tmp_path):
    mark = tmp_path / "mark"
    for name, value in attacks(mark).items():
        with original_modules():
            path = save(tmp_path / "a", {"ema": value}, layout)
        with pytest.raises(ModelError, match=f"asks for {name.split(' ')[0].replace('builtins', '(__builtin__|builtins)')}"):
            tensors_of(path)
        assert not mark.exists()


def test_the_attacks_would_work(tmp_path):
    for i, name in enumerate(name for name in attacks(tmp_path) if not name.startswith("torch.")):
        mark = tmp_path / str(i)
        with original_modules():
            content = pickle.dumps(attacks(mark)[name])
            with contextlib.suppress(Exception):  # what it returns may not fit where it stands
                pickle.loads(content)
        assert mark.exists(), name


def inner_bytes(program: bytes) -> bytes:
    """A pickle that gives `program` to torch.storage._load_from_bytes."""
    return b"\x80\x04ctorch.storage\n_load_from_bytes\nB" + struct.pack("<I", len(program)) + program + b"\x85R."


def legacy(*values) -> bytes:
    """The start of torch.save's older format, and pickles of `values`."""
    return b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, *values))


def storage_file(numel: int = 2, data: bytes = bytes(8), kind: str = "FloatStorage") -> bytes:
    program = b"\x80\x02(X\x07\x00\x00\x00storagectorch\n" + kind.encode() + b"\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
    program += b"\x8a\x08" + struct.pack("<q", numel) + b"NtQ."
    return legacy({"little_endian": True}) + program + pickle.dumps(["0"], 2) + struct.pack("<q", numel) + data


REBUILD = b"\x80\x04}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n("


def tensor_file(offset: int, shape: bytes, stride: bytes, storage: bytes | None = None) -> bytes:
    """{"a": a tensor} of a storage of two floats; shape and stride are pickled tuples."""
    storage = inner_bytes(storage_file())[2:-1] if storage is None else storage
    return REBUILD + storage + b"\x8a\x08" + struct.pack("<q", offset) + shape + stride + b"\x89NtRs."


def number(n: int) -> bytes:
    return b"\x8a\x0a" + n.to_bytes(10, "little", signed=True)


ONE = b"K\x01\x85"


def test_the_parts_of_these_tests_make_a_tensor(tmp_path):
    (tmp_path / "a").write_bytes(tensor_file(0, b"K\x02\x85", ONE))
    same(tensors_of(tmp_path / "a"), {"a": torch.zeros(2)})


DAMAGES = {
    "too long": tensor_file(0, b"K\x03\x85", ONE),
    "too far": tensor_file(1, b"K\x02\x85", ONE),
    "stride too wide": tensor_file(0, b"K\x02\x85", b"K\x02\x85"),
    "huge": tensor_file(0, number(2**40) + b"\x85", ONE),
    "huge by repetition": tensor_file(0, number(2**40) + b"\x85", b"K\x00\x85"),
    "product beyond 64 bits": tensor_file(0, (number(2**40) + number(2**40)) + b"\x86", b"K\x00K\x00\x86"),
    "negative": tensor_file(0, number(-1) + b"\x85", ONE),
    "negative offset": tensor_file(-1, ONE, ONE),
    "negative stride": tensor_file(1, b"K\x02\x85", number(-1) + b"\x85"),
    "shape of text": tensor_file(0, b"X\x01\x00\x00\x00a\x85", ONE),
    "shape and strides differ": tensor_file(0, ONE, b"K\x01K\x01\x86"),
    "too many axes": tensor_file(0, b"(" + b"K\x01" * 40 + b"t", b"(" + b"K\x01" * 40 + b"t"),
    "storage is a number": tensor_file(0, ONE, ONE, b"K\x01"),
    "storage declared larger": inner_bytes(storage_file(2**40)),
    "storage of negative size": inner_bytes(storage_file(-1)),
    "storage cut short": inner_bytes(storage_file()[:-1]),
    "storage of an unknown type": inner_bytes(storage_file(kind="QInt8Storage")),
    "no storage": inner_bytes(legacy({"little_endian": True}, 1, [])),
    "big-endian": inner_bytes(legacy({"little_endian": False}, 1, [])),
    "state of a tensor": tensor_file(0, ONE, ONE)[:-2] + b"}bs.",
    "persistent object without a class": b"\x80\x04ctorch_utils.persistence\n_reconstruct_persistent_obj\n}\x85R.",
    "call of a type of numbers": b"\x80\x04ctorch\nfloat32\n)R.",
    "call of a class": b"\x80\x04ctorch\nTensor\n)R.",
    "object of a function": b"\x80\x04ctorch._utils\n_rebuild_tensor_v2\n)\x81.",
    "a persistent id of another kind": b"\x80\x02X\x01\x00\x00\x00aQ.",
    "state set twice": b"\x80\x02ctorch.nn.modules.linear\nLinear\n)\x81}b}b.",
    "holds itself": b"\x80\x04}\x94X\x01\x00\x00\x00ah\x00s.",
    "a module that holds itself": b"\x80\x02ctorch.nn.modules.linear\nLinear\n)\x81q\x00}X\x08\x00\x00\x00_moduleshx\x00sb."
    .replace(b"hx\x00", b"h\x00"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_has_one_sentence(name, tmp_path):
    message = refusal(DAMAGES[name], tmp_path)
    assert "fetch it again" in message or "not opened" in message


NAMES = [
    ("os", "system"), ("posix", "system"), ("builtins", "eval"), ("builtins", "getattr"), ("__builtin__", "apply"),
    ("torch", "load"), ("torch", "save"), ("torch.hub", "load"), ("torch.jit", "load"),
    ("torch._utils", "_rebuild_wrapper_subclass"),
    ("torch._utils", "_import_dotted_name"), ("torch.storage", "_load_from_bytes.__globals__"), ("torch.nn", "Linear.forward"),
    ("torch.nn.modulesx", "Linear"), ("timmy", "Mlp"), ("dnnlib.util", "call_func_by_name"),
    ("torch_utils.persistence", "import_hooks"),
    ("collections", "namedtuple"), ("argparse", "ArgumentParser"), ("training.networks", "EDMPrecond"), ("models", "DiT"),
    ("numpy", "load"), ("functools", "partial"), ("copyreg", "_reconstructor"), ("mmgen.formats.reading", "read"), ("", ""),
]  # fmt: skip


@pytest.mark.parametrize("module, name", NAMES)
def test_any_other_name_is_refused_by_name(module, name, tmp_path):
    call = f"c{module}\n{name}\n(S'x'\ntR.".encode()
    assert f"asks for {module}.{name}" in refusal(call, tmp_path)
    assert f"asks for {module}.{name}" in refusal(inner_bytes(call), tmp_path)
    magic = legacy({"little_endian": True})
    assert f"asks for {module}.{name}" in refusal(inner_bytes(magic + call), tmp_path)
    assert f"asks for {module}.{name}" in refusal(magic + call, tmp_path)


@pytest.mark.parametrize("module", ["torch.nn.modules.linear", "timm.layers.mlp", "torch.nn.modules.os"])
def test_classes_become_holders(module, tmp_path):
    """Whatever the name, nothing is imported: there need not be such a class."""
    (tmp_path / "a").write_bytes(f"\x80\x02c{module}\nsystem\n(X\x02\x00\x00\x00lstR.".encode("latin-1"))
    with opened(tmp_path / "a") as file:
        assert (file.value.name, file.value.arguments) == (f"{module}.system", ("ls",))


def test_a_storage_of_one_file_is_not_anothers(tmp_path):
    """Tensors with memory of their own: changing one changes no other."""
    base = torch.ones(4)
    torch.save({"a": base, "b": base, "c": base[1:]}, tmp_path / "a.pt")
    found = tensors_of(tmp_path / "a.pt")
    found["a"].zero_()
    assert found["b"].sum() == 4 and found["c"].sum() == 3
    (tmp_path / "a.pt").write_bytes(bytes(10))  # nor is it the file's any more
    assert found["b"].sum() == 4


def test_a_bool_of_any_byte_is_true(tmp_path):
    storage = inner_bytes(storage_file(2, b"\x07\x00", "BoolStorage"))[2:-1]
    (tmp_path / "a").write_bytes(tensor_file(0, b"K\x02\x85", ONE, storage))
    assert tensors_of(tmp_path / "a")["a"].view(torch.uint8).tolist() == [1, 0]


def test_bytes_that_are_named_often_are_paid_each_time(tmp_path):
    """A small file that would have the same storage parsed, or copied, again and again."""
    program = storage_file(20_000, bytes(80_000))
    parse = b"\x80\x04](ctorch.storage\n_load_from_bytes\n\x94B" + struct.pack("<I", len(program)) + program + b"\x85\x94"
    parse += b"Rh\x00h\x01" + b"Rh\x00h\x01" * 200 + b"Re."
    assert "far larger" in refusal(parse, tmp_path)
    part = number(20_000) + b"\x85" + ONE + b"\x89Nt"
    copies = (
        b"\x80\x04}(X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n\x94("
        + inner_bytes(program)[2:-1]
        + b"\x94K\x00"
        + part
        + b"R"
    )
    copies += b"".join(b"X\x03\x00\x00\x00%03dh\x00(h\x01K\x00%sR" % (i, part) for i in range(200)) + b"u."
    assert "far larger" in refusal(copies, tmp_path)
