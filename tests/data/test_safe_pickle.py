"""Tests of the restricted pickle reader: it equals Python's on valid files and raises `DataError` on all others."""

import contextlib
import os
import pickle
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcifar.data import safe_pickle
from fastcifar.data.predict_inputs import read_inputs
from fastcifar.data.safe_pickle import load_pickle
from fastcifar.errors import DataError

# What Python 2.7's cPickle and pickle wrote for {'data': uint8 [2, 2] of 1, 2, 3, 4, 'ids': [7, 8], 'b': True}.
PYTHON2_PROTOCOL2 = (
    b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85U\x01b\x87Rq\x05"
    b"(K\x01K\x02K\x02\x86cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87Rq\x07(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff"
    b"K\x00tb\x89U\x04\x01\x02\x03\x04tbU\x03idsq\x08]q\x09(K\x07K\x08eU\x01bq\x0a\x88u."
)
PYTHON2_PROTOCOL0 = (
    b"(dp0\nS'data'\np1\ncnumpy.core.multiarray\n_reconstruct\np2\n(cnumpy\nndarray\np3\n(I0\ntp4\nS'b'\np5\ntp6\nRp7\n"
    b"(I1\n(I2\nI2\ntp8\ncnumpy\ndtype\np9\n(S'u1'\np10\nI0\nI1\ntp11\nRp12\n(I3\nS'|'\np13\nNNNI-1\nI-1\nI0\ntp14\nb"
    b"I00\nS'\\x01\\x02\\x03\\x04'\np15\ntp16\nbsS'ids'\np17\n(lp18\nI7\naL8L\nasS'b'\np19\nI01\ns."
)


