"""A pickle reader for dicts, lists, scalars and numeric arrays that is safe for files from unknown sources.

`_check_opcodes` checks every opcode and the size of its argument before anything is executed. Python's unpickler then
builds the values, with classes of this module in place of all globals. Memory use is proportional to the file size.
"""

import io
import pickle
import pickletools
import re
import warnings
from typing import Any

import numpy as np

from fastcifar.errors import DataError, first_message_line

# CIFAR-100's `train` needs 350,000 in protocol 0; each costs at most a few hundred bytes in addition to its argument.
MAX_OPCODES = 600_000
PICKLE_REMEDY = "use the official files, or a pickle of {'data': uint8 array, 'ids': ints}"
_NUMERIC_DTYPE = re.compile(r"[|<>=]?(b1|[iu][1248]|f[248])")

# Not listed and therefore rejected: classes and instances (INST, OBJ, NEWOBJ), persistent ids, extension codes, sets,
# DUP, LONG4 and out-of-band buffers.
_ALLOWED_OPCODES = """
PROTO FRAME MARK STOP POP POP_MARK NONE NEWTRUE NEWFALSE INT LONG LONG1 BININT BININT1 BININT2 FLOAT BINFLOAT
STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8
UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3
EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT DICT SETITEM SETITEMS
PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE BUILD
"""
OPCODES = {ord(opcode.code): opcode for opcode in pickletools.opcodes if opcode.name in _ALLOWED_OPCODES.split()}
# A new dict becomes a call of `_Dict`. FRAME is only a hint for stream readers, but the unpickler skips bytes if a
# frame ends within an argument.
_REPLACEMENTS = {"EMPTY_DICT": b"cfastcifar\ndict\n)R", "DICT": b"1cfastcifar\ndict\n)R", "FRAME": b""}
# Bytes of the size that precedes an argument of variable size
_SIZE_BYTES = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}
# What the unpickler raises for damaged files. (ArithmeticError and LookupError have subclasses such as KeyError.)
_UNPICKLING_ERRORS = (pickle.UnpicklingError, ArithmeticError, AttributeError, BufferError, EOFError, LookupError)


class _Global:
    """Base class of the replacements of globals, and replacement of `numpy.ndarray`; BUILD cannot set attributes."""

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a state for a value that has none")


class _DType(_Global):
    """`numpy.dtype(code, align, copy)`: booleans, integers and floats only, never objects or records."""

    def __init__(self, code: Any, align: Any = False, copy: Any = False) -> None:
        code = _to_text(code)
        if not _NUMERIC_DTYPE.fullmatch(code):
            raise pickle.UnpicklingError(f"an array of dtype {code[:40]!r}, expected a numeric dtype")
        self.dtype: Any = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        byte_order, *record_fields = state[1:5]
        if any(value is not None for value in record_fields) or _to_text(byte_order) not in ("|", "<", ">", "="):
            raise pickle.UnpicklingError("a dtype with fields, expected a numeric dtype")
        self.dtype = self.dtype.newbyteorder(_to_text(byte_order))


class _Array(_Global):
    """`_reconstruct(ndarray, (0,), b'b')`: an array that the following BUILD fills."""

    array: np.ndarray | None = None

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        _version, shape, dtype, fortran, buffer = state
        self._view(buffer, dtype, shape, bool(fortran))

    def _view(self, buffer: Any, dtype: Any, shape: Any, fortran: bool) -> None:
        """Make the array a read-only view of `buffer`, whose size must match dtype and shape."""
        if not isinstance(buffer, bytes | bytearray) or not isinstance(dtype, _DType):
            raise pickle.UnpicklingError("an array whose values are not bytes, or without a dtype")
        array = np.frombuffer(buffer, dtype.dtype).reshape(shape, order="F" if fortran else "C")
        if array.shape != shape:  # -1 or a single integer
            raise pickle.UnpicklingError("an array with an invalid shape")
        array.flags.writeable = False
        self.array = array


class _BufferArray(_Array):
    """`_frombuffer(buffer, dtype, shape, order)`: an array as written in protocol 5."""

    def __init__(self, buffer: Any, dtype: Any, shape: Any, order: Any) -> None:
        self._view(buffer, dtype, shape, _to_text(order) == "F")


class _Encode(_Global):
    """`_codecs.encode(text, 'latin1')`: bytes as written by Python 3 in protocols 0 to 2."""

    def __init__(self, max_bytes: int) -> None:
        self.remaining_bytes = max_bytes

    def __call__(self, text: Any, codec: Any) -> bytes:
        if not isinstance(text, str) or _to_text(codec) not in ("latin1", "latin-1"):
            raise pickle.UnpicklingError("_codecs.encode of something that is not latin-1 text")
        # One memoized text, encoded a million times, would expand a small file to gigabytes.
        self.remaining_bytes -= len(text)
        if self.remaining_bytes < 0:
            raise pickle.UnpicklingError("it expands to more than its own size")
        return text.encode("latin-1")


class _Dict(dict):
    """A dict with scalar keys only: hashing nested tuples can overflow the C stack or take exponential time."""

    __slots__ = ()
    __setstate__ = _Global.__setstate__

    def __init__(self) -> None:
        super().__init__()

    def __setitem__(self, key: Any, value: Any) -> None:
        if type(key) not in (bytes, str, int):
            raise pickle.UnpicklingError("a dict whose keys are not text or integers")
        super().__setitem__(key, value)


