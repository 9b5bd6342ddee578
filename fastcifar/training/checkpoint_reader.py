"""Read a checkpoint file of unknown origin into plain containers and tensors, in memory proportional to its size.

Files of torch.save are read with `weights_only=True` and a shorter list of allowed functions than torch's: some of
those, such as `bytearray(10**10)`, allocate far more memory than the file has bytes.
"""

import io
import json
import re
import struct
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch._weights_only_unpickler import _get_allowed_globals

from fastcifar.errors import CheckpointError, first_message_line
from fastcifar.files import parse_json_object
from fastcifar.recipe import section_fields

MAX_DEPTH = 50  # of nested containers
MAX_BYTES_BEYOND_FILE = 64 * 2**20  # a pickle writes a repeated object, such as a key, only once
# What a checkpoint may refer to, in addition to storages and dtypes
ALLOWED_GLOBALS = {
    "collections.OrderedDict", "collections.Counter", "builtins.set", "builtins.complex", "torch.Size", "torch.device",
    "torch.nn.parameter.Parameter", "torch._utils._rebuild_parameter", "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3",
}  # fmt: skip
# NumPy type code -> struct format, for the NumPy scalars that other projects store beside their weights
NUMPY_TO_STRUCT_FORMATS = {
    "b1": "<?", "i1": "<b", "i2": "<h", "i4": "<i", "i8": "<q", "u1": "<B", "u2": "<H", "u4": "<I", "u8": "<Q",
    "f2": "<e", "f4": "<f", "f8": "<d",
}  # fmt: skip
MAX_SCALAR_BYTES = 8
SAVE_STATE_DICT = "save the state_dict() of the network with torch.save instead"
# member of a ZIP archive -> what the archive is, and the remedy
OTHER_ARCHIVES = {
    "constants.pkl": ("a TorchScript program", SAVE_STATE_DICT),
    "serialized_exported_program.json": ("an exported program of torch.export", SAVE_STATE_DICT),
    "archive_format": ("an exported program of torch.export", SAVE_STATE_DICT),
}
# pattern of the first bytes of a file -> what it is, and the remedy
OTHER_FILES = {
    rb"\x89HDF": ("an HDF5 file, such as Keras writes", SAVE_STATE_DICT),
    rb"\x08[\x03-\x20][\x12\x3a]": ("an ONNX file", SAVE_STATE_DICT),
    rb"\s*<(?i:!doctype|html|\?xml)": ("an HTML or XML page", "download the file itself"),
    rb"version https://git-lfs": ("a pointer of Git LFS", "fetch the file with `git lfs pull`"),
    rb"\x1f\x8b": ("a gzip file", "unpack it"),
}


def parse_checkpoint(content: bytes, path: Path) -> dict[str, Any]:
    """Return the dict in a file of torch.save, or in a .safetensors file, whose `path` is used in messages.

    Ordered dicts become dicts. Raises `CheckpointError` for anything else, including tensors that are expanded, on the
    meta device, sparse or quantized, and containers that are deeply nested or contain themselves.
    """
    if content[8:9] == b"{" and int.from_bytes(content[:8], "little") < len(content):
        return _parse_safetensors(content, path)
    _require_torch_file(content, path)
    try:
        with _allowed_globals(), torch.serialization.safe_globals(SAFE_GLOBALS):
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        plain, num_bytes = _Converter().convert(state)
    except Exception as error:  # torch raises many types for a damaged or malicious file
        # torch's message advises to disable `weights_only`
        forbidden = re.search(r"GLOBAL (\S+) (?:was not an allowed|whose module)", str(error))
        detail = re.search(r"WeightsUnpickler error: (.+)", str(error))
        reason = detail[1] if detail else first_message_line(error, type(error).__name__)
        if forbidden:
            reason = f"it refers to {forbidden[1]}, which is not allowed in checkpoints"
        elif reason.startswith("Weights only"):
            reason = "it is damaged, or contains objects other than weights"
        is_object = (
            forbidden and "." in forbidden[1] and not forbidden[1].startswith(("posix.", "nt.", "os.", "torch._"))
        )
        remedy = f"if it is a whole network or another object, {SAVE_STATE_DICT}" if is_object else ""
        raise CheckpointError(f"{path} is not a checkpoint: {reason}", remedy) from None
    if num_bytes > 8 * len(content) + MAX_BYTES_BEYOND_FILE:
        raise CheckpointError(f"{path} has {len(content):,} bytes and expands to {num_bytes:,}, so it is not loaded")
    if not isinstance(plain, dict):
        kind = type(plain).__name__
        raise CheckpointError(f"{path} contains a {kind}, not a dict of weights", SAVE_STATE_DICT)
    return plain


def _parse_safetensors(content: bytes, path: Path) -> dict[str, Any]:
    """Return the tensors; if fastcifar wrote the file, as `model` with the `recipe` and `classes` of the metadata."""
    try:
        weights = safetensors.torch.load(content)
    except Exception as error:  # SafetensorError is not public, and torch refuses some dtypes
        raise CheckpointError(f"{path} is not a .safetensors file: {first_message_line(error)}") from None
    header = content[8 : 8 + int.from_bytes(content[:8], "little")]
    metadata = (parse_json_object(header.decode()) or {}).get("__metadata__", {})
    recipe = parse_json_object(metadata.get("recipe", "")) or {"arch": metadata.get("arch")}
    if not recipe.get("arch"):
        return weights
    classes = (parse_json_object(f'{{"names": {metadata.get("classes")}}}') or {}).get("names")
    known = {"classes": classes, "data_digest": metadata.get("data_digest")}
    known = {name: value for name, value in known.items() if value}
    return {"recipe": recipe, "model": weights, "ema": None, **known}


