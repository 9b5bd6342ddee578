"""`fastcifar eval`: a finished run measured on the test set."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastcifar.data import cifar
from fastcifar.errors import DataError
from fastcifar.results.rebuilt import rebuild
from fastcifar.training.evaluate import evaluate
from fastcifar.training.parts import normalisation_name


def judge(run: str, weights: str | None = None, arch: str | None = None, **changes: Any) -> dict[str, Any]:
    """The test set through `run`; the arguments are `rebuild`'s.

    Returns `test_acc` (a fraction), `test_loss` (nats), `correct`, `total`, `ece`, `per_class` and what they were
    measured with. Errors: `CheckpointError`, `DataError`, `DeviceError`, `UsageError`.
    """
    found = rebuild(run, weights, arch, **changes)
    data = cifar.load(found.recipe.data, found.recipe.dataset)
    if list(data.classes) != found.classes:
        raise DataError(f"{found.path} was trained on other classes than {data.source} has", "give its own data set")
    scores = asdict(evaluate(found.model, found.forward, data.test, found.device))
    return {
        "test_acc": scores.pop("accuracy"),
        "test_loss": scores.pop("loss"),
        **scores,
        "per_class": dict(zip(data.classes, scores["per_class"], strict=True)),
        "arch": found.recipe.arch,
        "weights": found.weights,
        "checkpoint": str(found.path),
        "data": data.source,
        "device": found.choice.device,
        "precision": found.choice.precision,
        "normalise": normalisation_name(found.recipe),
    }
