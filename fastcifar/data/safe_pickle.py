"""A restricted pickle reader for dicts, lists, scalars and numeric arrays.

Data files are not trusted, so Python's own unpickler is never used. This interpreter implements only the opcodes that
data files need, resolves global names through `ALLOWED_GLOBALS`, and allocates memory in proportion to the file. It
imports and executes nothing, and checks every size against the available bytes. Does not import torch.
"""

from __future__ import annotations

import codecs
import math
import re
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastcifar.errors import DataError

# The largest official file, CIFAR-100's `train`, has 155 MB.
MAX_BYTES = 512 * 2**20
# CIFAR-100's `train` needs 350,000 in protocol 0; each costs at most a few hundred bytes in addition to its argument.
MAX_OPCODES = 600_000
_REMEDY = "use the official files, or a pickle of {'data': uint8 array, 'ids': ints}"
_NUMERIC_DTYPE = re.compile(r"[|<>=]?(b1|[iu][1248]|f[248])")


class _UnpicklingError(Exception):
    """The reason why a pickle is rejected; `loads_pickle` converts it to a `DataError`."""


@dataclass(slots=True, eq=False)
class _Placeholder:
    """A dtype or an array created by the opcode REDUCE, which BUILD may still complete.

    The memo and the stack of the pickle refer to this object before its value is known.
    """

    kind: str
    value: Any = None


@dataclass(slots=True)
class _PickleVM:
    data: bytes
    position: int = 0
    stack: list[Any] = field(default_factory=list)
    marks: list[list[Any]] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)
    encoded_bytes: int = 0

    def read_bytes(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self.data):
            remaining = len(self.data) - self.position
            raise _UnpicklingError(
                f"a value of {count:,} bytes at offset {self.position:,}, but only {remaining:,} remain"
            )
        value = self.data[self.position : end]
        self.position = end
        return value

    def read_line(self) -> bytes:
        end = self.data.find(b"\n", self.position)
        if end < 0:
            raise _UnpicklingError("it ends in the middle of a line")
        line = self.data[self.position : end]
        self.position = end + 1
        return line

    def read_number(self, code: str) -> int:
        return struct.unpack(code, self.read_bytes(struct.calcsize(code)))[0]

    def pop_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.marks.pop()
        return items


# Implementations of the allowed global names. Each takes the interpreter and the argument tuple and validates it.


def _dtype(machine: _PickleVM, args: tuple[Any, ...]) -> _Placeholder:
    """`numpy.dtype(code, align, copy)`: booleans, integers and floats only, never objects or records."""
    code = _to_text(args[0])
    if not _NUMERIC_DTYPE.fullmatch(code):
        raise _UnpicklingError(f"an array of dtype {code[:40]!r}, expected a numeric dtype")
    return _Placeholder("dtype", np.dtype(code))


def _reconstruct(machine: _PickleVM, args: tuple[Any, ...]) -> _Placeholder:
    """`_reconstruct(ndarray, (0,), b'b')`: an empty array that the following `BUILD` fills."""
    if len(args) != 3 or args[0] is not _ndarray or args[1] != (0,):
        raise _UnpicklingError("arguments of _reconstruct that NumPy never writes")
    return _Placeholder("array")


def _frombuffer(machine: _PickleVM, args: tuple[Any, ...]) -> _Placeholder:
    """`_frombuffer(buffer, dtype, shape, order)`: an array as written in protocol 5."""
    buffer, dtype, shape, order = args
    return _Placeholder("array", _view_array(buffer, dtype, shape, order in ("F", b"F")))


def _encode(machine: _PickleVM, args: tuple[Any, ...]) -> bytes:
    """`_codecs.encode(text, 'latin1')`: bytes as written by Python 3 in protocols 0 to 2."""
    text, codec = args
    if not isinstance(text, str) or _to_text(codec) not in ("latin1", "latin-1"):
        raise _UnpicklingError("_codecs.encode of something that is not latin-1 text")
    # One memoized text, encoded a million times, would expand a small file to gigabytes.
    machine.encoded_bytes += len(text)
    if machine.encoded_bytes > len(machine.data):
        raise _UnpicklingError(f"it expands to more than its own {len(machine.data):,} bytes")
    return text.encode("latin-1")


def _ndarray(machine: _PickleVM, args: tuple[Any, ...]) -> _Placeholder:
    """`numpy.ndarray`: allowed as an argument of `_reconstruct` only."""
    raise _UnpicklingError("a direct call of numpy.ndarray")