class _SafeUnpickler(pickle.Unpickler):
    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content), fix_imports=False, encoding="bytes")
        self.globals: dict[str, Any] = {
            "numpy.core.multiarray._reconstruct": _Array,
            "numpy._core.multiarray._reconstruct": _Array,
            "numpy.core.numeric._frombuffer": _BufferArray,
            "numpy._core.numeric._frombuffer": _BufferArray,
            "numpy.ndarray": _Global,
            "numpy.dtype": _DType,
            "_codecs.encode": _Encode(len(content)),
            "fastcifar.dict": _Dict,
        }

    def find_class(self, module_name: str, global_name: str) -> Any:
        name = f"{module_name}.{global_name}"
        if name not in self.globals:
            problem = f"it refers to {name[:80]!r}, which no data set needs and which could run code"
            raise pickle.UnpicklingError(problem)
        return self.globals[name]


def _to_text(value: Any) -> str:
    return value.decode("ascii") if isinstance(value, bytes) else str.__str__(value)


def _check_opcodes(content: bytes) -> bytes:
    """Check every opcode of a pickle and the size of every argument; return the pickle with `_REPLACEMENTS`."""
    parts, kept, position, previous = [], 0, 0, ""
    for _ in range(MAX_OPCODES):
        if position >= len(content):
            raise pickle.UnpicklingError("it ends before the STOP opcode: the file is truncated")
        opcode = OPCODES.get(content[position])
        if opcode is None:
            code = content[position : position + 1]
            raise pickle.UnpicklingError(f"opcode {code!r} at offset {position:,}, which no data set needs")
        end = _argument_end(content, position + 1, opcode)
        if "PUT" in opcode.name:
            argument = content[position + 1 : end]
            # The unpickler allocates a memo up to the largest index.
            if (int(argument) if opcode.name == "PUT" else int.from_bytes(argument, "little")) > MAX_OPCODES:
                raise pickle.UnpicklingError("a memo index that is too large")
        if opcode.name == "DICT" and previous != "MARK":
            raise pickle.UnpicklingError("a dict that is not empty when it is created")
        if opcode.name in _REPLACEMENTS:
            parts += [content[kept:position], _REPLACEMENTS[opcode.name]]
            kept = end
        position, previous = end, opcode.name
        if previous == "STOP":
            return b"".join([*parts, content[kept:end]])
    raise pickle.UnpicklingError(f"more than {MAX_OPCODES:,} opcodes")


def _argument_end(content: bytes, start: int, opcode: pickletools.OpcodeInfo) -> int:
    """Return the end of the argument that begins at `start`, which must be within `content`."""
    size = opcode.arg.n if opcode.arg else 0
    if size == pickletools.UP_TO_NEWLINE:
        for _ in range(2 if opcode.name == "GLOBAL" else 1):
            start = content.find(b"\n", start) + 1
            if not start:
                raise pickle.UnpicklingError("it ends in the middle of a line")
        return start
    if size in _SIZE_BYTES:  # sizes are read as unsigned, so a negative one exceeds the remaining bytes
        offset = start
        start += _SIZE_BYTES[size]
        size = int.from_bytes(content[offset:start], "little")
    if start + size > len(content):
        remaining = max(len(content) - start, 0)
        raise pickle.UnpicklingError(f"a value of {size:,} bytes at offset {start:,}, but only {remaining:,} remain")
    return start + size


def _unwrap(value: Any) -> Any:
    if isinstance(value, _Array) and value.array is not None:
        return value.array
    if isinstance(value, _Global | type):
        raise pickle.UnpicklingError("an incomplete value")
    return value


def is_html_page(content: bytes) -> bool:
    """Return whether a file is a web page, such as the error page of a server."""
    return content[:512].lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml"))


def load_pickle(content: bytes, source_name: str) -> dict[Any, Any]:
    """Read the dict in a pickle of protocol 0 to 5, from file `source_name`; its keys are bytes, str or int.

    Python 2 strings are returned as bytes, arrays in the dict or in its lists as read-only views. Raises `DataError`
    for anything else.
    """
    if is_html_page(content):
        raise DataError(f"{source_name} is an HTML page, expected a pickle", "download the file again")
    if not content:
        raise DataError(f"{source_name} is empty, expected a pickle", PICKLE_REMEDY)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about invalid escape sequences in the file do not help the user
            result = _unwrap(_SafeUnpickler(_check_opcodes(content)).load())
        if not isinstance(result, dict):
            raise DataError(f"{source_name} contains a {type(result).__name__}, expected a dict", PICKLE_REMEDY)
        # One level of lists and no recursion: a pickled list may contain itself.
        return {
            key: [_unwrap(item) for item in value] if isinstance(value, list) else _unwrap(value)
            for key, value in result.items()
        }
    except (*_UNPICKLING_ERRORS, TypeError, ValueError) as error:
        reason = first_message_line(error, type(error).__name__)[:200]
        raise DataError(f"{source_name} is not a pickle that can be read safely: {reason}", PICKLE_REMEDY) from None
