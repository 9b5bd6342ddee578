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
from fastcifar.data.normalization import normalization_name
from fastcifar.errors import NonFiniteError
from fastcifar.evaluation import metrics
from fastcifar.evaluation.load_run import LoadedRun, load_model
from fastcifar.training.build_data import split_validation
from fastcifar.training.evaluate import VIEWS, compute_scores, evaluate, predict_logits, reliability_bins

if TYPE_CHECKING:
    from fastcifar.evaluation.robustness import RobustnessEval

NOT_EVALUATED = {"shifted": None, "corruptions": None}


def evaluate_run(
    run: str,
    eval_weights: str | None = None,
    arch: str | None = None,
    *,
    plots_dir: Path | None = None,
    shifted_dir: Path | None = None,
    with_corruptions: bool = False,
    console: Console | None = None,
    **overrides: Any,
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
    found = load_model(run, eval_weights, arch, **overrides)
    data = found.load_dataset()
    if plots_dir is not None:
        plotting.create_plots_dir(plots_dir)
    tta, tests = found.recipe.tta, len(data.test.labels)
    held_out, missing = _validation_split(found, data.train)
    images = tests * (1 + len(VIEWS[tta]) * (tta != "none")) + len(held_out.labels)
    beyond = _build_robustness_eval(shifted_dir, with_corruptions, found.classes)
    images += beyond.num_images(tests) if beyond else 0
    found.compile_for(images)
    logits, labels = _predict_finite_logits(found, data.test)
    scores = asdict(compute_scores(logits, labels))
    views = evaluate(found.model, found.forward, data.test, found.device, tta).accuracy if tta != "none" else None
    temperature = None if missing else metrics.fit_temperature(*_predict_finite_logits(found, held_out))
    if plots_dir is not None:
        _save_plots(plots_dir, logits, labels, list(data.classes), temperature)
    return {
        "test_acc": scores.pop("accuracy"),
        "test_acc_tta": views,
        "tta": tta,
        "test_loss": scores.pop("loss"),
        **scores,
        "per_class": dict(zip(data.classes, scores["per_class"], strict=True)),
        **_compute_metrics(logits, labels, list(data.classes), temperature),
        "temperature_missing": missing or (None if temperature else "none is best on the validation split"),
        **(beyond.evaluate(found, data.test, console) if beyond else NOT_EVALUATED),
        "plots": str(plots_dir) if plots_dir else None,
        **_evaluation_settings(found, data.source),
    }


def _build_robustness_eval(
    shifted_dir: Path | None, with_corruptions: bool, classes: list[str]
) -> RobustnessEval | None:
    """What else is asked for, read before anything is measured. Errors: `DataError`."""
    if not shifted_dir and not with_corruptions:
        return None
    from fastcifar.evaluation import robustness

    return robustness.RobustnessEval(
        robustness.load_cifar10_1(shifted_dir, classes) if shifted_dir else None, with_corruptions
    )


def _compute_metrics(logits: Tensor, labels: Tensor, classes: list[str], temperature: float | None) -> dict[str, Any]:
    """What follows from the test set's logits: see `metrics`. By class name: `precision_per_class` and so on.

    `confusion`: rows are labels, columns predictions, in the order of `classes`. `reliability`: the bins of `ece`.
    `loss_scaled`, `ece_scaled`: at the temperature, None without one.
    """
    counts = metrics.compute_confusion_matrix(logits, labels)
    by_class = asdict(metrics.per_class_metrics(counts))
    scaled = compute_scores(logits.double() / temperature, labels) if temperature else None
    return {
        "test_acc_interval": metrics.wilson_interval(int(counts.trace()), len(labels)),
        **{f"{name}_per_class": dict(zip(classes, values, strict=True)) for name, values in by_class.items()},
        "confusion": counts.tolist(),
        "classes": classes,
        "brier": metrics.brier_score(logits, labels),
        "reliability": [cell._asdict() for cell in reliability_bins(logits, logits.argmax(1) == labels)],
        "temperature": temperature,
        "loss_scaled": scaled.loss if scaled else None,
        "ece_scaled": scaled.ece if scaled else None,
    }


def _validation_split(loaded: LoadedRun, train: Split) -> tuple[Split, str]:
    """The validation split of the run, or none and why there is none."""
    recipe, nothing = loaded.recipe, Split(train.images[:0], train.labels[:0])
    if loaded.weights == "published":
        return nothing, "the file does not say what it was not trained on"
    if recipe.val_size == 0:
        return nothing, "the run had no validation split"
    if recipe.val_size >= len(train.labels):
        return nothing, f"{recipe.val_size:,} images were held out, and this data set trains on {len(train.labels):,}"
    return split_validation(train, recipe.val_size, recipe.val_seed)[1], ""


def _predict_finite_logits(loaded: LoadedRun, split: Split) -> tuple[Tensor, Tensor]:
    """float32 logits [n, classes] and int64 labels [n]. Errors: `NonFiniteError`."""
    logits = predict_logits(loaded.model, loaded.forward, split, loaded.device)
    if not torch.isfinite(logits).all():
        raise NonFiniteError("the network gives logits that are not finite", "use --precision fp32, or other weights")
    return logits, torch.from_numpy(split.labels)


def _save_plots(folder: Path, logits: Tensor, labels: Tensor, classes: list[str], temperature: float | None) -> None:
    """reliability.png and confusion.png."""
    hits = logits.argmax(1) == labels
    curves = {"as trained": reliability_bins(logits, hits)}
    if temperature:
        curves[f"at temperature {temperature:.2f}"] = reliability_bins(logits.double() / temperature, hits)
    plotting.plot_reliability_diagram(folder / "reliability.png", curves)
    plotting.plot_confusion_matrix(
        folder / "confusion.png", metrics.compute_confusion_matrix(logits, labels).numpy(), classes
    )


def _evaluation_settings(loaded: LoadedRun, source: str) -> dict[str, Any]:
    return {
        "arch": loaded.recipe.arch,
        "eval_weights": loaded.weights,
        "checkpoint": str(loaded.checkpoint_path),
        "data": source,
        "device": loaded.execution.device,
        "precision": loaded.execution.precision,
        "normalize": normalization_name(loaded.recipe),
    }
