"""`fastcifar eval`: a finished run, rebuilt from its checkpoint alone and measured on the test set.

The network, its normalisation and the data set are the checkpoint's own recipe; only where and how it runs may differ.
A checkpoint of a source project holds no recipe: the architecture is named, the rest is known from it.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from fastcifar.data import cifar
from fastcifar.device import choose
from fastcifar.errors import CheckpointError, DataError, UsageError
from fastcifar.recipe import Recipe
from fastcifar.training import checkpoint, published
from fastcifar.training.evaluate import evaluate
from fastcifar.training.parts import network, normalisation, normalisation_name, place
from fastcifar.training.step import forward_pass

# Knobs that only training knows, as they are without it.
ONLY_TO_TRAIN = {"cuda_graph": False, "compile": False, "fused_ops": False}


def judge(run: str, weights: str | None = None, arch: str | None = None, **changes: Any) -> dict[str, Any]:
    """The test set through `run`, a run folder or a checkpoint file, ours or of a source project.

    `weights`: "last", "best" or "ema" (default: the recipe's). `arch`: the network of a file that does not say it.
    `changes`: data, device, precision, normalise, max_params; None keeps the recipe's. Returns `test_acc` (a fraction),
    `test_loss` (nats), `correct`, `total`, `ece`, `per_class` and what they were measured with.
    Errors: `CheckpointError`, `DataError`, `DeviceError`, `UsageError`.
    """
    path = checkpoint.find(run, "last")
    saved = published.load(path, arch)
    which = weights or str(saved["recipe"].get("weights", "last"))
    if which == "best":
        path = checkpoint.find(run, "best")
        saved = published.load(path, arch)
    asked = {key: value for key, value in changes.items() if value is not None}
    try:
        recipe = Recipe.checked({**saved["recipe"], **asked, **ONLY_TO_TRAIN})
    except UsageError as error:
        raise CheckpointError(f"{path}: {error}") from None
    choice = choose(recipe)
    device = torch.device(choice.device)
    model = network(recipe, len(saved["classes"]))
    state = saved["ema"] if which == "ema" else saved["model"]
    if state is None:
        raise CheckpointError(f"{path} holds no average of the weights", "use --weights last, or train with --ema")
    checkpoint.load_weights(model, state, path)
    forward = forward_pass(place(model, device), *normalisation(recipe), choice.precision, device)
    data = cifar.load(recipe.data, recipe.dataset)
    if list(data.classes) != saved["classes"]:
        raise DataError(f"{path} was trained on other classes than {data.source} has", "give its own data set")
    scores = asdict(evaluate(model, forward, data.test, device))
    return {
        "test_acc": scores.pop("accuracy"),
        "test_loss": scores.pop("loss"),
        **scores,
        "per_class": dict(zip(data.classes, scores["per_class"], strict=True)),
        "arch": recipe.arch,
        "weights": which if "format" in saved else "published",
        "checkpoint": str(path),
        "data": data.source,
        "device": choice.device,
        "precision": choice.precision,
        "normalise": normalisation_name(recipe),
    }