ALLOWED_GLOBALS: dict[str, Callable[[_PickleVM, tuple[Any, ...]], Any]] = {
    "numpy.core.multiarray._reconstruct": _reconstruct,
    "numpy._core.multiarray._reconstruct": _reconstruct,
    "numpy.core.numeric._frombuffer": _frombuffer,
    "numpy._core.numeric._frombuffer": _frombuffer,
    "numpy.ndarray": _ndarray,
    "numpy.dtype": _dtype,
    "_codecs.encode": _encode,
}
_ALLOWED_FUNCTIONS = frozenset(ALLOWED_GLOBALS.values())


def _to_text(value: Any) -> str:
    return value.decode("ascii") if isinstance(value, bytes) else str.__str__(value)


def _view_array(buffer: Any, dtype: Any, shape: Any, fortran: bool) -> np.ndarray:
    """Return a read-only view of `buffer`, whose size must match dtype and shape; nothing is allocated."""
    if not isinstance(dtype, _Placeholder) or dtype.kind != "dtype":
        raise _UnpicklingError("an array without a dtype")
    if not isinstance(buffer, bytes):
        raise _UnpicklingError("an array whose values are not bytes")
    if not isinstance(shape, tuple) or len(shape) > 8 or any(type(n) is not int or not 0 <= n < 2**31 for n in shape):
        raise _UnpicklingError("an array with an invalid shape")
    size = math.prod(shape) * dtype.value.itemsize
    if size != len(buffer):
        raise _UnpicklingError(f"an array of shape {shape} and {size:,} bytes, with {len(buffer):,} bytes of values")
    return np.frombuffer(buffer, dtype.value).reshape(shape, order="F" if fortran else "C")


def _global(machine: _PickleVM, module: str, name: str) -> None:
    full_name = f"{module}.{name}"
    if full_name not in ALLOWED_GLOBALS:
        raise _UnpicklingError(f"it refers to {full_name[:80]!r}, which no data set needs and which could run code")
    machine.stack.append(ALLOWED_GLOBALS[full_name])


def _reduce(machine: _PickleVM) -> None:
    args = machine.stack.pop()
    function = machine.stack.pop()
    if not callable(function) or function not in _ALLOWED_FUNCTIONS or not isinstance(args, tuple):
        raise _UnpicklingError("a call of an object that is not an allowed function, or arguments that are not a tuple")
    machine.stack.append(function(machine, args))


def _build(machine: _PickleVM) -> None:
    state = machine.stack.pop()
    target = machine.stack[-1]
    if not isinstance(target, _Placeholder) or not isinstance(state, tuple):
        raise _UnpicklingError("a state for a value that has none")
    if target.kind == "array":
        if target.value is not None:
            raise _UnpicklingError("an array filled twice")
        _version, shape, dtype, fortran, buffer = state
        target.value = _view_array(buffer, dtype, shape, bool(fortran))
        return
    byte_order, *record_fields = state[1:5]
    if any(value is not None for value in record_fields) or _to_text(byte_order) not in ("|", "<", ">", "="):
        raise _UnpicklingError("a dtype with fields, expected a numeric dtype")
    target.value = target.value.newbyteorder(_to_text(byte_order))


def _append(machine: _PickleVM, items: list[Any]) -> None:
    target = machine.stack[-1]
    if type(target) is not list:
        raise _UnpicklingError("values appended to something that is not a list")
    target.extend(items)


def _set_items(machine: _PickleVM, items: list[Any]) -> None:
    target = machine.stack[-1]
    if type(target) is not dict:
        raise _UnpicklingError("keys set in something that is not a dict")
    target.update(_dict_from_pairs(items))


def _dict_from_pairs(items: list[Any]) -> dict[Any, Any]:
    keys = items[::2]
    # Only scalars: hashing a tuple nested a million levels deep overflows the C stack.
    if len(items) % 2 or any(type(key) not in (bytes, str, int) for key in keys):
        raise _UnpicklingError("a dict whose keys are not text or integers")
    return dict(zip(keys, items[1::2], strict=True))


