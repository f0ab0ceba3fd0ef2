"""Runs the programs of `torch.export.save` from uint8 images to features, without torch's own loader.

That loader is not safe with files of others: it unpickles, evaluates text as Python to read symbolic sizes, and makes Python
source from names. The format itself needs none of this: a list of calls of torch's operators on named values, in JSON, and
tensors beside it. Here only the calls are made, of an allowed set of operators, and tensors are read as bytes or with
`weights_only=True`. Read are the layouts of torch 2.6 (one zip of JSON and saved tensors), of 2.7 and 2.8 (an archive with
saved tensors) and of later versions (an archive with raw tensors), all of schema version 8.
"""

from __future__ import annotations

import io
import json
import math
import operator
import pickle
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError

_SCHEMA = 8
_UINT8 = 1
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_FLOATS = (torch.float16, torch.float32, torch.float64, torch.complex32, torch.complex64, torch.complex128)
_DTYPES = dict(enumerate((*_INTEGERS, *_FLOATS, torch.bool, torch.bfloat16), start=1))
_MEMORY_FORMATS = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d, torch.preserve_format)
_STRIDED = 7
_PLAIN = ("as_int", "as_float", "as_bool", "as_string", "as_ints", "as_floats", "as_bools", "as_strings")
_LISTS = ("as_tensors", "as_sym_ints", "as_sym_floats", "as_sym_bools", "as_optional_tensors")
_ARITHMETIC = "add sub mul truediv floordiv mod pow neg pos abs getitem eq ne lt le gt ge and_ or_ not_ lshift rshift".split()
_SYMBOLIC = "sym_int sym_float sym_max sym_min sym_not sym_ite sym_sum".split()
_ROUNDING = "trunc ceil floor sqrt".split()
_NO_GRADIENTS = "torch.ops.higher_order.wrap_with_set_grad_enabled"
_FILE_ACCESS = ("from_file",)
_CHECK = "torch.ops.aten._assert_tensor_metadata.default"  # of the device that it was exported on, among others: left out


@dataclass(frozen=True)
class _Name:
    """A value by its name: an image, a weight, or the result of an earlier call."""

    name: str


@dataclass(frozen=True)
class _Call:
    function: Callable
    args: list
    kwargs: dict[str, Any]
    outputs: list  # names, or lists of names, or None where a result is not kept
    single: bool  # the function returns one value, not a tuple of them
    last_use: list[str]  # names that no later call needs


@dataclass(frozen=True)
class _Graph:
    inputs: list[str]
    calls: list[_Call]
    outputs: list

    def __call__(self, *values: Any) -> Any:
        env = dict(zip(self.inputs, values, strict=True))
        for call in self.calls:
            result = call.function(*_resolved(call.args, env), **_resolved(call.kwargs, env))
            for name, value in zip(call.outputs, [result] if call.single else result or (), strict=True):
                _assign(name, value, env)
            for name in call.last_use:
                env.pop(name, None)
        return tuple(_resolved(self.outputs, env))


