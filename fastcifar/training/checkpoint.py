"""Checkpoints: written atomically, verified by sha256, loaded without running anything in them.

A checkpoint is a dict of plain values and tensors (`torch.load(weights_only=True)`): `format`, `recipe`, `classes`,
`model`, `ema`, and what the rest of a run depends on (`Parts.state`). `manifest.json` beside the files holds size and
sha256 of each and is written last; `last.previous.pt` is the one before `last.pt`.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import struct
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcifar.errors import CheckpointError, DiskError, NonFiniteError, first_message_line
from fastcifar.files import free_disk_bytes, read_json_object, write_atomically
from fastcifar.renamed import upgrade_options

CHECKPOINT_FORMAT = 2
MANIFEST_NAME = "manifest.json"
WRAPPER_PREFIXES = ("_orig_mod.", "module.")
# numpy's code of a number -> struct's, for the numpy scalars that other projects keep beside their weights
NUMPY_TO_STRUCT_FORMATS = {"b1": "<?", "i1": "<b", "i2": "<h", "i4": "<i", "i8": "<q", "u1": "<B", "u2": "<H", "u4": "<I", "u8": "<Q",
           "f2": "<e", "f4": "<f", "f8": "<d"}  # fmt: skip


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes `state` so that `path` is at any moment the old checkpoint or the new one, whole.

    Errors: `NonFiniteError` if a weight or statistic is not finite (nothing is written), `DiskError`.
    """
    _require_finite_weights(state)
    buffer = io.BytesIO()
    torch.save({"format": CHECKPOINT_FORMAT, **state}, buffer)
    content = buffer.getvalue()
    previous = path.with_suffix(".previous.pt")
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    try:
        if not path.exists():  # killed before the manifest knows of it, it would count as damaged, with none before it
            _write_manifest(path.parent, {**read_manifest(path.parent), path.name: entry})
        write_atomically(path, content, previous)
        manifest = read_manifest(path.parent)
        if path.name in manifest and previous.exists():
            manifest[previous.name] = manifest[path.name]
        _write_manifest(path.parent, {**manifest, path.name: entry})
    except OSError as error:
        free = free_disk_bytes(path.parent)
        known = "" if free is None else f", {free:,} are free"
        problem = f"cannot write {path} ({len(content):,} bytes{known}): {error.strerror}"
        raise DiskError(problem, "free some space, or give --out") from None


def load_checkpoint(path: Path, allow_foreign: bool = False) -> dict[str, Any]:
    """The checkpoint at `path`; if it is damaged, the one before it, with one warning.

    `anyones`: a dict that is no checkpoint of ours will do too (see `published`).
    Errors: `CheckpointError` when neither can be read. Nothing in the file is executed.
    """
    if not path.is_file():
        raise CheckpointError(f"no checkpoint {path}", "give a run folder or a .pt file")
    try:
        return read_checkpoint(path, allow_foreign)
    except CheckpointError as error:
        previous = path.with_suffix(".previous.pt")
        if not previous.is_file():
            raise
        state = read_checkpoint(previous, allow_foreign)
        warnings.warn(f"{error.problem}; {previous.name} is used instead", UserWarning, stacklevel=2)
        return state


def read_checkpoint(path: Path, allow_foreign: bool = False) -> dict[str, Any]:
    """One file, verified against the manifest if that knows it. Errors: `CheckpointError`."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    known = {entry["sha256"] for entry in read_manifest(path.parent).values()}
    if known and hashlib.sha256(content).hexdigest() not in known:
        raise CheckpointError(f"{path} is damaged: {len(content):,} bytes whose sha256 the manifest does not know")
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds for a damaged or a malicious file
        raise CheckpointError(f"{path} is not a checkpoint: {_describe_load_error(error)}") from None
    if not isinstance(state, dict) or not (allow_foreign or is_fastcifar_checkpoint(state)):
        raise CheckpointError(f"{path} holds no model and recipe of ours", "give a run folder or its checkpoint")
    if is_fastcifar_checkpoint(state):
        state["recipe"] = upgrade_options(state["recipe"])
    return state


def is_fastcifar_checkpoint(state: dict[str, Any]) -> bool:
    """Whether `state` is a checkpoint that fastcifar wrote."""
    return {"model", "recipe"} <= state.keys() and isinstance(state["recipe"], dict)


def _describe_load_error(error: Exception) -> str:
    """torch's error in a few words; its first line advises to switch the protection off."""
    refused = re.search(r"GLOBAL (\S+) (was not an allowed|whose module)", str(error))
    if refused:
        return f"it asks for {refused[1]}, which no checkpoint needs"
    return first_message_line(error, type(error).__name__)


class _NumpyDtypeStub:
    """Stands in for `numpy.dtype` while a file is read, so that numpy is given nothing of it but a number's bytes."""

    def __init__(self, code: str, *_: object) -> None:
        self.struct_format = NUMPY_TO_STRUCT_FORMATS[code]

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] not in ("<", "|"):
            raise ValueError("a number that is not little-endian")


def _numpy_scalar_stub(dtype: _NumpyDtypeStub, content: bytes) -> float | int | bool:
    """Stands in for the function that numpy pickles its scalars by; a plain number comes of it."""
    return struct.unpack(dtype.struct_format, content)[0]


# Wrong arguments raise, and `read` turns that into its error; numpy's own functions would trust them.
SAFE_GLOBALS: list[Any] = [
    (_NumpyDtypeStub, "numpy.dtype"),
    (_numpy_scalar_stub, "numpy.core.multiarray.scalar"),
    (_numpy_scalar_stub, "numpy._core.multiarray.scalar"),
]


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """File name -> {bytes, sha256}; empty where there is no readable manifest."""
    entries = read_json_object(folder / MANIFEST_NAME).items()
    return {name: entry for name, entry in entries if isinstance(entry, dict) and "sha256" in entry}


def _write_manifest(folder: Path, manifest: dict[str, dict[str, Any]]) -> None:
    write_atomically(folder / MANIFEST_NAME, json.dumps(manifest, indent=1).encode())


def resolve_checkpoint_path(run_or_file: str, which: str = "last") -> Path:
    """The checkpoint that `run_or_file` means: the file itself, or `which` ("last", "best") of a run folder."""
    path = Path(run_or_file)
    return path / "checkpoints" / f"{which}.pt" if path.is_dir() else path


def load_weights(model: torch.nn.Module, weights: dict[str, Tensor], source: object) -> None:
    """Strictly: every key once, every shape right. Errors: `CheckpointError` that names what does not fit."""
    weights = {strip_wrapper_prefixes(key): value for key, value in weights.items()}
    expected = model.state_dict()
    missing, unknown = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    shapes = [key for key in expected.keys() & weights.keys() if expected[key].shape != weights[key].shape]
    for what, keys in (("lacks", missing), ("has unknown", unknown), ("has other shapes for", sorted(shapes))):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise CheckpointError(f"{source} {what} {', '.join(keys[:3])}{more}", "is it another architecture?")
    model.load_state_dict(weights, strict=True)


def strip_wrapper_prefixes(key: str) -> str:
    """`key` without the prefixes that DataParallel and torch.compile put before it."""
    while key.startswith(WRAPPER_PREFIXES):
        key = key[len(next(prefix for prefix in WRAPPER_PREFIXES if key.startswith(prefix))) :]
    return key


def _require_finite_weights(state: dict[str, Any]) -> None:
    for part in ("model", "ema"):
        for key, value in (state.get(part) or {}).items():
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise NonFiniteError(f"{key} is not finite", "the checkpoint before it is kept; use a smaller --lr")