def load(content: bytes) -> dict:
    return load_pickle(content, "data_batch_1")


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return type(a) is type(b) and a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("dtype", ["u1", "<i4", ">i8", "f4", "?"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_every_protocol_are_read_as_by_pickle(protocol: int, dtype: str, order: Any):
    data = np.asarray(np.arange(60).reshape(3, 20) % 2, dtype, order)
    expected = {b"data": data, "again": data, b"ids": [1, 2]}
    expected_arrays = [data, data[:, 0].copy()]
    actual = load(pickle.dumps({**expected, b"more": expected_arrays}, protocol))
    assert all(map(equal, actual.pop(b"more"), expected_arrays))
    assert equal(actual, expected)


@pytest.mark.parametrize("content", [PYTHON2_PROTOCOL0, PYTHON2_PROTOCOL2])
def test_python_2_pickles(content: bytes):
    expected = {b"data": np.array([[1, 2], [3, 4]], np.uint8), b"ids": [7, 8], b"b": True}
    assert equal(pickle.loads(content, encoding="bytes"), expected)
    assert equal(load(content), expected)


@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_module_names_of_numpy_1_and_2(core: str, protocol: int):
    data = np.arange(6, dtype=np.uint8).reshape(2, 3)
    content = pickle.dumps({b"data": data}, protocol)
    installed = b"numpy._core" if b"numpy._core" in content else b"numpy.core"
    for module in (b".multiarray", b".numeric"):  # protocols 4 and 5 write the length before the name
        for prefix in (bytes([len(installed + module)]), b"c"):
            new_prefix = bytes([len(core) + len(module)]) if prefix != b"c" else b"c"
            content = content.replace(prefix + installed + module, new_prefix + core.encode() + module)
    assert core.encode() + b"." in content
    assert equal(load(content), {b"data": data})


scalars = st.one_of(st.integers(-(2**63), 2**63), st.booleans(), st.none(), st.text(), st.floats(allow_nan=False))
values = st.recursive(scalars, lambda inner: st.one_of(st.lists(inner), st.lists(inner).map(tuple)), max_leaves=12)
valid_dicts = st.dictionaries(st.one_of(st.text(), st.integers(-(2**63), 2**63)), values, max_size=6)


@pytest.mark.slow
@settings(max_examples=80)
@given(valid_dicts, st.integers(0, 5))
def test_plain_values_are_read_as_by_pickle(value: dict, protocol: int):
    assert equal(load(pickle.dumps(value, protocol)), value)


class Calls:
    """Pickles as a call of `function(*args)`."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self):
        return self.call


def malicious_pickles(sentinel: Path) -> dict[str, bytes]:
    command = f"touch {sentinel}"
    return {
        "os.system": pickle.dumps({b"data": Calls(os.system, command)}, 2),
        "os.system, protocol 4": pickle.dumps({b"data": Calls(os.system, command)}, 4),
        "posix by name": b"cposix\nsystem\n(S'" + command.encode() + b"'\ntR.",
        "eval": pickle.dumps({b"data": Calls(eval, f"open({str(sentinel)!r}, 'w')")}, 2),
        "builtins of python 2": b"c__builtin__\neval\n(S'open(%r, \"w\")'\ntR." % str(sentinel).encode(),
        "nested loads": pickle.dumps({b"data": Calls(pickle.loads, pickle.dumps(Calls(os.system, command)))}, 2),
        "instance": b"(S'" + command.encode() + b"'\nios\nsystem\n.",
        "object": b"(cos\nsystem\nS'" + command.encode() + b"'\no.",
        "newobj": b"\x80\x02cos\nsystem\nX\x01\x00\x00\x00a\x85\x81.",
        "dotted name": b"\x80\x04\x8c\x05numpy\x8c\x11ndarray.__class__\x93.",
        "getattr": b"c__builtin__\ngetattr\n.",
        "persistent id": b"Pos\n.",
        "extension": b"\x80\x02\x82\x01.",
        "a function's state": b"cnumpy\ndtype\n(S'__defaults__'\nI1\ndb.",
        "a call of an array": pickle.dumps(np.zeros(2, np.uint8), 2)[:-1] + b")R.",
        "numpy.ndarray called": b"cnumpy\nndarray\n((I100\ntS'u1'\ntR.",
        "encode through another codec": b"c_codecs\nencode\n(S'x'\nS'rot13'\ntR.",
        "dtype of a record": pickle.dumps({b"data": np.zeros(2, [("a", "u1")])}, 2),
        "object array": pickle.dumps({b"data": np.array([1, "x", None], object)}, 2),
        "object array, protocol 5": pickle.dumps({b"data": np.array([1, "x", None], object)}, 5),
        "string array": pickle.dumps({b"data": np.array(["x"])}, 2),
        "complex array": pickle.dumps({b"data": np.zeros(2, complex)}, 2),
        "a function as a value": b"}S'data'\ncnumpy\ndtype\ns.",
        "an unfinished array": b"}S'data'\ncnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntRs.",
        "out-of-band buffer": b"\x80\x05\x97.",
        "the state of a class": b"cnumpy\ndtype\n(N}X\x08\x00\x00\x00__init__Nstb.",
        "a dict from pairs": b"cfastcifar\ndict\n(](X\x01\x00\x00\x00aNtatR.",
        "the state of a dict": b"}(N}X\x04\x00\x00\x00nameNstb.",
    }


@pytest.mark.parametrize("name", malicious_pickles(Path("x")))
def test_fault09_malicious_pickles_are_refused(name: str, tmp_path: Path):
    sentinel = tmp_path / "sentinel"
    with pytest.raises(DataError, match="data_batch_1 is not a pickle that can be read safely") as caught:
        load(malicious_pickles(sentinel)[name])
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    assert not sentinel.exists()


def header(shape: str, dtype: str = "u1") -> bytes:
    return (
        f"(dS'data'\ncnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n({shape}t"
        f"cnumpy\ndtype\n(S'{dtype}'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntbI00\n"
    ).encode()


HUGE = struct.pack("<Q", 2**40)
TEXT = b"X" + struct.pack("<I", 500_000) + b"a" * 500_000
BOMBS = {
    "huge shape": header("I100000\nI1000000\n") + b"S'x'\ntbs.",
    "shape that overflows": header("I4294967296\nI4294967296\n") + b"S''\ntbs.",
    "negative shape": header("I-1\n") + b"S'x'\ntbs.",
    "huge shape from a buffer": b"cnumpy.core.numeric\n_frombuffer\n(S'x'\n"
    b"cnumpy\ndtype\n(S'u1'\ntR(I9999999999\ntS'C'\ntR.",
    "huge _reconstruct": b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I9999999999\ntS'b'\ntR.",
    "dtype of a gigabyte": header("I1\n", "V1000000000") + b"S'x'\ntbs.",
    "text dtype of a gigabyte": header("I1\n", "S1000000000") + b"S'x'\ntbs.",
    "BINBYTES8": b"\x80\x04\x8e" + HUGE + b".",
    "BINUNICODE8": b"\x80\x04\x8d" + HUGE + b".",
    "BYTEARRAY8": b"\x80\x05\x96" + HUGE + b".",
    "BINSTRING of a negative size": b"T\xff\xff\xff\xff.",
    "LONG4": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "frame": b"\x80\x04\x95" + HUGE + b"N",
    "decimal digits": b"I" + b"9" * 1_000_000 + b"\n.",
    "a float of digits": b"F" + b"9" * 1_000_000 + b"x\n.",
    "text encoded repeatedly": TEXT
    + b"q\x000c_codecs\nencode\nq\x010"
    + b"h\x01(h\x00X\x06\x00\x00\x00latin1tR" * 2000
    + b".",
    "marks only": b"(" * 700_000 + b".",
    "nested tuple as a key": b"}" + b")" + b"\x85" * 100_000 + b"Ns.",
    "tuples of the same tuple as a key": b"})" + b"q\x00h\x00\x86" * 60 + b"Ns.",
    "memo index": b"}r\xff\xff\xff\x7f.",
    "memo index in digits": b"}p4000000000\n.",
    "list containing itself": b"}S'data'\n]q\x00h\x00a"
    b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntRas.",
}


@pytest.mark.medium
@pytest.mark.parametrize("name", BOMBS)
def test_fault10_decompression_bombs_are_refused_without_allocating(name: str):
    # tracemalloc counts requested memory, used or not, and the peak includes memory that is freed again.
    tracemalloc.start(1)
    try:
        with pytest.raises(DataError, match="not a pickle that can be read safely"):
            load_pickle(BOMBS[name], name)
        assert tracemalloc.get_traced_memory()[1] < 200e6
    finally:
        tracemalloc.stop()


def test_fault10_opcodes_hidden_by_a_frame_are_not_executed():
    """Python's unpickler skips the byte 0x8e, where the frame ends, and then executes the text of `C`."""
    text = (b"\x8e" + HUGE).ljust(ord("N"), b"0")
    content = b"\x80\x04}\x95" + struct.pack("<Q", 2) + b"M\x8e" + b"xCN" + text + b"00."
    assert load(content) == {}


def test_fault10_a_file_that_is_too_large_is_not_read(tmp_path: Path):
    path = tmp_path / "huge.pkl"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(DataError, match=r"huge.pkl has 1,099,511,627,776 bytes, expected at most"):
        read_inputs(str(path))


VALID = pickle.dumps({b"data": np.zeros((4, 12), np.uint8), b"labels": [0, 1, 2, 3], b"names": ["a", "b"]}, 2)
VALIDS = [pickle.dumps(pickle.loads(VALID), protocol) for protocol in range(6)] + [PYTHON2_PROTOCOL0, PYTHON2_PROTOCOL2]


def assert_only_data_error(content: bytes) -> None:
    start = time.perf_counter()
    with contextlib.suppress(DataError):
        load(content)
    assert time.perf_counter() - start < 3


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_random_bytes_raise_data_errors_only(content: bytes):
    assert_only_data_error(content)
    assert_only_data_error(b"\x80\x02" + content + b".")


@pytest.mark.medium
@settings(max_examples=300)
@given(st.lists(st.sampled_from(sorted(safe_pickle.OPCODES)), max_size=60), st.binary(max_size=8))
def test_random_programs_raise_data_errors_only(codes: list[int], rest: bytes):
    assert_only_data_error(bytes(codes) + rest + b".")


@pytest.mark.medium
@settings(max_examples=400)
@given(
    st.sampled_from(VALIDS), st.lists(st.tuples(st.integers(0, 10**6), st.binary(max_size=4)), min_size=1, max_size=4)
)
def test_mutations_of_valid_pickles_raise_data_errors_only(content: bytes, changes: list[tuple[int, bytes]]):
    for offset, new in changes:
        offset %= len(content) + 1
        content = content[:offset] + new + content[offset + len(new) :]
    assert_only_data_error(content)


@pytest.mark.parametrize("content", VALIDS)
def test_every_truncation_is_refused(content: bytes):
    for end in range(len(content)):
        with pytest.raises(DataError):
            load(content[:end])


def test_arrays_are_read_only():
    assert not any(load(content)[b"data"].flags.writeable for content in VALIDS)


def test_the_allowed_globals_are_the_documented_ones():
    assert safe_pickle._SafeUnpickler(b"").globals.keys() == {
        "numpy.core.multiarray._reconstruct",
        "numpy._core.multiarray._reconstruct",
        "numpy.core.numeric._frombuffer",
        "numpy._core.numeric._frombuffer",
        "numpy.ndarray",
        "numpy.dtype",
        "_codecs.encode",
        "fastcifar.dict",  # a dict that checks its keys
    }
