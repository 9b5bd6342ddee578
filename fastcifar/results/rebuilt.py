"""A finished run rebuilt from its checkpoint alone, ready to infer.

The network and its normalisation are the checkpoint's own recipe; only where and how it runs may differ. A checkpoint
of a source project holds no recipe: the architecture is named, the rest is known from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastcifar.device import Choice, choose
from fastcifar.errors import CheckpointError, UsageError
from fastcifar.recipe import Recipe
from fastcifar.training import checkpoint, published
from fastcifar.training.parts import network, normalisation, place
from fastcifar.training.step import Forward, forward_pass


@dataclass(frozen=True)
class Rebuilt:
    """A network with its trained weights, in evaluation mode, on its device.

    forward  uint8 images [n,3,32,32] -> float32 logits [n,classes]
    weights  "last", "best" or "ema"; "published" for a source project's
    path     the checkpoint they are from
    """

    recipe: Recipe
    choice: Choice
    device: torch.device
    model: nn.Module
    forward: Forward
    classes: list[str]
    weights: str
    path: Path


def rebuild(run: str, weights: str | None = None, arch: str | None = None, **changes: Any) -> Rebuilt:
    """The network of `run`, a run folder or a checkpoint file, ours or of a source project.

    `weights`: "last", "best" or "ema" (default: the recipe's). `arch`: the network of a file that does not say it.
    `changes`: knobs such as data, device, precision, normalise, max_params; None keeps the recipe's.
    Errors: `CheckpointError`, `DeviceError`, `UsageError`.
    """
    path = checkpoint.find(run, "last")
    saved = published.load(path, arch)
    which = weights or str(saved["recipe"].get("weights", "last"))
    if which == "best":
        path = checkpoint.find(run, "best")
        saved = published.load(path, arch)
    asked = {key: value for key, value in changes.items() if value is not None}
    try:
        recipe = Recipe.checked({**saved["recipe"], "cuda_graph": False, "compile": False, **asked})
    except UsageError as error:
        raise CheckpointError(f"{path}: {error}") from None
    choice = choose(recipe)
    device = torch.device(choice.device)
    model = network(recipe, len(saved["classes"]))
    state = saved["ema"] if which == "ema" else saved["model"]
    if state is None:
        raise CheckpointError(f"{path} holds no average of the weights", "use --weights last, or train with --ema")
    checkpoint.load_weights(model, state, path)
    forward = forward_pass(place(model, device).eval(), *normalisation(recipe), choice.precision, device)
    which = which if "format" in saved else "published"
    return Rebuilt(recipe, choice, device, model, forward, saved["classes"], which, path)
