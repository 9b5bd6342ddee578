"""A finished run as a network ready to be asked, rebuilt from its checkpoint alone: what eval and predict begin with.

The network, its normalisation and its classes are the checkpoint's own recipe; only where and how it runs may differ.
A checkpoint of a source project holds no recipe: the architecture is named, the rest is known from it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastcifar.data import cifar
from fastcifar.data.cifar import Dataset
from fastcifar.device import Choice, choose
from fastcifar.errors import CheckpointError, DataError, UsageError, pick
from fastcifar.recipe import Recipe
from fastcifar.training import checkpoint, cuda_graph, source_checkpoints
from fastcifar.training.build_data import normalisation
from fastcifar.training.evaluate import BATCH_SIZE, COMPILE_FROM, VIEWS, fast_forward
from fastcifar.training.step import Forward, forward_pass
from fastcifar.training.trainer import network, place

WEIGHTS: dict[str, None] = dict.fromkeys(("last", "best", "ema"))
# What a recipe says of the machine it was trained on and of the files of its run is nothing to the one that asks.
FORGOTTEN = {"compile": None, "cuda_graph": None, "fused_ops": False, "loader": "auto", "out": None, "tta": "none"}


@dataclass
class Finished:
    """A network with its weights on its device. `forward`: uint8 images [b,3,32,32] -> float32 logits [b,classes]."""

    recipe: Recipe
    choice: Choice
    device: torch.device
    classes: list[str]
    model: nn.Module
    forward: Forward
    checkpoint: Path
    weights: str  # "last", "best", "ema" or "published"

    def data(self) -> Dataset:
        """The data set of the recipe. Errors: those of `cifar.load`, `DataError` for one of other classes."""
        found = cifar.load(self.recipe.data, self.recipe.dataset)
        if list(found.classes) != self.classes:
            problem = f"{self.checkpoint} was trained on other classes than {found.source} has"
            raise DataError(problem, "give its own data set")
        return found

    def hurry(self, images: int) -> None:
        """Makes `forward` as fast as `images` of them repay: compiled from COMPILE_FROM on, captured from a batch on.

        Asking for either (`--compile`, `--cuda-graph`) or refusing it decides instead.
        """
        asked, choice = self.recipe, self.choice
        if asked.compile is None and choice.compile and images < COMPILE_FROM:
            reason = f"{images:,} images do not repay it, {COMPILE_FROM:,} would"
            choice = replace(choice, compile=False, reasons={**choice.reasons, "compile": reason})
        if asked.cuda_graph is None and choice.cuda_graph and images < BATCH_SIZE:
            reason = "less than a batch of images"
            choice = replace(choice, cuda_graph=False, reasons={**choice.reasons, "cuda_graph": reason})
        self.choice = choice
        self.forward = fast_forward(
            self.model, self.forward, self.device, choice.compile, choice.cuda_graph, asked.compile_mode
        )


def rebuild(run: str, weights: str | None = None, arch: str | None = None, **changes: Any) -> Finished:
    """`run`, a run folder or a checkpoint file, ours or of a source project.

    `weights`: "last", "best" or "ema" (default: the recipe's). `arch`: the network of a file that does not say it.
    `changes`: of the recipe's knobs; None keeps the recipe's. Errors: `CheckpointError`, `DeviceError`, `UsageError`.
    """
    path = checkpoint.find(run, "last")
    saved = source_checkpoints.load(path, arch)
    which = weights or str(saved["recipe"].get("weights", "last"))
    if which == "best":
        path = checkpoint.find(run, "best")
        saved = source_checkpoints.load(path, arch)
    asked = {key: value for key, value in changes.items() if value is not None}
    pick(WEIGHTS, which, "weights")
    Recipe.checked(asked)  # so that what is wrong with a knob that was asked for is not blamed on the file
    try:
        recipe = Recipe.checked({**saved["recipe"], **FORGOTTEN, **asked})
    except UsageError as error:
        raise CheckpointError(f"{path}: {error}") from None
    pick(VIEWS, recipe.tta, "test-time augmentation")
    choice = choose(recipe)
    device = torch.device(choice.device)
    if device.type == "cpu":
        cuda_graph.keep_freed_memory()
    if choice.compile:
        cuda_graph.keep_compiled_code()
    model = network(recipe, len(saved["classes"]))
    state = saved["ema"] if which == "ema" else saved["model"]
    if state is None:
        raise CheckpointError(f"{path} holds no average of the weights", "use --weights last, or train with --ema")
    checkpoint.load_weights(model, state, path)
    forward = forward_pass(place(model, device).eval(), *normalisation(recipe), choice.precision, device)
    return Finished(
        recipe=recipe,
        choice=choice,
        device=device,
        classes=saved["classes"],
        model=model,
        forward=forward,
        checkpoint=path,
        weights=which if "format" in saved else "published",
    )
