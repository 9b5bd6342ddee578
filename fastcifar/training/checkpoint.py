"""Checkpoints: written atomically, verified by SHA-256, and loaded without executing code from the file.

`manifest.json` in the same folder holds the size and SHA-256 of each file and is written last; `last.previous.pt` is
the checkpoint before `last.pt`. Files of the source projects of fastcifar are dicts `{net, acc, epoch}` or state dicts.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import struct
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, cast

import torch
from torch import Tensor, nn

from fastcifar.data.cifar import DATASETS
from fastcifar.errors import CheckpointError, DiskError, NonFiniteError, first_message_line
from fastcifar.files import read_json_object, write_atomically
from fastcifar.models import MODELS, build_model
from fastcifar.renamed import upgrade_options
from fastcifar.training.lr_schedule import ScheduleState
from fastcifar.training.rng_state import RngState

CHECKPOINT_FORMAT = 2
MANIFEST_NAME = "manifest.json"
# NumPy type code -> struct format, for the NumPy scalars that other projects store beside their weights
NUMPY_TO_STRUCT_FORMATS = {
    "b1": "<?", "i1": "<b", "i2": "<h", "i4": "<i", "i8": "<q", "u1": "<B", "u2": "<H", "u4": "<I", "u8": "<Q",
    "f2": "<e", "f4": "<f", "f8": "<d",
}  # fmt: skip


class ModelCheckpoint(TypedDict):
    """The part of a checkpoint that inference needs."""

    recipe: dict[str, Any]
    classes: list[str]
    model: dict[str, Tensor]
    ema: dict[str, Tensor] | None


class TrainingCheckpoint(ModelCheckpoint):
    """A complete checkpoint. `epoch` and all later keys are the fields of `TrainingProgress`."""

    samples: int
    ema_updates: Tensor | None
    optimizer: dict[str, Any]
    schedule: ScheduleState
    scaler: dict[str, Any]
    meter: Tensor
    random: list[RngState]
    clock: dict[str, float]
    epoch: int
    epoch_step: int
    step: int
    images: int
    val_acc: float | None
    best: float | None
    epochs_since_best: int
    rollbacks: int
    stop_reason: str


def save_checkpoint(path: Path, state: Mapping[str, Any], links: Sequence[Path] = ()) -> None:
    """Write `state` to `path` atomically, so that `path` is always a complete checkpoint, the old or the new one.

    `links`: other files of the same folder that get the same content afterwards, as hard links if the file system has
    them. Raises `NonFiniteError`, before anything is written, if a weight or running statistic is not finite, and
    `DiskError` if writing fails; each file is then the old or the new checkpoint.
    """
    for part in ("model", "ema"):
        for key, value in (state.get(part) or {}).items():
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise NonFiniteError(f"{key} is not finite", "the previous checkpoint is kept; use a smaller --lr")
    buffer = io.BytesIO()
    torch.save({"format": CHECKPOINT_FORMAT, **state}, buffer)
    content = buffer.getbuffer()
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    folder, files, file = path.parent, (path, *links), path
    try:
        manifest = read_manifest(folder)
        first = {file.name: entry for file in files if not file.exists()}
        kept = {_previous_path(file).name: manifest[file.name] for file in files if manifest.get(file.name)}
        # The manifest lists a first checkpoint before it is written. Otherwise, a process killed in between would leave
        # a file that is rejected as damaged, and there is no previous checkpoint to load instead.
        if first:
            _write_manifest(folder, {**manifest, **first})
        for file in files:
            write_atomically(file, content if file == path else path, _previous_path(file))
        _write_manifest(folder, {**manifest, **kept, **{file.name: entry for file in files}})
    except OSError as error:
        free_bytes = shutil.disk_usage(folder).free
        problem = f"cannot write {file} ({len(content):,} bytes, {free_bytes:,} bytes are free): {error.strerror}"
        raise DiskError(problem, "free disk space or set --out") from None


def _previous_path(path: Path) -> Path:
    return path.with_suffix(".previous.pt")


def load_checkpoint(path: Path, allow_foreign: bool = False) -> TrainingCheckpoint:
    """Load the checkpoint at `path`. If it is damaged, warn and load the previous checkpoint instead.

    The caller checks whether the result contains training state. `allow_foreign`: see `read_checkpoint`.
    """
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist", "specify a run folder or a .pt file")
    try:
        state = read_checkpoint(path, allow_foreign)
    except CheckpointError as error:
        previous = _previous_path(path)
        if not previous.is_file():
            raise
        state = read_checkpoint(previous, allow_foreign)
        warnings.warn(f"{error.problem}; {previous.name} is used instead", UserWarning, stacklevel=2)
    return cast(TrainingCheckpoint, state)


def load_any_checkpoint(path: Path, arch: str | None) -> ModelCheckpoint:
    """Load a checkpoint of fastcifar, or a file of a source project, to which a recipe with `arch` is added.

    Raises `CheckpointError` if a fastcifar checkpoint has another architecture than `arch`, or if `arch` is None for a
    source project's file, which does not name its architecture.
    """
    state = cast(dict[str, Any], load_checkpoint(path, allow_foreign=True))
    if _is_fastcifar_checkpoint(state):
        saved_arch = state["recipe"].get("arch", "")
        if arch not in (None, saved_arch):
            raise CheckpointError(f"{path} contains {saved_arch}, not {arch}", "remove --arch")
        return cast(ModelCheckpoint, state)
    weights = state.get("net", state)
    is_state_dict = isinstance(weights, dict) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in weights.items()
    )
    if not weights or not is_state_dict:
        raise CheckpointError(
            f"{path} contains no weights",
            "specify a run folder, its checkpoint, a file with {net, acc, epoch}, or a state dict",
        )
    if arch is None:
        matches = matching_architectures(weights)
        remedy = f"set --arch {' or '.join(matches)}" if matches else "set --arch, although no architecture matches"
        raise CheckpointError(f"{path} does not name the architecture of its weights", remedy)
    return {"recipe": {"arch": arch}, "classes": list(DATASETS["cifar10"].class_names), "model": weights, "ema": None}


def matching_architectures(weights: dict[str, Tensor]) -> list[str]:
    """Return the names in MODELS whose keys and shapes are those of `weights`, ignoring wrapper prefixes."""
    shapes = {strip_wrapper_prefixes(key): value.shape for key, value in weights.items()}
    matches = []
    for arch in MODELS:
        with torch.device("meta"):
            state = build_model(arch).state_dict()
        if {key: value.shape for key, value in state.items()} == shapes:
            matches.append(arch)
    return matches


def read_checkpoint(path: Path, allow_foreign: bool = False) -> dict[str, Any]:
    """Read one checkpoint file and verify it against the manifest, if there is one.

    `allow_foreign`: also accept a dict that is not a fastcifar checkpoint.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    valid_digests = {entry["sha256"] for entry in read_manifest(path.parent).values()}
    if valid_digests and hashlib.sha256(content).hexdigest() not in valid_digests:
        raise CheckpointError(f"{path} is damaged: the SHA-256 of its {len(content):,} bytes is not in {MANIFEST_NAME}")
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a damaged or malicious file
        # torch's message advises to disable `weights_only`
        forbidden = re.search(r"GLOBAL (\S+) (was not an allowed|whose module)", str(error))
        reason = f"it refers to {forbidden[1]}, which is not allowed in checkpoints" if forbidden else None
        reason = reason or first_message_line(error, type(error).__name__)
        raise CheckpointError(f"{path} is not a checkpoint: {reason}") from None
    if not isinstance(state, dict) or not (allow_foreign or _is_fastcifar_checkpoint(state)):
        raise CheckpointError(f"{path} has no model and recipe", "specify a fastcifar run folder or checkpoint")
    if _is_fastcifar_checkpoint(state):
        state["recipe"] = upgrade_options(state["recipe"])
    return state