class ExportedProgram:
    """A program that takes uint8 images [N, C, H, W] to features, on one device.

    Attributes:
        shape: [N, C, H, W] of the images it was exported for, None where any size will do.
    """

    def __init__(self, path: Path, device: torch.device | str) -> None:
        """Reads the file. Raises ModelError where it is damaged, takes other than one batch of uint8 images, was exported
        in training mode, or calls an operator that is not allowed."""
        self._path = path
        try:
            with zipfile.ZipFile(path) as archive:
                program, weights, constants = _read(archive)
            self._prepare(program, weights, constants, torch.device(device))
        except ModelError as error:
            raise ModelError(f"{path} {error}") from error
        except (zipfile.BadZipFile, OSError, EOFError, RuntimeError) as error:
            raise ModelError(f"{path} is damaged: {error}") from error
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise ModelError(f"{path} is damaged, or its layout is not known here ({error!r})") from error

    def _prepare(self, program: dict, weights: dict[str, Tensor], constants: dict[str, Tensor], device: torch.device) -> None:
        version = program["schema_version"]["major"]
        if version != _SCHEMA:
            raise ModelError(f"is of schema version {version}: export it with torch 2.6 or later (version {_SCHEMA})")
        module = program["graph_module"]
        values, images = {}, []
        for spec in module["signature"]["input_specs"]:
            ((kind, part),) = spec.items()
            if kind == "parameter":
                values[part["arg"]["name"]] = weights[part["parameter_name"]]
            elif kind == "buffer":
                source = weights if part["persistent"] else constants
                values[part["arg"]["name"]] = source[part["buffer_name"]]
            elif kind == "tensor_constant":
                values[part["arg"]["name"]] = constants[part["tensor_constant_name"]]
            elif kind == "user_input" and "as_tensor" in part["arg"]:
                images.append(part["arg"]["as_tensor"]["name"])
            else:
                raise ModelError(f"takes an input of the kind {kind!r}: it must take one batch of images and nothing else")
        outputs = module["signature"]["output_specs"]
        if any("user_output" not in spec for spec in outputs):
            raise ModelError("changes its own weights as it runs: call eval() on the network before exporting it")
        if len(images) != 1 or len(outputs) != 1:
            raise ModelError(f"takes {len(images)} inputs and returns {len(outputs)}: it must take images and return features")
        meta = module["graph"]["tensor_values"][images[0]]
        if meta["dtype"] != _UINT8:
            raise ModelError(f"takes images of {_DTYPES.get(meta['dtype'])}: it must take uint8 [N, 3, H, W] of 0 to 255")
        self.shape = [size.get("as_int") for size in meta["sizes"]]
        if len(self.shape) != 4:
            raise ModelError(f"takes images of {len(self.shape)} dimensions: it must take uint8 [N, 3, H, W]")
        self._graph = _graph(module["graph"], device)
        self._values = [None if name in images else values[name].detach().to(device) for name in self._graph.inputs]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features of images uint8 [N, C, H, W]; a program for N images only is given batches of N, the last one filled up.

        Raises ModelError where the program is for images of another size.
        """
        if any(size not in (None, given) for size, given in zip(self.shape[1:], images.shape[1:], strict=True)):
            wanted, given = ("x".join("any" if n is None else str(n) for n in s[1:]) for s in (self.shape, images.shape))
            raise ModelError(f"{self._path} was exported for images of {wanted}, not {given}")
        if self.shape[0] is None:
            return self._run(images)
        size, parts = self.shape[0], []
        for part in images.split(size):
            filled = torch.cat([part, part[-1:].expand(size - len(part), -1, -1, -1)])
            parts.append(self._run(filled)[: len(part)])
        return torch.cat(parts)

    def _run(self, images: Tensor) -> Tensor:
        (features,) = self._graph(*(images if value is None else value for value in self._values))
        return features


def _read(archive: zipfile.ZipFile) -> tuple[dict, dict[str, Tensor], dict[str, Tensor]]:
    """The program, its weights and its constants."""
    names = archive.namelist()
    if "serialized_exported_program.json" in names:
        program = json.loads(archive.read("serialized_exported_program.json"))
        return program, *(_saved(archive.read(f"serialized_{part}.pt")) for part in ("state_dict", "constants"))
    members = {name.partition("/")[2]: name for name in names}
    order = archive.read(members["byteorder"]).decode() if "byteorder" in members else sys.byteorder
    if order != sys.byteorder:
        raise ModelError(f"was written on a {order}-endian machine, and this one is {sys.byteorder}-endian")
    (model,) = [n for n in members if n.startswith("models/") and n.endswith(".json")]
    program = json.loads(archive.read(members[model]))
    stem = model[len("models/") : -len(".json")]
    return program, _tensors(archive, members, stem, "weights"), _tensors(archive, members, stem, "constants")


def _tensors(archive: zipfile.ZipFile, members: dict[str, str], stem: str, kind: str) -> dict[str, Tensor]:
    folder = f"data/{kind}/"
    if f"{folder}{stem}.pt" in members:
        return _saved(archive.read(members[f"{folder}{stem}.pt"]))
    config = json.loads(archive.read(members[f"{folder}{stem}_{kind}_config.json"]))["config"]
    flat: dict[str, Tensor] = {}  # by file: weights that share memory name the same file
    result = {}
    for name, entry in config.items():
        file, meta = entry["path_name"], entry["tensor_meta"]
        if meta is None:
            raise ModelError(f"holds {name!r}, an object that is not a tensor and could run code: it is not read")
        data = archive.read(members[folder + file])
        if entry["use_pickle"]:
            result[name] = _saved(data)
            continue
        if file not in flat:
            dtype = _DTYPES[meta["dtype"]]
            flat[file] = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
        sizes, strides = ([n["as_int"] for n in meta[key]] for key in ("sizes", "strides"))
        result[name] = flat[file].as_strided(sizes, strides, meta["storage_offset"]["as_int"])
    return result


def _saved(data: bytes) -> Any:
    """What torch.save wrote: tensors alone."""
    if not data:
        return {}
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError("holds pickled objects other than tensors, which could run code: they are not read") from error


def _graph(graph: dict, device: torch.device) -> _Graph:
    calls = [_call(node, device) for node in graph["nodes"] if node["target"] != _CHECK]
    outputs = [_argument(output, device) for output in graph["outputs"]]
    needed = _names(outputs)
    for call in reversed(calls):
        mentioned = _names([call.args, list(call.kwargs.values()), [_Name(n) for n in _flat(call.outputs)]])
        call.last_use.extend(mentioned - needed)
        needed |= mentioned
    return _Graph([_argument(i, device).name for i in graph["inputs"]], calls, outputs)


def _call(node: dict, device: torch.device) -> _Call:
    function, by_name = _function(node["target"])
    args, kwargs = [], {}
    for given in node["inputs"]:
        value = _argument(given["arg"], device)
        if given["name"] in ("training", "train") and value is True:
            raise ModelError("was exported in training mode: call eval() on the network first")
        if by_name:
            kwargs[given["name"]] = value
        else:
            args.append(value)
    outputs = [_output(output) for output in node["outputs"]]
    # One output is the value itself; a higher-order call returns a tuple even of one.
    single = len(outputs) == 1 and node["target"] != _NO_GRADIENTS
    if node["target"] == _NO_GRADIENTS and len(outputs) == 1 and isinstance(outputs[0], list):
        outputs = outputs[0]  # torch 2.6 lists the tuple's parts so
    return _Call(function, args, kwargs, outputs, single, [])


def _function(target: str) -> tuple[Callable, bool]:
    """The function that a node calls, and whether its arguments go by name."""
    space, _, name = target.rpartition(".")
    if space == "_operator" and name in _ARITHMETIC:
        return getattr(operator, name), False
    if space == "torch" and name in _SYMBOLIC:
        return getattr(torch, name), False
    if space == "math" and name in _ROUNDING:
        return getattr(math, name), False
    if target == _NO_GRADIENTS:
        return lambda enabled, graph, *values: graph(*values), False  # there are no gradients here anyway
    parts = target.split(".")
    if parts[:2] == ["torch", "ops"] and parts[2:3] in (["aten"], ["prims"]) and len(parts) == 5:
        packet = getattr(getattr(torch.ops, parts[2]), parts[3], None)
        if parts[3] not in _FILE_ACCESS and isinstance(packet, torch._ops.OpOverloadPacket) and parts[4] in packet.overloads():
            return getattr(packet, parts[4]), True
    raise ModelError(f"calls {target}, which is none of the operators that are run here")


def _argument(argument: dict, device: torch.device) -> Any:
    """A value of the schema: a constant, a _Name, a _Graph, or a list of them."""
    ((kind, value),) = argument.items()
    if kind == "as_none":
        return None
    if kind in ("as_tensor", "as_graph"):
        return _graph(value["graph"], device) if kind == "as_graph" else _Name(value["name"])
    if kind in ("as_sym_int", "as_sym_float", "as_sym_bool"):
        return _argument(value, device)
    if kind == "as_name":
        return _Name(value)
    if kind in _LISTS:
        return [_argument({"as_tensor": v} if "name" in v else v, device) for v in value]
    if kind == "as_float":
        return float(value)  # "Infinity" and "NaN" are strings in JSON
    if kind in _PLAIN:
        return value
    if kind == "as_scalar_type":
        return _DTYPES[value]
    if kind == "as_memory_format":
        return _MEMORY_FORMATS[value - 1]
    if kind == "as_layout" and value == _STRIDED:
        return torch.strided
    if kind == "as_device":
        return device  # the program was exported on another one, perhaps
    raise ModelError(f"passes an argument of the kind {kind!r}, which is not known here")


def _output(output: dict) -> Any:
    ((kind, value),) = output.items()
    if kind == "as_none":
        return None
    if kind in ("as_tensor", "as_sym_int", "as_sym_float", "as_sym_bool"):
        return value.get("name", value.get("as_name"))
    if kind in _LISTS:
        return [v.get("name", v.get("as_name")) for v in value]
    raise ModelError(f"returns a value of the kind {kind!r}, which is not known here")


def _resolved(value: Any, env: dict[str, Any]) -> Any:
    if isinstance(value, _Name):
        return env[value.name]
    if isinstance(value, list):
        return [_resolved(v, env) for v in value]
    if isinstance(value, dict):
        return {k: _resolved(v, env) for k, v in value.items()}
    return value


def _assign(name: Any, value: Any, env: dict[str, Any]) -> None:
    if isinstance(name, list):
        for part, inner in zip(name, value, strict=True):
            _assign(part, inner, env)
    elif name is not None:
        env[name] = value


def _flat(outputs: list) -> list[str]:
    return [name for part in outputs for name in (part if isinstance(part, list) else [part]) if name is not None]


def _names(value: Any) -> set[str]:
    if isinstance(value, _Name):
        return {value.name}
    return {name for part in value for name in _names(part)} if isinstance(value, list) else set()
