"""`fastcifar eval`: a finished run, rebuilt from its checkpoint alone and measured on the test set.

It measures and says by what; the network comes from `finished`, the table from `report`.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastcifar.data import cifar
from fastcifar.errors import DataError
from fastcifar.results.finished import rebuild
from fastcifar.training.evaluate import VIEWS, evaluate
from fastcifar.training.parts import normalisation_name


def judge(run: str, weights: str | None = None, arch: str | None = None, **changes: Any) -> dict[str, Any]:
    """The test set through `run`; the arguments are `rebuild`'s.

    `weights`: "last", "best" or "ema" (default: the recipe's). `arch`: the network of a file that does not say it.
    `changes`: data, device, precision, normalise, max_params, tta; None keeps the recipe's. Returns `test_acc` (a
    fraction), `test_acc_tta` (over the views of `tta`, None without), `test_loss` (nats), `correct`, `total`, `ece`,
    `per_class` and what they were measured with. Errors: `CheckpointError`, `DataError`, `DeviceError`, `UsageError`.
    """
    found = rebuild(run, weights, arch, **changes)
    data = cifar.load(found.recipe.data, found.recipe.dataset)
    if list(data.classes) != found.classes:
        problem = f"{found.checkpoint} was trained on other classes than {data.source} has"
        raise DataError(problem, "give its own data set")
    tta = found.recipe.tta
    found.hurry(len(data.test.labels) * (1 + len(VIEWS[tta]) * (tta != "none")))
    scores = asdict(evaluate(found.model, found.forward, data.test, found.device))
    views = None
    if tta != "none":
        views = evaluate(found.model, found.forward, data.test, found.device, tta).accuracy
    return {
        "test_acc": scores.pop("accuracy"),
        "test_acc_tta": views,
        "tta": tta,
        "test_loss": scores.pop("loss"),
        **scores,
        "per_class": dict(zip(data.classes, scores["per_class"], strict=True)),
        "arch": found.recipe.arch,
        "weights": found.weights,
        "checkpoint": str(found.checkpoint),
        "data": data.source,
        "device": found.choice.device,
        "precision": found.choice.precision,
        "normalise": normalisation_name(found.recipe),
    }
