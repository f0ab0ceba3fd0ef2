"""Arrays out of a pickle, executing nothing: `pickle` itself is never asked to open the file.

A pickle is a program for a small stack machine. `pickletools` of the standard library takes it apart into instructions;
the machine below knows those that make plain values and, by their names, the few functions NumPy uses to store an array.
Nothing is imported or called for a name in the file: the names are compared, and the arrays made here from checked bytes.
Every other name or instruction is refused before the file is opened any further. `safe_pickle` teaches the same machine the
names of torch.
"""

from __future__ import annotations

import math
import os
import pickletools
from dataclasses import dataclass
from typing import IO, Any, NoReturn

import numpy as np

from ..errors import DataError, MmgenError

_LARGEST = 2 * 1024**3  # bytes of a file
_TOO_LARGE = f"is larger than {_LARGEST // 1024**3} GB, more than a pickle of statistics is: not opened"
_LONGEST = 1_000_000  # instructions: each may make an object many times larger than its one byte
_MOST_AXES = 32
_NUMBERS = {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"}

_NAMES = {  # what a name in the file stands for here; NumPy 2 has renamed numpy.core, Python 3 __builtin__
    ("numpy", "ndarray"): "array type",
    ("numpy", "dtype"): "dtype",
    ("numpy.core.multiarray", "_reconstruct"): "blank array",
    ("numpy._core.multiarray", "_reconstruct"): "blank array",
    ("numpy.core.multiarray", "scalar"): "scalar",
    ("numpy._core.multiarray", "scalar"): "scalar",
    ("numpy.core.numeric", "_frombuffer"): "array of bytes",
    ("numpy._core.numeric", "_frombuffer"): "array of bytes",
    ("_codecs", "encode"): "bytes of text",  # protocols 0 to 2 store bytes as latin-1 text
    ("builtins", "bytes"): "no bytes",  # and no bytes as bytes()
    ("__builtin__", "bytes"): "no bytes",
}
_ARGUMENT_IS_VALUE = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_REFUSED = {
    **dict.fromkeys(("EXT1", "EXT2", "EXT4"), "names something by a number of a registry"),
    **dict.fromkeys(("NEXT_BUFFER", "READONLY_BUFFER"), "asks for data that is kept outside the file"),
    **dict.fromkeys(("OBJ", "NEWOBJ_EX"), "makes an object"),
}


@dataclass(frozen=True)
class Name:
    meaning: str


@dataclass
class _DType:
    code: str
    order: str | None = None  # of bytes; None until it has been told


@dataclass
class _Blank:
    """An array that has been announced, and filled in once its content is known."""

    array: np.ndarray | None = None


class Damaged(ValueError):
    pass


def load_arrays(path_or_file: str | os.PathLike | IO[bytes]) -> Any:
    """What a pickle of dicts, lists, tuples, str, bytes, numbers, None, NumPy arrays and NumPy scalars holds.

    Arrays of booleans, integers and floats of at most 64 bits, any protocol, NumPy 1 and 2; they come back writable, in
    the byte order of this machine, and bytearrays as bytes.

    Raises DataError, with one sentence, for any other name or instruction in the file (nothing of it has been executed
    then either), for arrays of objects, records or text, and where the file is damaged, or no pickle.
    """
    name, data = _read(path_or_file)
    if mistake := mistaken_download(data):
        raise DataError(f"{name} {mistake}")
    if data.startswith(b"PK\x03\x04"):
        raise DataError(f"{name} is a zip or npz file, or one of torch.save, not a pickle")
    try:
        return Machine(name, len(data)).run(data)
    except (ValueError, TypeError, IndexError, KeyError, OverflowError) as error:
        raise DataError(f"{name} is no pickle of arrays, or it is cut short or damaged: fetch it again") from error


def mistaken_download(head: bytes) -> str | None:
    """What was saved instead of a binary file, if its first bytes tell: ends a sentence that begins with the file's name."""
    start = bytes(head[:512]).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        return "is empty: fetch it again"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file it stands for: fetch that with 'git lfs pull'"
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<error")):
        return "is a web page, saved under this name by a download that failed: fetch the file again"
    return None


def _read(path_or_file: str | os.PathLike | IO[bytes]) -> tuple[str, bytes]:
    name = str(path_or_file)
    if hasattr(path_or_file, "read"):
        name, data = str(getattr(path_or_file, "name", "the file")), path_or_file.read(_LARGEST + 1)
    else:
        try:
            with open(path_or_file, "rb") as file:
                large = os.fstat(file.fileno()).st_size > _LARGEST
                data = b"" if large else file.read()
        except OSError as error:
            raise DataError(f"{name} cannot be read: {error.strerror or error}") from error
        if large:
            raise DataError(f"{name} {_TOO_LARGE}")
    if len(data) > _LARGEST:
        raise DataError(f"{name} {_TOO_LARGE}")
    return name, data


class Machine:
    """The stack machine. Its values are Python's own, arrays, and the stand-ins above, none of which can be called."""

    error: type[MmgenError] = DataError  # what a refusal raises
    content, hint = "array", ""  # what is read, for refusals
    deepest = 32  # containers within containers

    def __init__(self, path: str, size: int) -> None:
        self.path = path
        self.stack: list[Any] = []
        self.marks: list[int] = []  # heights of the stack
        self.memo: dict[int, Any] = {}
        self.steps = 0
        self.allowance = 2 * size + 1024  # bytes that may be made: text to bytes, and bytes to arrays
        self.finished: dict[int, Any] = {}

    def run(self, program: bytes | IO[bytes]) -> Any:
        """What a pickle holds. Raises ValueError, TypeError, IndexError, KeyError or OverflowError where it is damaged."""
        for instruction, argument, _ in pickletools.genops(program):
            self.step(instruction.name, argument)
        return self.result()

    def step(self, name: str, argument: Any) -> None:
        self.steps += 1
        if self.steps > _LONGEST:
            self._refuse(f"has more than a million parts, which no {self.content} needs")
        if name in _ARGUMENT_IS_VALUE:
            self.stack.append(bytes(argument) if isinstance(argument, bytearray) else argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in ("EMPTY_LIST", "EMPTY_DICT"):
            self.stack.append([] if name == "EMPTY_LIST" else {})
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if name == "MEMOIZE" else argument] = self._top()
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name == "MARK":
            self.marks.append(len(self.stack))
        elif name in ("TUPLE", "LIST"):
            items = self._marked()
            self.stack.append(tuple(items) if name == "TUPLE" else items)
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            self.stack.append(tuple(self._pop(int(name[-1]))))
        elif name in ("APPEND", "APPENDS"):
            self._extend(self._pop(1) if name == "APPEND" else self._marked())
        elif name in ("SETITEM", "SETITEMS"):
            self._set(self._pop(2) if name == "SETITEM" else self._marked())
        elif name == "DICT":
            items = self._marked()
            self.stack.append({})
            self._set(items)
        elif name in ("GLOBAL", "INST"):
            self._name(*argument.split(" ", 1))
            if name == "INST":
                self._refuse("makes an object")
        elif name == "STACK_GLOBAL":
            self._name(*self._pop(2))
        elif name == "REDUCE":
            self._call(*self._pop(2))
        elif name == "BUILD":
            (state,) = self._pop(1)
            self._build(self._top(), state)
        elif name in ("PERSID", "BINPERSID"):
            self.stack.append(self._persistent(argument if name == "PERSID" else self._pop(1)[0]))
        elif name == "NEWOBJ":
            self.stack.append(self._new(*self._pop(2)))
        elif name in ("EMPTY_SET", "FROZENSET", "ADDITEMS"):
            self._set_of(name)
        elif name not in ("PROTO", "FRAME", "STOP"):
            self._refuse(_REFUSED.get(name, f"holds the pickle instruction {name}, which no {self.content} needs"))

    def result(self) -> Any:
        (value,) = self._pop(1)
        if self.stack or self.marks:
            raise Damaged("values are left over")
        return self._finish(value, 0)

    def _refuse(self, what: str) -> NoReturn:
        raise self.error(f"{self.path} {what}: not opened")

    def _top(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise Damaged("the stack is empty")
        return self.stack[-1]

    def _pop(self, count: int) -> list[Any]:
        if len(self.stack) - count < (self.marks[-1] if self.marks else 0):
            raise Damaged("the stack is empty")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def _marked(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def _extend(self, items: list[Any]) -> None:
        if type(self._top()) is not list:
            raise Damaged("no list to append to")
        self._top().extend(items)

    def _set(self, items: list[Any]) -> None:
        target = self._top()
        if type(target) is not dict or len(items) % 2:
            raise Damaged("no dict to put into")
        for key, value in zip(items[::2], items[1::2]):
            if key is not None and type(key) not in (str, bytes, int, float, bool):  # a tuple of tuples would be hashed deeply
                raise Damaged("a key of a dict is not plain")
            target[key] = value

    def _name(self, module: Any, name: Any) -> None:
        meaning = self._meaning(module, name) if type(module) is str and type(name) is str else None
        if meaning is None:
            asked = ascii(f"{module}.{name}"[:100])[1:-1] if type(module) is type(name) is str else "a name that is no text"
            self._refuse(f"asks for {asked}, which can run any code and no {self.content} needs{self.hint}")
        self.stack.append(Name(meaning))

    def _meaning(self, module: str, name: str) -> str | None:
        return _NAMES.get((module, name))

    def _persistent(self, _identity: Any) -> Any:
        self._refuse("asks for something that is kept outside the file")

    def _new(self, _kind: Any, _arguments: Any) -> Any:
        self._refuse("makes an object")

    def _set_of(self, instruction: str) -> None:
        self._refuse(f"holds the pickle instruction {instruction}, which no {self.content} needs")

    def _call(self, function: Any, arguments: Any) -> None:
        if type(function) is not Name or function.meaning == "array type" or type(arguments) is not tuple:
            self._refuse("calls what is no function of NumPy's")
        make = {
            "dtype": self._dtype,
            "blank array": self._blank,
            "scalar": self._scalar,
            "array of bytes": self._array_of_bytes,
            "bytes of text": self._bytes_of_text,
            "no bytes": self._no_bytes,
        }[function.meaning]
        self.stack.append(make(*arguments))

    def _build(self, target: Any, state: Any) -> None:
        if type(target) is _DType and target.order is None:
            version, order, *fields = state
            if version != 3 or order not in ("<", ">", "|", "=") or any(f is not None for f in fields[:3]) or len(fields) != 6:
                self._refuse("holds an array of records, or of a version of NumPy that is not known")
            target.order = order
        elif type(target) is _Blank and target.array is None:
            _version, shape, dtype, fortran, data = state
            if type(data) is list:
                self._refuse("holds an array of objects")
            target.array = self._array(data, dtype, shape, "F" if fortran else "C")
        else:
            self._refuse("sets the state of what is no array")

    def _dtype(self, code: Any, *_flags: Any) -> _DType:
        if type(code) is not str:
            raise Damaged("a dtype without a code")
        if code not in _NUMBERS:
            kinds = {"O": "objects", "V": "records", "S": "text", "U": "text", "M": "dates", "m": "times", "c": "complex numbers"}
            what = kinds.get(code[:1], f"type {ascii(code[:20])}")
            self._refuse(f"holds an array of {what}, and only booleans, integers and floats up to 64 bits are read")
        return _DType(code)

    def _blank(self, subtype: Any, _shape: Any, _code: Any) -> _Blank:
        if subtype != Name("array type"):
            self._refuse("holds a kind of array that is not NumPy's plain one")
        return _Blank()

    def _scalar(self, dtype: Any, data: Any) -> np.generic:
        return self._array(data, dtype, (), "C")[()]

    def _array_of_bytes(self, data: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> np.ndarray:
        if order not in ("C", "F", "K") or (order == "K") is not (type(axes) is tuple):
            raise Damaged("an unknown order")
        array = self._array(data, dtype, shape, "F" if order == "F" else "C")
        return array.transpose(axes) if order == "K" else array

    def _bytes_of_text(self, text: Any, encoding: Any) -> bytes:
        if type(text) is not str or encoding not in ("latin1", "latin-1"):
            self._refuse("encodes text in an unusual way")
        self._spend(len(text))
        return text.encode("latin-1")

    def _no_bytes(self, *arguments: Any) -> bytes:
        if arguments:
            self._refuse("makes bytes in an unusual way")
        return b""

    def _array(self, data: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
        """A copy of the bytes as an array. Memory is taken only after the shape is known to fit the bytes that are there."""
        if type(data) is str:  # as Python 2 wrote bytes
            data = data.encode("latin-1")
        if type(dtype) is not _DType or dtype.order is None or type(data) is not bytes or type(shape) is not tuple:
            raise Damaged("not the parts of an array")
        if len(shape) > _MOST_AXES or any(type(n) is not int or not 0 <= n <= _LARGEST for n in shape):
            raise Damaged("an impossible shape")
        kind = np.dtype(dtype.order + dtype.code)
        if math.prod(shape) * kind.itemsize != len(data):
            raise Damaged("an array and its shape differ in size")
        self._spend(len(data))
        return np.ndarray(shape, kind, data, order=order).astype(kind.newbyteorder("="))

    def _spend(self, size: int) -> None:
        self.allowance -= size
        if self.allowance < 0:
            self._refuse("would become far larger than it is")

    def _finish(self, value: Any, depth: int) -> Any:
        """The value with its arrays in place of their stand-ins. Parts that occur twice are the same object again."""
        if type(value) is _Blank and value.array is not None:
            return value.array
        if type(value) in (_Blank, Name, _DType):
            raise Damaged("a part of an array stands alone")
        if type(value) not in (list, tuple, dict):
            return value
        if id(value) not in self.finished:
            if depth >= self.deepest:
                self._refuse(f"holds more than {self.deepest} containers in each other, or one that holds itself")
            if type(value) is dict:
                done = {key: self._finish(item, depth + 1) for key, item in value.items()}
            else:
                done = type(value)(self._finish(item, depth + 1) for item in value)
            self.finished[id(value)] = done
        return self.finished[id(value)]