def safetensors_metadata(recipe: dict[str, Any], classes: Sequence[str], data_digest: str | None) -> dict[str, str]:
    """Return the metadata of a .safetensors file, from which `_parse_safetensors` restores what inference needs.

    With `data_digest`, the `Dataset.digest` of the training data, it also identifies the training images.
    """
    names = (*section_fields("network"), "dataset", "normalize", *(("val_size", "val_seed") if data_digest else ()))
    options = {name: recipe[name] for name in names if recipe.get(name) is not None}
    metadata = {"arch": recipe["arch"], "recipe": json.dumps(options), "classes": json.dumps(list(classes))}
    return {**metadata, "data_digest": data_digest} if data_digest else metadata


def _require_torch_file(content: bytes, path: Path) -> None:
    """Raise `CheckpointError` for a file of another kind, and for an archive that is not stored without compression."""
    for pattern, (kind, remedy) in OTHER_FILES.items():
        if re.match(pattern, content):
            raise CheckpointError(f"{path} is {kind}, not a checkpoint", remedy)
    if not content.startswith(b"PK"):
        return
    try:
        members = zipfile.ZipFile(io.BytesIO(content)).infolist()
    except Exception as error:  # zipfile raises many types for a damaged archive
        reason = first_message_line(error, type(error).__name__)
        raise CheckpointError(f"{path} is not a checkpoint: {reason}") from None
    for member in members:
        if other := OTHER_ARCHIVES.get(member.filename.rpartition("/")[2]):
            raise CheckpointError(f"{path} is {other[0]}, which contains code", other[1])
    sizes = [member.file_size for member in members]
    if any(member.compress_type != zipfile.ZIP_STORED for member in members) or sum(sizes) > len(content):
        problem = f"{path} has {len(content):,} bytes and unpacks to {sum(sizes):,}; torch.save does not compress"
        raise CheckpointError(problem, "save it again with torch.save")


@contextmanager
def _allowed_globals() -> Iterator[None]:
    """Restrict what torch's unpickler allows to `ALLOWED_GLOBALS`, storages, dtypes and bytes of a NumPy scalar."""
    allowed = _get_allowed_globals()  # a cached dict
    original = dict(allowed)
    for name, value in original.items():
        if not (name in ALLOWED_GLOBALS or name.endswith("Storage") or isinstance(value, torch.dtype)):
            del allowed[name]
    allowed["_codecs.encode"] = _encode_scalar_stub
    try:
        yield
    finally:
        allowed.clear()
        allowed.update(original)


def _encode_scalar_stub(text: str, encoding: str) -> bytes:
    """Replaces `_codecs.encode`, with which pickles write bytes; other encodings could compress or repeat them."""
    if encoding != "latin1" or len(text) > MAX_SCALAR_BYTES:
        raise ValueError("bytes are only allowed in NumPy scalars")
    return text.encode("latin1")


class _NumpyDtypeStub:
    """Replaces `numpy.dtype` while a file is read."""

    def __init__(self, code: str, *_: object) -> None:
        self.struct_format = NUMPY_TO_STRUCT_FORMATS[code]

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] not in ("<", "|"):
            raise ValueError("only little-endian numbers are supported")


def _numpy_scalar_stub(dtype: _NumpyDtypeStub, content: bytes) -> float | int | bool:
    return struct.unpack(dtype.struct_format, content)[0]


# Unlike NumPy's own functions, the stubs check their arguments; `parse_checkpoint` reports the errors they raise.
SAFE_GLOBALS: list[Any] = [
    (_NumpyDtypeStub, "numpy.dtype"),
    (_numpy_scalar_stub, "numpy.core.multiarray.scalar"),
    (_numpy_scalar_stub, "numpy._core.multiarray.scalar"),
]


class _Converter:
    """Converts what torch.load returned; an object that occurs several times is converted once and counted each time.

    A pickle of a few bytes can contain a container that contains the same container twice, and so on.
    """

    def __init__(self) -> None:
        self.results: dict[int, tuple[Any, int]] = {}  # id of an object -> its conversion and number of bytes
        self.open: set[int] = set()  # ids of the containers around the current object

    def convert(self, value: Any) -> tuple[Any, int]:
        """Return `value` in plain containers, and the number of bytes it would have without shared objects."""
        if id(value) in self.open or len(self.open) > MAX_DEPTH:
            raise ValueError(f"its containers contain themselves or are nested more than {MAX_DEPTH} times")
        if id(value) not in self.results:
            self.open.add(id(value))
            self.results[id(value)] = self._convert_new(value)
            self.open.remove(id(value))
        return self.results[id(value)]

    def _convert_new(self, value: Any) -> tuple[Any, int]:
        if isinstance(value, dict):
            items = [(key, self.convert(item)) for key, item in dict.items(value)]
            size = sum(16 + (len(key) if isinstance(key, str | bytes) else 0) + item[1] for key, item in items)
            return {key: item[0] for key, item in items}, size
        if type(value) in (list, tuple, set, torch.Size):
            converted = [self.convert(item) for item in value]
            container = tuple if isinstance(value, tuple) else type(value)
            return container(item[0] for item in converted), 16 + sum(item[1] for item in converted)
        if isinstance(value, Tensor):
            is_plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
            if not is_plain or value.nbytes > value.untyped_storage().nbytes():
                raise ValueError(f"it contains a tensor of shape {list(value.shape)} that is not stored in full")
            return value.detach(), value.nbytes
        if isinstance(value, str | bytes):
            return value, len(value)
        if value is None or isinstance(value, bool | int | float | complex | torch.dtype | torch.device):
            return value, 8
        raise ValueError(f"it contains an object of type {type(value).__name__}")
