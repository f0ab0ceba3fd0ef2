"""Pickles of arrays, as pickle writes them and as an attacker would; a file that must not appear shows what was executed."""

from __future__ import annotations

import contextlib
import copyreg
import io
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from pickled_arrays import BLOCK, DTYPE, F8, HUGE, PROTOCOLS, blank, of_bytes, opened, refusal, text

from mmgen.errors import DataError
from mmgen.formats.safe_arrays import load_arrays

ARRAYS = {
    **{f"{code} C": (BLOCK * 50).astype(code) for code in "? i1 u1 i2 u2 i4 u4 i8 u8 f2 f4 f8".split()},
    "Fortran": np.asfortranarray(BLOCK),
    "transposed": BLOCK.transpose(1, 0, 2),
    "strided": BLOCK[::2, 1:, ::-1],
    "big-endian": BLOCK.astype(">f8"),
    "big-endian Fortran": np.asfortranarray(BLOCK[0].astype(">i4")),
    "0-d": np.array(2.5),
    "0-d bool": np.array(True),
    "empty": np.zeros((0,), np.float32),
    "empty 2-d": np.zeros((0, 3)),
    "read-only": np.frombuffer(b"12345678", "f8"),
    "one": np.array([1], np.uint8),
}
PLAIN = {"a": [1, -2, 2**40, 2**2100, 0.5, -0.0], "b": (True, False, None, ()), "ü": b"\x00\xff", 3: [[], {}, ""], "e": b""}


def same(got, expected) -> None:
    assert type(got) is type(expected) and got.shape == expected.shape
    assert got.dtype == expected.dtype.newbyteorder("=") and got.dtype.isnative
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_arrays_come_back(protocol):
    for name, array in ARRAYS.items():
        got = opened(pickle.dumps({"mu": array, "again": [array]}, protocol))
        same(got["mu"], array)
        assert got["mu"] is got["again"][0] and got["mu"].flags.writeable, name
        assert name != "Fortran" or got["mu"].flags.f_contiguous


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_scalars_come_back(protocol):
    for value in (np.float64(1.5), np.float16(2), np.int64(-7), np.uint8(200), np.bool_(True), np.bool_(False)):
        same(opened(pickle.dumps(value, protocol)), value)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("writer", [pickle.dumps, lambda value, protocol: pickle.dumps(value, protocol, fix_imports=False)])
def test_plain_values_come_back(protocol, writer):
    got = opened(writer(PLAIN, protocol))
    assert got == PLAIN and [type(x) for x in got["b"]] == [type(x) for x in PLAIN["b"]]
    assert opened(pickle.dumps(list(range(3000)), protocol)) == list(range(3000))


def test_a_pickle_of_the_pure_python_pickler_comes_back():
    buffer = io.BytesIO()
    pickle._Pickler(buffer, 4).dump({"mu": BLOCK, "names": ["a" * 300, "a" * 300], "n": 70_000})
    got = opened(buffer.getvalue())
    same(got["mu"], BLOCK)
    assert got["n"] == 70_000 and got["names"] == ["a" * 300] * 2


@pytest.mark.parametrize("old, new", [(b"numpy._core", b"numpy.core"), (b"numpy.core", b"numpy._core")])
@pytest.mark.parametrize("value", [BLOCK, np.float32(3)])
def test_both_names_of_numpys_core(old, new, value):
    content = pickle.dumps(value, 2)  # its names are lines, so their length may change
    same(opened(content.replace(old, new)), value)


