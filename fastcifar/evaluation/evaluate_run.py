"""Evaluate a trained network on the test set: the implementation of `fastcifar eval`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from fastcifar import plotting
from fastcifar.data.cifar import Split
from fastcifar.data.normalization import normalization_name
from fastcifar.errors import NonFiniteError
from fastcifar.evaluation import metrics
from fastcifar.evaluation.load_run import LoadedRun, load_model
from fastcifar.evaluation.robustness import RobustnessEval, load_cifar10_1
from fastcifar.training.build_data import split_validation
from fastcifar.training.evaluate import VIEWS, compute_scores, evaluate, predict_logits, reliability_bins


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
    """Evaluate the network of `run` on the test set.

    run, eval_weights, arch  as for `load_model`
    plots_dir                folder for the plots reliability.png and confusion.png, or None for no plots
    shifted_dir              folder with the files of CIFAR-10.1, evaluated in addition
    with_corruptions         whether to evaluate on the corrupted test set in addition
    overrides                recipe options such as data, device, precision and tta; None keeps the recipe's value

    Returns `test_acc` (a fraction), `test_acc_tta` (averaged over the views of `tta`, or None), `test_loss` (nats),
    `correct`, `total`, `ece`, `per_class`, the entries of `_compute_metrics`, `shifted` and `corruptions` (None unless
    requested), and the settings of the evaluation.
    Raises `DataError` for an invalid data set, `NonFiniteError` if the logits contain NaN or infinity, `DiskError` if
    a plot cannot be written, and the errors of `load_model`.
    """
    loaded = load_model(run, eval_weights, arch, **overrides)
    data = loaded.load_dataset()
    if plots_dir is not None:
        plotting.create_plots_dir(plots_dir)
    tta, num_test_images = loaded.recipe.tta, len(data.test.labels)
    validation, no_temperature_reason = _validation_split(loaded, data.train)
    num_images = num_test_images * (1 + len(VIEWS[tta]) * (tta != "none")) + len(validation.labels)
    shifted_test_set = load_cifar10_1(shifted_dir, loaded.classes) if shifted_dir else None
    robustness_eval = RobustnessEval(shifted_test_set, with_corruptions)
    loaded.compile_for(num_images + robustness_eval.num_images(num_test_images))
    logits, labels = _predict_finite_logits(loaded, data.test)
    scores = asdict(compute_scores(logits, labels))
    tta_scores = evaluate(loaded.model, loaded.forward, data.test, loaded.device, tta) if tta != "none" else None
    temperature = None
    if not no_temperature_reason:
        temperature = metrics.fit_temperature(*_predict_finite_logits(loaded, validation))
        low, high = metrics.TEMPERATURE_RANGE
        no_temperature_reason = f"no temperature from {low:g} to {high:g} minimizes the loss on the validation split"
    if plots_dir is not None:
        _save_plots(plots_dir, logits, labels, loaded.classes, temperature)
    return {
        "test_acc": scores.pop("accuracy"),
        "test_acc_tta": tta_scores.accuracy if tta_scores else None,
        "tta": tta,
        "test_loss": scores.pop("loss"),
        **scores,
        "per_class": dict(zip(loaded.classes, scores["per_class"], strict=True)),
        **_compute_metrics(logits, labels, loaded.classes, temperature),
        "temperature_missing": None if temperature else no_temperature_reason,
        **robustness_eval.evaluate(loaded, data.test, console),
        "plots": str(plots_dir) if plots_dir else None,
        **_evaluation_settings(loaded, data.source),
    }


def _compute_metrics(logits: Tensor, labels: Tensor, classes: list[str], temperature: float | None) -> dict[str, Any]:
    """Compute the metrics that follow from the logits [n, classes] and the labels [n] of the test set.

    `precision_per_class`, `recall_per_class` and `f1_per_class` map class names to values. `confusion` has a row for
    each label and a column for each predicted class, in the order of `classes`. `reliability` lists the bins of `ece`.
    `loss_scaled` and `ece_scaled` are computed after temperature scaling, and None without a temperature.
    """
    confusion_matrix = metrics.compute_confusion_matrix(logits, labels)
    per_class = asdict(metrics.per_class_metrics(confusion_matrix))
    scaled = compute_scores(logits.double() / temperature, labels) if temperature else None
    return {
        "test_acc_interval": metrics.wilson_interval(int(confusion_matrix.trace()), len(labels)),
        **{f"{name}_per_class": dict(zip(classes, values, strict=True)) for name, values in per_class.items()},
        "confusion": confusion_matrix.tolist(),
        "classes": classes,
        "brier": metrics.brier_score(logits, labels),
        "reliability": [item._asdict() for item in reliability_bins(logits, logits.argmax(1) == labels)],
        "temperature": temperature,
        "loss_scaled": scaled.loss if scaled else None,
        "ece_scaled": scaled.ece if scaled else None,
    }


def _validation_split(loaded: LoadedRun, train: Split) -> tuple[Split, str]:
    """Return the validation split of the run and "", or an empty split and the reason why there is none."""
    recipe, empty = loaded.recipe, Split(train.images[:0], train.labels[:0])
    if loaded.weights == "published":
        return empty, "the checkpoint does not record a validation split"
    if recipe.val_size == 0:
        return empty, "the run had no validation split"
    if recipe.val_size >= len(train.labels):
        sizes = f"{recipe.val_size:,} images, but this data set has only {len(train.labels):,} training images"
        return empty, f"the run's validation split has {sizes}"
    return split_validation(train, recipe.val_size, recipe.val_seed)[1], ""


def _predict_finite_logits(loaded: LoadedRun, split: Split) -> tuple[Tensor, Tensor]:
    """Return the float32 logits [n, classes] and int64 labels [n] of a split.

    Raises `NonFiniteError` if the logits contain NaN or infinity.
    """
    logits = predict_logits(loaded.model, loaded.forward, split, loaded.device)
    if not torch.isfinite(logits).all():
        raise NonFiniteError(
            "the logits of the network contain NaN or infinity", "use --precision fp32, or other weights"
        )
    return logits, torch.from_numpy(split.labels)


def _save_plots(folder: Path, logits: Tensor, labels: Tensor, classes: list[str], temperature: float | None) -> None:
    """Write reliability.png and confusion.png."""
    correct = logits.argmax(1) == labels
    curves = {"as trained": reliability_bins(logits, correct)}
    if temperature:
        curves[f"at temperature {temperature:.2f}"] = reliability_bins(logits.double() / temperature, correct)
    plotting.plot_reliability_diagram(folder / "reliability.png", curves)
    confusion_matrix = metrics.compute_confusion_matrix(logits, labels).numpy()
    plotting.plot_confusion_matrix(folder / "confusion.png", confusion_matrix, classes)


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
