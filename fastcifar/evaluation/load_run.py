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
from fastcifar.data.normalization import normalization_mean_std
from fastcifar.device import ExecutionPlan, choose_execution
from fastcifar.errors import CheckpointError, DataError, UsageError, lookup
from fastcifar.recipe import Recipe
from fastcifar.training import checkpoint, compilation, source_checkpoints
from fastcifar.training.build import to_channels_last
from fastcifar.training.evaluate import EVAL_BATCH_SIZE, MIN_IMAGES_TO_COMPILE, VIEWS, optimize_forward
from fastcifar.training.resolve import model_from_recipe
from fastcifar.training.step import Forward, build_forward

EVAL_WEIGHTS: dict[str, None] = dict.fromkeys(("last", "best", "ema"))
# What a recipe says of the machine it was trained on and of the files of its run is nothing to the one that asks.
RESET_ON_LOAD = {"compile": None, "cuda_graph": None, "fused_ops": False, "loader": "auto", "out": None, "tta": "none"}


@dataclass
class LoadedRun:
    """A network with its weights on its device. `forward`: uint8 images [b,3,32,32] -> float32 logits [b,classes]."""

    recipe: Recipe
    execution: ExecutionPlan
    device: torch.device
    classes: list[str]
    model: nn.Module
    forward: Forward
    checkpoint_path: Path
    weights: str  # "last", "best", "ema" or "published"

    def load_dataset(self) -> Dataset:
        """The data set of the recipe. Errors: those of `cifar.load`, `DataError` for one of other classes."""
        found = cifar.load_dataset(self.recipe.data, self.recipe.dataset)
        if list(found.classes) != self.classes:
            problem = f"{self.checkpoint_path} was trained on other classes than {found.source} has"
            raise DataError(problem, "give its own data set")
        return found

    def compile_for(self, num_images: int) -> None:
        """Makes `forward` as fast as `images` of them repay: compiled from COMPILE_FROM on, captured from a batch on.

        Asking for either (`--compile`, `--cuda-graph`) or refusing it decides instead.
        """
        asked, choice = self.recipe, self.execution
        if asked.compile is None and choice.compile and num_images < MIN_IMAGES_TO_COMPILE:
            reason = f"{num_images:,} images do not repay it, {MIN_IMAGES_TO_COMPILE:,} would"
            choice = replace(choice, compile=False, reasons={**choice.reasons, "compile": reason})
        if asked.cuda_graph is None and choice.cuda_graph and num_images < EVAL_BATCH_SIZE:
            reason = "less than a batch of images"
            choice = replace(choice, cuda_graph=False, reasons={**choice.reasons, "cuda_graph": reason})
        self.execution = choice
        self.forward = optimize_forward(
            self.model, self.forward, self.device, choice.compile, choice.cuda_graph, asked.compile_mode
        )


def load_model(run: str, eval_weights: str | None = None, arch: str | None = None, **overrides: Any) -> LoadedRun:
    """`run`, a run folder or a checkpoint file, ours or of a source project.

    `weights`: "last", "best" or "ema" (default: the recipe's). `arch`: the network of a file that does not say it.
    `changes`: of the recipe's knobs; None keeps the recipe's. Errors: `CheckpointError`, `DeviceError`, `UsageError`.
    """
    path = checkpoint.resolve_checkpoint_path(run, "last")
    saved = source_checkpoints.load_any_checkpoint(path, arch)
    which = eval_weights or str(saved["recipe"].get("eval_weights", "last"))
    if which == "best":
        path = checkpoint.resolve_checkpoint_path(run, "best")
        saved = source_checkpoints.load_any_checkpoint(path, arch)
    asked = {key: value for key, value in overrides.items() if value is not None}
    lookup(EVAL_WEIGHTS, which, "weights")
    Recipe.from_dict(asked)  # so that what is wrong with a knob that was asked for is not blamed on the file
    try:
        recipe = Recipe.from_dict({**saved["recipe"], **RESET_ON_LOAD, **asked})
    except UsageError as error:
        raise CheckpointError(f"{path}: {error}") from None
    lookup(VIEWS, recipe.tta, "test-time augmentation")
    choice = choose_execution(recipe)
    device = torch.device(choice.device)
    if device.type == "cpu":
        compilation.keep_freed_memory()
    if choice.compile:
        compilation.enable_compile_cache()
    model = model_from_recipe(recipe, len(saved["classes"]))
    state = saved["ema"] if which == "ema" else saved["model"]
    if state is None:
        raise CheckpointError(
            f"{path} holds no average of the weights", "use --eval-weights last, or train with --ema-decay"
        )
    checkpoint.load_weights(model, state, path)
    forward = build_forward(
        to_channels_last(model, device).eval(), *normalization_mean_std(recipe), choice.precision, device
    )
    return LoadedRun(
        recipe=recipe,
        execution=choice,
        device=device,
        classes=saved["classes"],
        model=model,
        forward=forward,
        checkpoint_path=path,
        weights=which if "format" in saved else "published",
    )
