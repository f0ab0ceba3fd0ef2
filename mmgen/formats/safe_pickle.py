"""Weights out of the pickles of this field, executing nothing of what is inside.

The stack machine of `safe_arrays` learns here the names that checkpoints of PyTorch, EDM, EDM2 and IMM use. No name in a file
is ever imported or called. A tensor is a note of where its bytes lie, checked against what is there, and read once it is asked
for; a module of any class is an inert holder of its state; source text that comes with a class is dropped.
"""

from __future__ import annotations

import io
import math
import zlib
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ModelError
from . import safe_arrays
from .safe_arrays import Damaged, Name

_MOST_AXES = 32
_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _STORAGES.values()}
_DTYPES |= {name: getattr(torch, name) for name in ("float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64")}
_NAMES = {
    **{("torch", name): f"storage {name}" for name in _STORAGES},
    **{("torch", name): f"dtype {name}" for name in _DTYPES},
    ("torch.storage", "UntypedStorage"): "storage of bytes",
    ("torch.storage", "_load_from_bytes"): "bytes of a storage",
    ("torch._utils", "_rebuild_tensor"): "tensor",
    ("torch._utils", "_rebuild_tensor_v2"): "tensor",
    ("torch._utils", "_rebuild_tensor_v3"): "tensor of dtype",
    ("torch._tensor", "_rebuild_from_type_v2"): "tensor of a class",
    ("torch._utils", "_rebuild_parameter"): "parameter",
    ("torch._utils", "_rebuild_parameter_with_state"): "parameter",
    ("torch", "Tensor"): "class Tensor",
    ("torch.nn.parameter", "Parameter"): "class Parameter",
    ("torch", "Size"): "tuple",
    ("torch", "device"): "text",
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): "persistent object",
    ("dnnlib.util", "EasyDict"): "dict",
    ("collections", "OrderedDict"): "dict",
    ("argparse", "Namespace"): "object argparse.Namespace",
    ("builtins", "set"): "set",
    ("__builtin__", "set"): "set",
    ("builtins", "frozenset"): "set",
    ("__builtin__", "frozenset"): "set",
    **{("pathlib", name): "text" for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")},
}
_INERT = ("torch.nn.modules.", "timm.")  # classes of these modules become holders of their state
_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of torch.save's older format


