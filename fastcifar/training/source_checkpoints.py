"""Checkpoints of the source projects as checkpoints of ours: their layout, and the rows of `MODELS` they fit.

Their files are `{net, acc, epoch}`, perhaps with `optimizer`, or a bare state dict, and say nothing of the network:
the user names it, and `normalisation` knows what its weights were trained with. Files are read by `checkpoint` alone.
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
    """The checkpoint at `path`, ours or a source project's, which gets a recipe with the architecture `arch`.

    Errors: `CheckpointError` for what `checkpoint.load` refuses, for a file of ours that is not `arch`, for a file
    without weights, and for a published one without `arch`; the message then names the rows that fit.
    """
    state = checkpoint.load_checkpoint(path, allow_foreign=True)
    if checkpoint.is_fastcifar_checkpoint(state):
        own = state["recipe"].get("arch", "")
        if arch not in (None, own):
            raise CheckpointError(f"{path} holds {own}, not {arch}", "leave --arch out")
        return state
    weights = state.get("net", state)
    if not isinstance(weights, dict) or not weights or not all(map(_is_state_dict_item, weights.items())):
        raise CheckpointError(f"{path} holds no weights", "give a run folder, its checkpoint, {net, acc, epoch}, or "
                              "a state dict")  # fmt: skip
    if arch is None:
        rows = matching_architectures(weights)
        remedy = f"give --arch {' or '.join(rows)}" if rows else "give --arch NAME, though no row of `models` fits"
        raise CheckpointError(f"{path} does not say which network its weights are of", remedy)
    return {"recipe": {"arch": arch}, "classes": list(DATASETS["cifar10"].class_names), "model": weights, "ema": None}


def matching_architectures(weights: dict[str, Tensor]) -> list[str]:
    """The rows of `MODELS` whose keys and shapes are those of `weights`, prefixes aside. Nothing is allocated."""
    wanted = {checkpoint.strip_wrapper_prefixes(key): value.shape for key, value in weights.items()}
    rows = []
    for arch in MODELS:
        with torch.device("meta"):
            state = build_model(arch).state_dict()
        if {key: value.shape for key, value in state.items()} == wanted:
            rows.append(arch)
    return rows


def _is_state_dict_item(item: tuple[object, object]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)