def _is_fastcifar_checkpoint(state: dict[str, Any]) -> bool:
    return {"model", "recipe"} <= state.keys() and isinstance(state["recipe"], dict)


class _NumpyDtypeStub:
    """Replaces `numpy.dtype` while a file is read."""

    def __init__(self, code: str, *_: object) -> None:
        self.struct_format = NUMPY_TO_STRUCT_FORMATS[code]

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] not in ("<", "|"):
            raise ValueError("only little-endian numbers are supported")


def _numpy_scalar_stub(dtype: _NumpyDtypeStub, content: bytes) -> float | int | bool:
    return struct.unpack(dtype.struct_format, content)[0]


# Unlike NumPy's own functions, the stubs check their arguments; `read_checkpoint` reports the errors they raise.
SAFE_GLOBALS: list[Any] = [
    (_NumpyDtypeStub, "numpy.dtype"),
    (_numpy_scalar_stub, "numpy.core.multiarray.scalar"),
    (_numpy_scalar_stub, "numpy._core.multiarray.scalar"),
]


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of `folder`, file name -> {bytes, sha256}; empty if it is missing or damaged."""
    entries = read_json_object(folder / MANIFEST_NAME).items()
    return {name: entry for name, entry in entries if isinstance(entry, dict) and "sha256" in entry}


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    write_atomically(folder / MANIFEST_NAME, json.dumps(manifest, indent=1).encode())


def resolve_checkpoint_path(run_or_file: str, which: str = "last") -> Path:
    """Return the path `run_or_file` or, if it is a folder, that of its checkpoint `which` ("last" or "best")."""
    path = Path(run_or_file)
    return path / "checkpoints" / f"{which}.pt" if path.is_dir() else path


def load_weights(model: nn.Module, weights: dict[str, Tensor], source: object) -> None:
    """Load `weights`, ignoring the key prefixes of DataParallel and torch.compile; messages call them `source`.

    Raises `CheckpointError`, which names the keys, if keys are missing or unexpected or shapes differ.
    """
    weights = {strip_wrapper_prefixes(key): value for key, value in weights.items()}
    expected = model.state_dict()
    missing, unexpected = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    mismatched = sorted(key for key in expected.keys() & weights.keys() if expected[key].shape != weights[key].shape)
    for problem, keys in (("lacks", missing), ("has unexpected", unexpected), ("has other shapes for", mismatched)):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise CheckpointError(f"{source} {problem} {', '.join(keys[:3])}{more}", "check the architecture")
    model.load_state_dict(weights, strict=True)


def strip_wrapper_prefixes(key: str) -> str:
    """Return `key` without the prefixes that DataParallel and torch.compile add."""
    return re.sub(r"^(_orig_mod\.|module\.)+", "", key)
