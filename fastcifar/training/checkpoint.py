"""Checkpoints: written atomically, verified by SHA-256, and loaded without executing code from the file.

`manifest.json` in the same folder holds the size and SHA-256 of each file and is written last; `last.previous.pt` is
the checkpoint before `last.pt`. Files of the source projects of fastcifar are dicts `{net, acc, epoch}` or state dicts.
"""

import hashlib
import io
import itertools
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict, TypeVar, cast

import torch
from torch import Tensor, nn

from fastcifar.data.cifar import DATASETS
from fastcifar.errors import CheckpointError, DiskError, NonFiniteError, UsageError
from fastcifar.files import read_json_object, read_regular_file, write_atomically
from fastcifar.models import architecture_names, build_for_inspection, find_architecture
from fastcifar.pretrained import is_pretrained, pretrained_path
from fastcifar.python_objects import active_objects, object_name
from fastcifar.renamed import upgrade_options
from fastcifar.training.checkpoint_reader import parse_checkpoint
from fastcifar.training.lr_schedule import ScheduleState
from fastcifar.training.rng_state import RngState

CHECKPOINT_FORMAT = 2
MANIFEST_NAME = "manifest.json"
MAX_CHECKPOINT_BYTES = 2 * 2**30
# Keys under which other projects store a state dict: those of kuangliu and of this project's sources, of Lightning and
# timm, of torchvision and DeiT, of the tutorials of PyTorch, and of DeepSpeed
WEIGHTS_KEYS = ("net", "state_dict", "model", "model_state_dict", "module", "state_dict_ema")

T = TypeVar("T")


class ModelCheckpoint(TypedDict):
    """The part of a checkpoint that inference needs."""

    recipe: dict[str, Any]
    classes: list[str]
    data_digest: NotRequired[str]  # `Dataset.digest`; earlier versions did not save it
    init_sha256: NotRequired[str | None]  # `state_dict_sha256` of the weights of `--init`; as above
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
    # released here: Python 3.12 crashes when it frees a `BytesIO` and a view of it that a traceback refers to
    with buffer.getbuffer() as content:
        _write_checkpoint(path, links, content)


def _write_checkpoint(path: Path, links: Sequence[Path], content: memoryview) -> None:
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
    if not os.path.lexists(path):
        raise CheckpointError(f"checkpoint {path} does not exist", "specify a run folder, .pt or .safetensors file")
    try:
        state = read_checkpoint(path, allow_foreign)
    except CheckpointError as error:
        previous = _previous_path(path)
        if not os.path.isfile(previous):
            raise
        state = read_checkpoint(previous, allow_foreign)
        warnings.warn(f"{error.problem}; {previous.name} is used instead", UserWarning, stacklevel=2)
    return cast(TrainingCheckpoint, state)


def load_any_checkpoint(path: Path, arch: str | None) -> ModelCheckpoint:
    """Load a checkpoint of fastcifar, or weights of another project, to which a recipe with `arch` is added.

    Raises `CheckpointError` if a fastcifar checkpoint has another architecture than `arch`, or if `arch` is None for
    weights of another project, which do not name their architecture.
    """
    state = cast(dict[str, Any], load_checkpoint(path, allow_foreign=True))
    if is_fastcifar_checkpoint(state):
        saved_arch = state["recipe"].get("arch", "")
        if arch not in (None, saved_arch):
            raise CheckpointError(f"{path} contains {saved_arch}, not {arch}", "remove --arch")
        dataset = state["recipe"].get("dataset", "cifar10")
        if "classes" not in state:  # a .safetensors file of an earlier version
            state["classes"] = DATASETS[dataset if dataset in DATASETS else "cifar10"].default_class_names
        return cast(ModelCheckpoint, state)
    weights, ema = find_weights(state, path)
    if arch is None and active_objects().model is not None:
        arch = object_name(active_objects().model)
    matches = matching_architectures(weights, None if arch is None else [arch])
    if arch is None:
        names = list(dict.fromkeys(name for name, _ in matches))
        remedy = f"set --arch {' or '.join(names)}" if names else "set --arch; no known architecture matches"
        raise CheckpointError(f"{path} does not name the architecture of its weights", remedy)
    dataset = next((dataset for _, dataset in matches), "cifar10")
    recipe = {"arch": arch, "dataset": dataset}
    return {"recipe": recipe, "classes": DATASETS[dataset].default_class_names, "model": weights, "ema": ema}


def find_weights(state: dict[str, Any], path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """Return the weights in a checkpoint of another project, without prefixes of their keys, and the EMA weights."""
    found = [state, *(state[key] for key in WEIGHTS_KEYS if key in state)]
    candidates = [_remove_common_prefix(weights) for weights in found if isinstance(weights, dict)]
    weights = next((weights for weights in candidates if weights and _is_state_dict(weights)), None)
    if weights is None:
        keys = ", ".join(sorted(map(repr, state))[:6]) or "none"
        raise CheckpointError(
            f"{path} contains no weights; its keys: {keys}",
            f"specify a run folder, its checkpoint, a state dict, or a dict with one as {', '.join(WEIGHTS_KEYS)}",
        )
    ema = _remove_common_prefix(state.get("state_dict_ema"))
    return weights, ema if _is_state_dict(ema) else None


def _is_state_dict(weights: Any) -> bool:
    return isinstance(weights, dict) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in weights.items()
    )