def test_an_array_of_python_2():
    # what Python 2.7 and NumPy 1.16 write for np.array([1.5, -2.0]): bytes are SHORT_BINSTRING
    content = (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\nq\x01cnumpy\nndarray\nq\x02K\x00\x85U\x01b\x87Rq\x03(K\x01K\x02\x85"
        b"cnumpy\ndtype\nq\x04U\x02f8K\x00K\x01\x87Rq\x05(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x10"
        + struct.pack("<2d", 1.5, -2.0)
        + b"tb."
    )
    same(pickle.loads(content, encoding="latin1"), np.array([1.5, -2.0]))
    same(opened(content), np.array([1.5, -2.0]))


def test_a_path_is_read_and_named(tmp_path):
    path = tmp_path / "stats.pkl"
    path.write_bytes(pickle.dumps({"mu": BLOCK}))
    same(load_arrays(path)["mu"], BLOCK)
    same(load_arrays(str(path))["mu"], BLOCK)
    path.write_bytes(b"cos\nsystem\n.")
    with pytest.raises(DataError, match=r"stats\.pkl asks for os\.system"):
        load_arrays(path)
    with pytest.raises(DataError, match="missing.pkl cannot be read: No such file"):
        load_arrays(tmp_path / "missing.pkl")


class Calls:
    """Pickles as a call of a function, which is made when the file is opened by pickle."""

    def __init__(self, function, *arguments, state=None):
        self.parts = (function, arguments) + ((state,) if state is not None else ())

    def __reduce__(self):
        return self.parts

    def __call__(self):  # so that a call may give the function of another
        raise AssertionError


def code(mark: Path) -> str:
    return f"open({str(mark)!r}, 'w').close()"


def attacks(mark: Path) -> dict:
    """Objects whose pickles create `mark` when opened by pickle."""
    run = Calls(exec, code(mark))
    objects = np.empty(2, object)
    objects[:] = [1, run]
    return {
        "builtins.exec": run,
        "builtins.eval": Calls(eval, f"open({str(mark)!r}, 'w').close()"),
        f"{os.system.__module__}.system": Calls(os.system, f"echo > '{mark}'"),
        "builtins.open": Calls(open, str(mark), "w"),
        "builtins.getattr": Calls(Calls(getattr, Calls(__import__, "os"), "system"), f"echo > '{mark}'"),
        "builtins.exec in a state": Calls(np.dtype, "f8", state=run),
        "builtins.exec in a list": {"mu": np.zeros(2), "more": [[(run,)]]},
        "builtins.exec as a key": {"mu": {Calls(exec, code(mark)): 1}},
        "objects": {"mu": objects},
        "numpy.save": Calls(np.save, str(mark), np.zeros(1)),
        "pathlib": Calls(Path.write_text, mark, "x"),
    }


@pytest.mark.parametrize("name", attacks(Path("mark")))
def test_an_attack_is_refused_and_does_nothing(name, tmp_path):
    for protocol in PROTOCOLS:
        assert "not opened" in refusal(pickle.dumps(attacks(tmp_path / "mark")[name], protocol))
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", attacks(Path("mark")))
def test_the_attacks_would_work(name, tmp_path):
    with contextlib.suppress(Exception):  # what it returns may not fit where it stands
        pickle.loads(pickle.dumps(attacks(tmp_path / "mark")[name]))
    assert list(tmp_path.iterdir())


NAMES = [
    ("os", "system"),
    ("posix", "system"),
    ("nt", "system"),
    ("subprocess", "Popen"),
    ("builtins", "eval"),
    ("__builtin__", "eval"),
    ("builtins", "getattr"),
    ("builtins", "bytearray"),
    ("numpy", "load"),
    ("numpy", "fromfile"),
    ("numpy", "memmap"),
    ("numpy.testing._private.utils", "runstring"),
    ("numpy.f2py.crackfortran", "myeval"),
    ("numpy.ndarray", "tofile"),
    ("numpy", "ndarray.tofile"),
    ("numpy", "ndarray.__reduce__"),
    ("numpy", "core.multiarray._reconstruct"),
    ("numpy", "dtype.__class__"),
    ("numpy.core.multiarray", "fromfile"),
    ("_codecs", "lookup"),
    ("codecs", "encode"),
    ("copyreg", "_reconstructor"),
    ("copyreg", "__newobj__"),
    ("functools", "partial"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("collections", "OrderedDict"),
    ("mmgen.formats.safe_arrays", "load_arrays"),
    ("Numpy", "ndarray"),
    ("", ""),
]


def test_any_other_name_is_refused_by_name():
    for module, name in NAMES:
        refused_by_name(module, name)


def refused_by_name(module, name):
    by_line = refusal(f"c{module}\n{name}\n(S'x'\ntR.".encode())
    by_stack = refusal(b"\x80\x04" + text(module) + text(name) + b"\x93" + text("x") + b"\x85R.")
    by_inst = refusal(f"(S'x'\ni{module}\n{name}\n.".encode())
    for message in (by_line, by_stack, by_inst):
        assert f"asks for {module}.{name}" in message


def test_a_name_cannot_write_to_the_terminal():
    assert "\x1b" not in refusal(b"\x80\x04" + text("os\x1b[2J") + text("sys\ntem") + b"\x93.")
    assert len(refusal(b"c" + b"a" * 10_000 + b"\nb\n.")) < 250


BLANK = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n(I0\nt(I0\nt\x87R"


def test_the_parts_of_these_tests_make_an_array():
    same(opened(of_bytes(struct.pack("<2d", 1, 2), b"K\x02\x85")), np.array([1.0, 2.0]))
    same(opened(blank(b"(K\x01K\x02\x85" + F8 + b"\x89C\x10" + struct.pack("<2d", 1, 2) + b"t")), np.array([1.0, 2.0]))


INSTRUCTIONS = {
    "registry 1": (b"\x80\x02\x82\x01.", "registry"),
    "registry 2": (b"\x80\x02\x83\x01\x00.", "registry"),
    "registry 4": (b"\x80\x02\x84\x01\x00\x00\x00.", "registry"),
    "persistent id, text": (b"P0\n.", "outside the file"),
    "persistent id": (b"\x80\x02K\x01Q.", "outside the file"),
    "buffer outside": (b"\x80\x05\x97.", "outside the file"),
    "NEWOBJ": (b"\x80\x02cnumpy\nndarray\n)\x81.", "makes an object"),
    "NEWOBJ_EX": (b"\x80\x04cnumpy\nndarray\n)}\x92.", "makes an object"),
    "OBJ": (b"(cnumpy\nndarray\no.", "makes an object"),
    "INST": (b"(inumpy\nndarray\n.", "makes an object"),
    "a set": (b"\x80\x04\x8f(K\x01\x90.", "EMPTY_SET"),
    "state onto a name": (b"cnumpy\nndarray\n}b.", "sets the state"),
    "state onto a function": (b"c_codecs\nencode\n(N}tb.", "sets the state"),
    "state onto a dict": (b"}}b.", "sets the state"),
    "state onto a finished array": (of_bytes(b"", b"K\x00\x85")[:-1] + b"}b.", "sets the state"),
    "second state": (
        b"\x80\x04" + F8 + b"(K\x03" + text(">") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb.",
        "sets the state",
    ),
    "second state of an array": (blank(2 * (b"(K\x01K\x00\x85" + F8 + b"\x89C\x00tb"))[:-2] + b".", "sets the state"),
    "call of a value": (b"K\x01)R.", "calls what is no function"),
    "call of a type": (b"cnumpy\nndarray\nK\x02\x85R.", "calls what is no function"),
    "call of a result": (b"\x80\x04" + F8 + b")R.", "calls what is no function"),
    "call with a list": (b"c_codecs\nencode\n]R.", "calls what is no function"),
    "objects": (b"\x80\x04" + DTYPE + text("O8") + b"\x85R.", "objects"),
    "records": (b"\x80\x04" + DTYPE + text("V8") + b"\x85R.", "records"),
    "long double": (b"\x80\x04" + DTYPE + text("f16") + b"\x85R.", "type 'f16'"),
    "complex": (b"\x80\x04" + DTYPE + text("c16") + b"\x85R.", "complex"),
    "fields": (b"\x80\x04" + DTYPE + text("f8") + b"\x85R(K\x03" + text("<") + b"N)NK\x00K\x00K\x00tb.", "records"),
    "dtype with metadata": (b"\x80\x04" + DTYPE + text("f8") + b"\x85R(K\x04" + text("<") + b"NNNK\x00K\x00K\x00}tb.", "records"),
    "subclass": (b"\x80\x04cnumpy.core.multiarray\n_reconstruct\nK\x01K\x00\x85C\x01b\x87R.", "not NumPy's plain one"),
    "other codec": (b"\x80\x04c_codecs\nencode\n" + text("cbys") + text("rot13") + b"\x86R.", "unusual"),
    "bytes of a size": (b"\x80\x04cbuiltins\nbytes\n" + HUGE + b"\x85R.", "unusual"),
    "bytearray of a size": (b"\x80\x04cbuiltins\nbytearray\n" + HUGE + b"\x85R.", "asks for builtins.bytearray"),
    "list in a list": (b"\x80\x04" + b"]" * 40 + b"a" * 39 + b".", "in each other"),
    "itself": (b"\x80\x04]\x94h\x00a.", "holds itself"),
    "array of a list": (blank(b"(K\x01K\x00\x85" + F8 + b"\x89]t"), "objects"),
}


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_other_instructions_are_refused(name):
    content, part = INSTRUCTIONS[name]
    message = refusal(content)
    assert part in message and "not opened" in message


def test_a_registered_class_is_refused_though_python_knows_it(tmp_path):
    copyreg.add_extension("builtins", "exec", 0x7123)
    try:
        program = code(tmp_path / "mark").encode()
        content = b"\x80\x02\x83\x23\x71X" + struct.pack("<I", len(program)) + program + b"\x85R."
        pickle.loads(content)
        (tmp_path / "mark").unlink()  # pickle does execute it, and remembers the function
        assert "registry" in refusal(content)
    finally:
        copyreg.remove_extension("builtins", "exec", 0x7123)
        copyreg.clear_extension_cache()
    assert not list(tmp_path.iterdir())
