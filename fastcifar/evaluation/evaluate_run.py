"""`fastcifar eval`: a finished run, rebuilt from its checkpoint alone and measured on the test set.

It measures and says by what; the network comes from `finished`, the figures from `metrics`, the table from `tables`.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor

from fastcifar import plotting
from fastcifar.data.cifar import Split
from fastcifar.errors import NonFiniteError
from fastcifar.evaluation import metrics
from fastcifar.evaluation.load_run import Finished, rebuild
from fastcifar.training.build_data import normalisation_name, split_off
from fastcifar.training.evaluate import VIEWS, evaluate, predict_logits, reliability, score

if TYPE_CHECKING:
    from fastcifar.evaluation.robustness import Beyond

NOT_ASKED = {"shifted": None, "corruptions": None}


def judge(
    run: str,
    weights: str | None = None,
    arch: str | None = None,
    *,
    pictures: Path | None = None,
    shifted: Path | None = None,
    corruptions: bool = False,
    console: Console | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """The test set through `run`; the arguments are `rebuild`'s.

    `weights`: "last", "best" or "ema" (default: the recipe's). `arch`: the network of a file that does not say it.
    `pictures`: a folder for the reliability diagram and the confusion matrix. `shifted`: a folder of CIFAR-10.1.
    `corruptions`: the corrupted test set too. `changes`: data, device, precision, normalise, max_params, tta; None
    keeps the recipe's. Returns `test_acc` (a fraction), `test_acc_tta` (over the views of `tta`, None without),
    `test_loss` (nats), `correct`, `total`, `ece`, `per_class`, what `_figures` adds, `shifted` and `corruptions`
    (None unless asked for) and what they were measured with. Errors: those of `rebuild`, `DataError`,
    `NonFiniteError`, `DiskError`.
    """
    found = rebuild(run, weights, arch, **changes)
    data = found.data()
    if pictures is not None:
        plotting.make_folder(pictures)
    tta, tests = found.recipe.tta, len(data.test.labels)
    held_out, missing = _held_out(found, data.train)
    images = tests * (1 + len(VIEWS[tta]) * (tta != "none")) + len(held_out.labels)
    beyond = _beyond(shifted, corruptions, found.classes)
    images += beyond.images(tests) if beyond else 0
    found.hurry(images)
    logits, labels = _logits(found, data.test)
    scores = asdict(score(logits, labels))
    views = evaluate(found.model, found.forward, data.test, found.device, tta).accuracy if tta != "none" else None
    temperature = None if missing else metrics.temperature(*_logits(found, held_out))
    if pictures is not None:
        _draw(pictures, logits, labels, list(data.classes), temperature)
    return {
        "test_acc": scores.pop("accuracy"),
        "test_acc_tta": views,
        "tta": tta,
        "test_loss": scores.pop("loss"),
        **scores,
        "per_class": dict(zip(data.classes, scores["per_class"], strict=True)),
        **_figures(logits, labels, list(data.classes), temperature),
        "temperature_missing": missing or (None if temperature else "none is best on the validation split"),
        **(beyond.measure(found, data.test, console) if beyond else NOT_ASKED),
        "plots": str(pictures) if pictures else None,
        **_measured_with(found, data.source),
    }


def _beyond(shifted: Path | None, corruptions: bool, classes: list[str]) -> Beyond | None:
    """What else is asked for, read before anything is measured. Errors: `DataError`."""
    if not shifted and not corruptions:
        return None
    from fastcifar.evaluation import robustness

    return robustness.Beyond(robustness.shifted_set(shifted, classes) if shifted else None, corruptions)


def _figures(logits: Tensor, labels: Tensor, classes: list[str], temperature: float | None) -> dict[str, Any]:
    """What follows from the test set's logits: see `metrics`. By class name: `precision_per_class` and so on.

    `confusion`: rows are labels, columns predictions, in the order of `classes`. `reliability`: the bins of `ece`.
    `loss_scaled`, `ece_scaled`: at the temperature, None without one.
    """
    counts = metrics.confusion(logits, labels)
    by_class = asdict(metrics.per_class(counts))
    scaled = score(logits.double() / temperature, labels) if temperature else None
    return {
        "test_acc_interval": metrics.wilson(int(counts.trace()), len(labels)),
        **{f"{name}_per_class": dict(zip(classes, values, strict=True)) for name, values in by_class.items()},
        "confusion": counts.tolist(),
        "classes": classes,
        "brier": metrics.brier(logits, labels),
        "reliability": [cell._asdict() for cell in reliability(logits, logits.argmax(1) == labels)],
        "temperature": temperature,
        "loss_scaled": scaled.loss if scaled else None,
        "ece_scaled": scaled.ece if scaled else None,
    }


def _held_out(found: Finished, train: Split) -> tuple[Split, str]:
    """The validation split of the run, or none and why there is none."""
    recipe, nothing = found.recipe, Split(train.images[:0], train.labels[:0])
    if found.weights == "published":
        return nothing, "the file does not say what it was not trained on"
    if recipe.val_size == 0:
        return nothing, "the run had no validation split"
    if recipe.val_size >= len(train.labels):
        return nothing, f"{recipe.val_size:,} images were held out, and this data set trains on {len(train.labels):,}"
    return split_off(train, recipe.val_size, recipe.val_seed)[1], ""


def _logits(found: Finished, split: Split) -> tuple[Tensor, Tensor]:
    """float32 logits [n, classes] and int64 labels [n]. Errors: `NonFiniteError`."""
    logits = predict_logits(found.model, found.forward, split, found.device)
    if not torch.isfinite(logits).all():
        raise NonFiniteError("the network gives logits that are not finite", "use --precision fp32, or other weights")
    return logits, torch.from_numpy(split.labels)


def _draw(folder: Path, logits: Tensor, labels: Tensor, classes: list[str], temperature: float | None) -> None:
    """reliability.png and confusion.png."""
    hits = logits.argmax(1) == labels
    curves = {"as trained": reliability(logits, hits)}
    if temperature:
        curves[f"at temperature {temperature:.2f}"] = reliability(logits.double() / temperature, hits)
    plotting.reliability_diagram(folder / "reliability.png", curves)
    plotting.confusion_matrix(folder / "confusion.png", metrics.confusion(logits, labels).numpy(), classes)


def _measured_with(found: Finished, source: str) -> dict[str, Any]:
    return {
        "arch": found.recipe.arch,
        "weights": found.weights,
        "checkpoint": str(found.checkpoint),
        "data": source,
        "device": found.choice.device,
        "precision": found.choice.precision,
        "normalise": normalisation_name(found.recipe),
    }