@dataclass
class Storage:
    """Bytes of a file that tensors are cut from."""

    dtype: torch.dtype
    numel: int
    buffer: Any = None  # bytes or mmap
    offset: int = 0
    checksum: int | None = None

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def place(self, buffer: Any, offset: int, size: int) -> None:
        """Tells where the bytes are; raises Damaged unless they are there."""
        if not 0 <= offset <= offset + self.nbytes <= size:
            raise Damaged("a tensor reaches beyond the end")
        self.buffer, self.offset = buffer, offset


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor that has been checked, but not been read yet."""

    storage: Storage
    offset: int  # elements
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(eq=False)
class Holder:
    """What stands for an object of a class: its name, what it was made from, and its state."""

    name: str
    arguments: tuple = ()
    state: Any = None
    persistent: bool = False  # of a class whose source text comes with it
    finished: bool = field(default=False, repr=False)


class TorchMachine(safe_arrays.Machine):
    """The stack machine with the names above. `find`: places a storage by its key (of a zip); None where they come later."""

    error = ModelError
    content, hint = "model", " (of a whole module, save the state_dict() where its code is)"
    deepest = 100

    def __init__(self, path: str, size: int, find: Any = None) -> None:
        super().__init__(path, size)
        self.find = find
        self.storages: dict[str, Storage] = {}

    def _meaning(self, module: str, name: str) -> str | None:
        if (module, name) in _NAMES:
            return _NAMES[module, name]
        if (module + ".").startswith(_INERT):
            return f"object {module}.{name}"
        return super()._meaning(module, name)

    def _persistent(self, identity: Any) -> Storage | Name:
        if type(identity) is tuple and len(identity) == 4 and identity[0] == "module" and type(identity[1]) is Name:
            return identity[1]  # of the older format: a class, with its source text
        if type(identity) is not tuple or not identity or identity[0] != "storage":
            self._refuse("asks for something that is kept outside the file")
        _, kind, key, _location, numel, *view = identity
        if type(kind) is not Name or not kind.meaning.startswith("storage ") or type(key) is not str:
            raise Damaged("not the parts of a storage")
        if view not in ([], [None]):
            self._refuse("holds tensors as a very old torch stored them; load it and save it again with torch 1.6 or newer")
        if type(numel) is not int or not 0 <= numel < 2**48:
            raise Damaged("an impossible size")
        dtype = _STORAGES.get(kind.meaning.removeprefix("storage "), torch.uint8)
        if key not in self.storages:
            self.storages[key] = Storage(dtype, numel)
            if self.find is not None:
                self.find(key, self.storages[key])
        storage = self.storages[key]
        if (storage.dtype, storage.numel) != (dtype, numel):
            raise Damaged("a storage of two sizes")
        return storage

    def _call(self, function: Any, arguments: Any) -> None:
        meaning = function.meaning if type(function) is Name else ""
        if type(arguments) is tuple and meaning.startswith("object "):
            self.stack.append(Holder(meaning.removeprefix("object "), arguments))
            return
        make = {
            "bytes of a storage": self._bytes_of_a_storage,
            "tensor": self._tensor,
            "tensor of dtype": self._tensor_of_dtype,
            "tensor of a class": self._tensor_of_class,
            "parameter": self._parameter,
            "class Parameter": self._parameter,
            "persistent object": self._persistent_object,
            "dict": self._dict,
            "set": lambda items=(): list(items) if type(items) in (list, tuple) else self._refuse("makes an unusual set"),
            "tuple": lambda items: items if type(items) is tuple else self._refuse("makes an unusual size"),
            "text": lambda *parts: self._text(parts),
        }.get(meaning)
        if make is None or type(arguments) is not tuple:
            super()._call(function, arguments)
        else:
            self.stack.append(make(*arguments))

    def _new(self, kind: Any, arguments: Any) -> Any:
        meaning = kind.meaning if type(kind) is Name else ""
        if type(arguments) is tuple and meaning.startswith("object "):
            return Holder(meaning.removeprefix("object "), arguments)
        if meaning == "dict" and arguments == ():
            return {}
        return super()._new(kind, arguments)

    def _build(self, target: Any, state: Any) -> None:
        if type(target) is Holder and target.state is None and not target.persistent:
            if type(state) is tuple and len(state) == 2:  # the second has the attributes in slots
                state = {**(state[0] or {}), **(state[1] or {})}
            if type(state) is not dict:
                self._refuse(f"sets the state of {target.name} in an unusual way")
            target.state = state
        elif type(target) is dict and type(state) is dict and set(state) <= {"_metadata"}:
            pass  # what a state dict notes of module versions
        else:
            super()._build(target, state)

    def _set_of(self, instruction: str) -> None:
        """Sets become lists: what they hold is never hashed."""
        if instruction == "EMPTY_SET":
            self.stack.append([])
        elif instruction == "FROZENSET":
            self.stack.append(self._marked())
        else:
            self._extend(self._marked())

    def _dict(self, items: Any = ()) -> dict:
        if items == ():
            return {}
        if type(items) is dict:
            return dict(items)
        done: dict = {}
        self.stack.append(done)
        self._set([part for pair in items for part in pair])
        return self.stack.pop()

    def _text(self, parts: tuple) -> str:
        if any(type(part) not in (str, int) for part in parts) or len(parts) > 100:
            raise Damaged("text of other parts")
        text = "/".join(map(str, parts))
        self._spend(len(text))
        return text

    def _bytes_of_a_storage(self, data: Any) -> Storage:
        if type(data) is not bytes:
            raise Damaged("no bytes of a storage")
        self._spend(len(data))  # each time: the same bytes may be named often
        inner = TorchMachine(self.path, len(data))
        inner.steps = self.steps
        value = read_legacy(inner, io.BytesIO(data), data)
        self.steps = inner.steps
        if type(value) is not Storage:
            raise Damaged("no storage in the bytes of one")
        return value

    def _tensor(self, storage: Any, offset: Any, shape: Any, stride: Any, *_others: Any) -> StoredTensor:
        if type(storage) is not Storage:
            raise Damaged("a tensor without a storage")
        return self._cut(storage, offset, shape, stride, storage.dtype)

    def _tensor_of_dtype(self, storage: Any, offset: Any, shape: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any):
        if type(storage) is not Storage or type(dtype) is not Name or not dtype.meaning.startswith("dtype "):
            raise Damaged("not the parts of a tensor")
        return self._cut(storage, offset, shape, stride, _DTYPES[dtype.meaning.removeprefix("dtype ")])

    def _tensor_of_class(self, function: Any, kind: Any, arguments: Any, _state: Any) -> StoredTensor:
        makers = {"tensor": self._tensor, "tensor of dtype": self._tensor_of_dtype, "parameter": self._parameter}
        if type(function) is not Name or function.meaning not in makers or type(arguments) is not tuple:
            self._refuse("holds an unusual class of tensors")
        if type(kind) is not Name or not kind.meaning.startswith("class "):
            self._refuse("holds an unusual class of tensors")
        return makers[function.meaning](*arguments)

    def _cut(self, storage: Storage, offset: Any, shape: Any, stride: Any, dtype: torch.dtype) -> StoredTensor:
        """A tensor within a storage. No number of the file is trusted: it must fit what is there, and be no larger."""
        if type(shape) is not tuple or type(stride) is not tuple or len(shape) != len(stride) or len(shape) > _MOST_AXES:
            raise Damaged("not a shape and its strides")
        if any(type(n) is not int or not 0 <= n < 2**48 for n in (offset, *shape, *stride)):
            raise Damaged("an impossible shape")
        there, count = storage.nbytes // dtype.itemsize, math.prod(shape)
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride)) if count else offset
        if count > there or (count and last >= there):
            raise Damaged("a tensor is larger than what is stored of it")
        return StoredTensor(storage, offset, shape, stride, dtype)

    def _parameter(self, data: Any, *_others: Any) -> StoredTensor:
        if type(data) is not StoredTensor:
            raise Damaged("a parameter without a tensor")
        return data

    def _persistent_object(self, meta: Any) -> Holder:
        if type(meta) is not dict or type(meta.get("class_name")) is not str or type(meta.get("state")) is not dict:
            self._refuse("holds a persistent object that is not in the layout known from EDM")
        return Holder(meta["class_name"][:200], (), meta["state"], persistent=True)

    def _finish(self, value: Any, depth: int) -> Any:
        if type(value) is Holder:
            if depth >= self.deepest:
                self._refuse(f"holds more than {self.deepest} containers in each other, or one that holds itself")
            if not value.finished:
                state = self._finish(value.state, depth + 1)
                value.arguments = self._finish(value.arguments, depth + 1)
                value.state, value.finished = state, True
            return value
        if type(value) is Name and value.meaning.startswith("dtype "):
            return _DTYPES[value.meaning.removeprefix("dtype ")]
        if type(value) is Name and value.meaning.startswith("object "):  # a class as a value
            return Holder(value.meaning.removeprefix("object "))
        if type(value) in (Storage, StoredTensor):
            return value
        return super()._finish(value, depth)


def read_legacy(machine: TorchMachine, file: IO[bytes], buffer: Any) -> Any:
    """torch.save's older format: five pickles, then the bytes of each storage. `buffer`: the same bytes as `file`.

    Raises ModelError for a name that is not on the list, and what `Machine.run` raises for a damaged file.
    """
    size = len(buffer)

    def plain() -> Any:
        small = safe_arrays.Machine(machine.path, size)
        small.error, small.content, small.steps = ModelError, machine.content, machine.steps
        value = small.run(file)
        machine.steps = small.steps
        return value

    if plain() != _MAGIC or plain() != 1001:
        raise Damaged("not torch.save's older format")
    system = plain()
    if type(system) is not dict or system.get("little_endian") is not True:
        machine._refuse("was saved on a big-endian machine")
    value = machine.run(file)
    keys = plain()
    if type(keys) is not list or any(type(key) is not str for key in keys):
        raise Damaged("no list of storages")
    if len(keys) != len(machine.storages) or set(keys) != set(machine.storages):
        raise Damaged("the list of storages is not that of the tensors")
    position = file.tell()
    for key in keys:
        storage = machine.storages[key]
        if int.from_bytes(buffer[position : position + 8], "little") != storage.numel:
            raise Damaged("a storage and its note differ in size")
        storage.place(buffer, position + 8, size)
        position += 8 + storage.nbytes
    return value


def materialise(tensors: dict[str, StoredTensor], path: str, size: int) -> dict[str, Tensor]:
    """Reads tensors: each contiguous and with memory of its own. `size`: of the file; they may take twice as much at most.

    A storage is let go of once the last of its tensors here is made: ask for tensors once.

    Raises ModelError where the bytes do not have their checksum, or where the tensors would become far larger than the file.
    """
    if sum(tensor.nbytes for tensor in tensors.values()) > 2 * size + 1024:
        raise ModelError(f"{path} would become far larger than it is: not opened")
    uses: dict[int, int] = {}
    for tensor in tensors.values():
        uses[id(tensor.storage)] = uses.get(id(tensor.storage), 0) + 1
    done, kept = {}, {}
    for key, tensor in tensors.items():
        storage = tensor.storage
        raw = kept.get(id(storage))
        if raw is None:
            raw = _bytes_of(storage, path)
        uses[id(storage)] -= 1
        if uses[id(storage)]:
            kept[id(storage)] = raw
            done[key] = _tensor_of(raw, tensor).clone(memory_format=torch.contiguous_format)
        else:
            kept.pop(id(storage), None)
            storage.buffer = None  # of a pickle, a copy: the memory is needed for the next
            whole = tensor.nbytes == storage.nbytes
            done[key] = _tensor_of(raw, tensor).contiguous() if whole else _tensor_of(raw, tensor).clone().contiguous()
    return done


def _bytes_of(storage: Storage, path: str) -> np.ndarray:
    if not storage.nbytes:
        return np.empty(0, np.uint8)
    raw = np.frombuffer(storage.buffer, np.uint8, storage.nbytes, storage.offset).copy()
    if storage.checksum is not None and zlib.crc32(raw) != storage.checksum:
        raise ModelError(f"{path} is damaged: the checksum of a tensor is not that of its bytes; fetch it again")
    return raw


def _tensor_of(raw: np.ndarray, tensor: StoredTensor) -> Tensor:
    if not tensor.numel:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    usable = len(raw) // tensor.dtype.itemsize * tensor.dtype.itemsize
    if tensor.dtype == torch.bool:  # any other byte would be neither
        raw, usable = (raw != 0).view(np.uint8), len(raw)
    return torch.from_numpy(raw[:usable]).view(tensor.dtype).as_strided(tensor.shape, tensor.stride, tensor.offset)
