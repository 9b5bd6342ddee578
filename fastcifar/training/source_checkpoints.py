"""Loading of checkpoints that the projects on which fastcifar is based have published.

Their files are dicts `{net, acc, epoch}`, some with `optimizer`, or plain state dicts. They do not name the
architecture, so the user does; `data.normalization` defines the normalization that each architecture was trained with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcifar.data.cifar import DATASETS
from fastcifar.errors import CheckpointError
from fastcifar.models import MODELS, build_model
from fastcifar.training import checkpoint


def load_any_checkpoint(path: Path, arch: str | None) -> dict[str, Any]:
    """Load the checkpoint of fastcifar or of a source project at `path`; the latter gets a recipe with `arch`.

    Raises `CheckpointError` if `checkpoint.load_checkpoint` does, if a fastcifar checkpoint has another architecture
    than `arch`, if the file has no weights, or if `arch` is None for a source project's file; the message then names
    the architectures that match.
    """
    state = checkpoint.load_checkpoint(path, allow_foreign=True)
    if checkpoint.is_fastcifar_checkpoint(state):
        saved_arch = state["recipe"].get("arch", "")
        if arch not in (None, saved_arch):
            raise CheckpointError(f"{path} contains {saved_arch}, not {arch}", "remove --arch")
        return state
    weights = state.get("net", state)
    if not isinstance(weights, dict) or not weights or not all(map(_is_state_dict_item, weights.items())):
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
    """Return the names in MODELS whose keys and shapes are those of `weights`, ignoring wrapper prefixes.

    The models are built on the meta device, which allocates no memory.
    """
    shapes = {checkpoint.strip_wrapper_prefixes(key): value.shape for key, value in weights.items()}
    matches = []
    for arch in MODELS:
        with torch.device("meta"):
            state = build_model(arch).state_dict()
        if {key: value.shape for key, value in state.items()} == shapes:
            matches.append(arch)
    return matches


def _is_state_dict_item(item: tuple[object, object]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)