def _remove_common_prefix(weights: Any) -> Any:
    """Remove the prefix that all keys of a state dict share, such as `model.`, and the counter of `AveragedModel`.

    Every architecture has keys that differ in their first part.
    """
    if not _is_state_dict(weights):
        return weights
    weights = {strip_wrapper_prefixes(key): value for key, value in weights.items() if key != "n_averaged"}
    while len(prefixes := {key.partition(".")[0] for key in weights}) == 1 and all("." in key for key in weights):
        weights = {key.removeprefix(f"{min(prefixes)}."): value for key, value in weights.items()}
    return weights


def matching_architectures(weights: dict[str, Tensor], archs: Iterable[str] | None = None) -> list[tuple[str, str]]:
    """Return those of `archs`, each with the data set of its number of classes, of the keys and shapes of `weights`.

    By default, all are tried. Wrapper prefixes and the counters of BatchNorm are ignored.
    """
    shapes = {strip_wrapper_prefixes(key): value.shape for key, value in weights.items()}
    matches = []
    for arch, dataset in itertools.product(architecture_names() if archs is None else archs, DATASETS):
        find_architecture(arch)
        try:
            state = build_for_inspection(arch, DATASETS[dataset].num_classes).state_dict()
        except UsageError:  # a network with a fixed number of classes does not match the other data set
            continue
        if _without_counters(shapes) == _without_counters({key: value.shape for key, value in state.items()}):
            matches.append((arch, dataset))
    return matches


def _without_counters(state: Mapping[str, T]) -> dict[str, T]:
    """Return `state` without the counters of batches in BatchNorm, which files of old versions of torch lack."""
    return {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}


def read_checkpoint(path: Path, allow_foreign: bool = False) -> dict[str, Any]:
    """Read one checkpoint file and verify it against the manifest, if there is one.

    `allow_foreign`: also accept a dict that is not a fastcifar checkpoint.
    """
    try:
        content = read_regular_file(path, MAX_CHECKPOINT_BYTES)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    valid_digests = {entry["sha256"] for entry in read_manifest(path.parent).values()}
    if valid_digests and hashlib.sha256(content).hexdigest() not in valid_digests:
        raise CheckpointError(f"{path} is damaged: the SHA-256 of its {len(content):,} bytes is not in {MANIFEST_NAME}")
    state = parse_checkpoint(content, path)
    if not (allow_foreign or is_fastcifar_checkpoint(state)):
        raise CheckpointError(f"{path} has no model and recipe", "specify a fastcifar run folder or checkpoint")
    if is_fastcifar_checkpoint(state):
        classes = state.get("classes", [])
        names = [*classes, *state["recipe"]] if isinstance(classes, list) else [None]
        is_valid = _is_state_dict(state["model"]) and (state.get("ema") is None or _is_state_dict(state["ema"]))
        if not (is_valid and all(isinstance(name, str) for name in names)):
            raise CheckpointError(f"{path} is damaged: its model, recipe or classes are of another type")
        state["recipe"] = upgrade_options(state["recipe"])
    return state


def is_fastcifar_checkpoint(state: dict[str, Any]) -> bool:
    """Return whether fastcifar wrote the file with the content `state`."""
    return {"model", "recipe"} <= state.keys() and isinstance(state["recipe"], dict)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of `folder`, file name -> {bytes, sha256}; empty if it is missing or damaged."""
    entries = read_json_object(folder / MANIFEST_NAME).items()
    return {name: entry for name, entry in entries if isinstance(entry, dict) and "sha256" in entry}


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    write_atomically(folder / MANIFEST_NAME, json.dumps(manifest, indent=1).encode())


def resolve_checkpoint_path(run_or_file: str, which: str = "last") -> Path:
    """Return the file of `pretrained:NAME`, the path `run_or_file` or, if it is a folder, that of a checkpoint in it.

    `which` is "last" or "best". Raises `CheckpointError` for an unknown NAME.
    """
    if is_pretrained(run_or_file):
        return pretrained_path(run_or_file)
    path = Path(run_or_file)
    return path / "checkpoints" / f"{which}.pt" if os.path.isdir(path) else path


def check_weights(
    model: nn.Module, weights: dict[str, Tensor], source: object, ignored: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Return `weights` by the keys of `model`, which may be on the meta device; messages call the file `source`.

    The key prefixes of DataParallel and torch.compile are removed, and so are the keys `ignored`. If no counter of
    batches is saved, those of `model` are returned. Raises `CheckpointError`, which names the keys, if keys are missing
    or unexpected or shapes differ.
    """
    weights = {strip_wrapper_prefixes(key): value for key, value in weights.items()}
    expected, weights = ({k: v for k, v in part.items() if k not in ignored} for part in (model.state_dict(), weights))
    if len(_without_counters(weights)) == len(weights):
        weights = {**{key: expected[key] for key in expected.keys() - _without_counters(expected).keys()}, **weights}
    missing, unexpected = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    mismatched = sorted(key for key in expected.keys() & weights.keys() if expected[key].shape != weights[key].shape)
    problems = [
        f"{problem} {', '.join(keys[:3])}" + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
        for problem, keys in (("lacks", missing), ("has unexpected", unexpected), ("has other shapes for", mismatched))
        if keys
    ]
    if problems:
        raise CheckpointError(f"{source} {', '.join(problems)}", "check the architecture")
    return weights


def load_weights(model: nn.Module, weights: dict[str, Tensor], source: object) -> None:
    """Load `weights` after `check_weights`."""
    model.load_state_dict(check_weights(model, weights, source), strict=True)


def strip_wrapper_prefixes(key: str) -> str:
    """Return `key` without the prefixes that DataParallel and torch.compile add."""
    return re.sub(r"^(_orig_mod\.|module\.)+", "", key)


def state_dict_sha256(state_dict: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the names and values (parameters and buffers) of a state dict."""
    digest = hashlib.sha256()
    for name, value in state_dict.items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