def _read_python2_string(machine: _PickleVM) -> bytes:
    raw = machine.read_line().strip()
    if len(raw) < 2 or raw[:1] != raw[-1:] or raw[:1] not in (b"'", b'"'):
        raise _UnpicklingError("a string without quotes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings about invalid escape sequences in the file do not help the user
        return codecs.escape_decode(raw[1:-1])[0]  # pyright: ignore[reportReturnType]


def _read_decimal(machine: _PickleVM) -> int | bool:
    raw = machine.read_line()
    if raw in (b"00", b"01"):  # booleans in protocol 0
        return raw == b"01"
    if len(raw) > 24:
        raise _UnpicklingError("an integer of more than 24 digits")
    return int(raw.rstrip(b"L"))


def _push(read: Callable[[_PickleVM], Any]) -> Callable[[_PickleVM], None]:
    return lambda m: m.stack.append(read(m))


def _tuple(count: int) -> Callable[[_PickleVM], None]:
    def make(machine: _PickleVM) -> None:
        if len(machine.stack) < count:
            raise _UnpicklingError("a tuple of more values than the stack holds")
        machine.stack[-count:] = [tuple(machine.stack[-count:])]

    return make


def _put(index: Callable[[_PickleVM], int]) -> Callable[[_PickleVM], None]:
    def put(machine: _PickleVM) -> None:
        machine.memo[index(machine)] = machine.stack[-1]

    return put


def _mark(machine: _PickleVM) -> None:
    machine.marks.append(machine.stack)
    machine.stack = []


def _setitem(machine: _PickleVM) -> None:
    value = machine.stack.pop()
    _set_items(machine, [machine.stack.pop(), value])


def _stack_global(machine: _PickleVM) -> None:
    name = machine.stack.pop()
    _global(machine, _to_text(machine.stack.pop()), _to_text(name))


# Not listed and therefore rejected: classes and instances (INST, OBJ, NEWOBJ), persistent ids, extension codes, sets,
# LONG4 and out-of-band buffers. Sizes are read as unsigned, so a negative size exceeds the remaining bytes.
OPCODES: dict[bytes, Callable[[_PickleVM], object]] = {
    b"\x80": lambda m: m.read_number("<B"),  # PROTO: not checked, since the opcodes are
    b"\x95": lambda m: m.read_bytes(8),  # FRAME: only a hint for stream readers
    b"(": _mark,
    b"0": lambda m: m.stack.pop(),  # POP
    b"1": lambda m: m.pop_mark(),  # POP_MARK
    b"2": lambda m: m.stack.append(m.stack[-1]),  # DUP
    b"N": _push(lambda m: None),
    b"\x88": _push(lambda m: True),
    b"\x89": _push(lambda m: False),
    b"I": _push(_read_decimal),
    b"L": _push(_read_decimal),
    b"J": _push(lambda m: m.read_number("<i")),
    b"K": _push(lambda m: m.read_number("<B")),
    b"M": _push(lambda m: m.read_number("<H")),
    b"\x8a": _push(lambda m: int.from_bytes(m.read_bytes(m.read_number("<B")), "little", signed=True)),  # LONG1
    b"F": _push(lambda m: float(m.read_line())),
    b"G": _push(lambda m: struct.unpack(">d", m.read_bytes(8))[0]),
    b"S": _push(_read_python2_string),
    b"T": _push(lambda m: m.read_bytes(m.read_number("<I"))),
    b"U": _push(lambda m: m.read_bytes(m.read_number("<B"))),
    b"B": _push(lambda m: m.read_bytes(m.read_number("<I"))),
    b"C": _push(lambda m: m.read_bytes(m.read_number("<B"))),
    b"\x8e": _push(lambda m: m.read_bytes(m.read_number("<Q"))),  # BINBYTES8
    b"\x96": _push(lambda m: m.read_bytes(m.read_number("<Q"))),  # BYTEARRAY8, read as bytes
    b"V": _push(lambda m: m.read_line().decode("raw-unicode-escape")),
    b"X": _push(lambda m: m.read_bytes(m.read_number("<I")).decode("utf-8", "surrogatepass")),
    b"\x8c": _push(lambda m: m.read_bytes(m.read_number("<B")).decode("utf-8", "surrogatepass")),
    b"\x8d": _push(lambda m: m.read_bytes(m.read_number("<Q")).decode("utf-8", "surrogatepass")),
    b")": _push(lambda m: ()),
    b"t": lambda m: _push_from_mark(m, tuple),
    b"\x85": _tuple(1),
    b"\x86": _tuple(2),
    b"\x87": _tuple(3),
    b"]": _push(lambda m: []),
    b"l": lambda m: _push_from_mark(m, list),
    b"a": lambda m: _append(m, [m.stack.pop()]),
    b"e": lambda m: _append(m, m.pop_mark()),
    b"}": _push(lambda m: {}),
    b"d": lambda m: _push_from_mark(m, _dict_from_pairs),
    b"s": _setitem,
    b"u": lambda m: _set_items(m, m.pop_mark()),
    b"p": _put(lambda m: int(m.read_line()[:20])),
    b"q": _put(lambda m: m.read_number("<B")),
    b"r": _put(lambda m: m.read_number("<I")),
    b"\x94": _put(lambda m: len(m.memo)),  # MEMOIZE
    b"g": _push(lambda m: m.memo[int(m.read_line()[:20])]),
    b"h": _push(lambda m: m.memo[m.read_number("<B")]),
    b"j": _push(lambda m: m.memo[m.read_number("<I")]),
    b"c": lambda m: _global(m, m.read_line().decode(), m.read_line().decode()),
    b"\x93": _stack_global,
    b"R": _reduce,
    b"b": _build,
}
_DISPATCH = [OPCODES.get(bytes([code])) for code in range(256)]


def _push_from_mark(machine: _PickleVM, build: Callable[[list[Any]], Any]) -> None:
    items = machine.pop_mark()
    machine.stack.append(build(items))


def _execute(machine: _PickleVM) -> Any:
    data = machine.data
    for _ in range(MAX_OPCODES):
        if machine.position >= len(data):
            raise _UnpicklingError("it ends before the STOP opcode: the file is truncated")
        code = data[machine.position]
        machine.position += 1
        if code == 0x2E:  # STOP
            return machine.stack.pop()
        action = _DISPATCH[code]
        if action is None:
            raise _UnpicklingError(
                f"opcode {bytes([code])!r} at offset {machine.position - 1:,}, which no data set needs"
            )
        action(machine)
    raise _UnpicklingError(f"more than {MAX_OPCODES:,} opcodes")


def _unwrap(value: Any) -> Any:
    if callable(value) or (isinstance(value, _Placeholder) and value.value is None):
        raise _UnpicklingError("an incomplete value")
    return value.value if isinstance(value, _Placeholder) else value


def loads_pickle(
    data: bytes | bytearray | memoryview, source_name: str = "pickle", *, max_bytes: int = MAX_BYTES
) -> Any:
    """Read a pickle of protocol 0 to 5; Python 2 strings are returned as bytes, arrays as read-only views of the data.

    `source_name` names the file in errors. Raises `DataError` if it is not a complete pickle of dicts, lists, tuples,
    text, numbers and numeric arrays, and before allocating more than a few times its size.
    """
    if len(data) > max_bytes:
        raise DataError(f"{source_name} has {len(data):,} bytes, expected at most {max_bytes:,}", _REMEDY)
    if not data:
        raise DataError(f"{source_name} is empty, expected a pickle", _REMEDY)
    machine = _PickleVM(bytes(data))
    try:
        result = _unwrap(_execute(machine))
        if isinstance(result, dict):
            for key, value in result.items():
                # One level of lists and no recursion: a pickled list may contain itself.
                result[key] = [_unwrap(item) for item in value] if isinstance(value, list) else _unwrap(value)
        return result
    except _UnpicklingError as reason:
        raise DataError(f"{source_name} is not a pickle that can be read safely: {reason}", _REMEDY) from None
    except (IndexError, KeyError, ValueError, TypeError, OverflowError, struct.error) as error:
        reason = f"invalid data at offset {machine.position:,} ({type(error).__name__})"
        raise DataError(f"{source_name} is not a pickle that can be read safely: {reason}", _REMEDY) from None


def load_pickle(source: Path | str | bytes | memoryview, source_name: str = "", *, max_bytes: int = MAX_BYTES) -> dict:
    """Read the dict in a pickle file, or in the bytes of one; keys are bytes or str as written.

    Raises `DataError` if the file is missing or too large, or the pickle is unsafe, damaged or not a dict.
    """
    if isinstance(source, str | Path):
        path, source_name = Path(source), source_name or str(source)
        try:
            size = path.stat().st_size
            # Check the size before reading, so that a huge file cannot exhaust the memory.
            content = path.read_bytes() if size <= max_bytes else b""
        except OSError as error:
            raise DataError(f"cannot read {source_name}: {error.strerror or error}", "check the path") from None
        if size > max_bytes:
            raise DataError(f"{source_name} has {size:,} bytes, expected at most {max_bytes:,}", _REMEDY)
    else:
        content, source_name = bytes(source), source_name or "pickle"
    head = content[:512].lstrip().lower()
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise DataError(f"{source_name} is an HTML page, expected a pickle", "download the file again")
    result = loads_pickle(content, source_name, max_bytes=max_bytes)
    if not isinstance(result, dict):
        raise DataError(f"{source_name} contains a {type(result).__name__}, expected a dict", _REMEDY)
    return result
