"""Evaluate a trained network on the test set: the implementation of `fastcifar eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypedDict

import torch
from rich.console import Console
from torch import Tensor

from fastcifar import plotting
from fastcifar.data.cifar import Split
from fastcifar.data.normalization import normalization_name
from fastcifar.evaluation import metrics
from fastcifar.evaluation.load_run import LoadedRun, load_model
from fastcifar.evaluation.robustness import (
    NUM_CORRUPTED_TEST_SETS,
    CorruptionsResult,
    ShiftedResult,
    evaluate_corruptions,
    evaluate_shifted,
    load_cifar10_1,
)
from fastcifar.training.build import split_validation
from fastcifar.training.evaluate import VIEWS, compute_scores, reliability_bins

PerClass = dict[str, float | None]  # class name -> fraction, None where it is undefined


class LogitMetrics(TypedDict):
    """The metrics that follow from the logits and labels of the test set. Accuracies are fractions, losses in nats."""

    test_acc: float
    test_acc_interval: tuple[float, float]  # 95 % confidence interval
    test_loss: float
    correct: int
    total: int
    ece: float
    per_class: PerClass  # accuracy
    precision_per_class: PerClass
    recall_per_class: PerClass
    f1_per_class: PerClass
    confusion: list[list[int]]  # a row for each label and a column for each predicted class
    classes: list[str]
    brier: float
    reliability: list[dict[str, float | None]]  # the bins of the calibration error `ece`
    temperature: float | None
    loss_scaled: float | None  # after temperature scaling
    ece_scaled: float | None


class EvalResult(LogitMetrics):
    """The document of `fastcifar eval --json`."""

    test_acc_tta: float | None  # with the test-time augmentation `tta`
    tta: str
    temperature_missing: str | None  # the reason why there is no temperature
    shifted: ShiftedResult | None
    corruptions: CorruptionsResult | None
    plots: str | None
    arch: str
    eval_weights: str
    checkpoint: str
    data: str
    device: str
    precision: str
    normalize: str


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
) -> EvalResult:
    """Evaluate the network of `run` on the test set.

    run, eval_weights, arch, overrides  as for `load_model`
    plots_dir                           folder for the plots reliability.png and confusion.png
    shifted_dir                         folder with the files of CIFAR-10.1, evaluated in addition
    with_corruptions                    whether to evaluate on the corrupted test set in addition

    Raises `DataError` for an invalid data set, `NonFiniteError` if the logits contain NaN or infinity, `DiskError` if
    a plot cannot be written, and the errors of `load_model`.
    """
    loaded = load_model(run, eval_weights, arch, **overrides)
    data, tta, classes = loaded.load_dataset(), loaded.recipe.tta, loaded.classes
    if plots_dir is not None:
        plotting.create_plots_dir(plots_dir)
    shifted = load_cifar10_1(shifted_dir, classes) if shifted_dir else None
    validation, temperature_missing = _validation_split(loaded, data.train)
    num_passes = 1 + len(VIEWS[tta]) * (tta != "none") + NUM_CORRUPTED_TEST_SETS * with_corruptions
    extra_sets = [validation, shifted[1]] if shifted else [validation]
    loaded.compile_for(num_passes * len(data.test.labels) + sum(len(split.labels) for split in extra_sets))
    logits, labels = loaded.predict_logits(data.test), torch.from_numpy(data.test.labels)
    temperature = None
    if not temperature_missing:
        validation_logits = loaded.predict_logits(validation)
        temperature = metrics.fit_temperature(validation_logits, torch.from_numpy(validation.labels))
        low, high = metrics.TEMPERATURE_RANGE
        temperature_missing = f"no temperature from {low:g} to {high:g} minimizes the loss on the validation split"
    if plots_dir is not None:
        _save_plots(plots_dir, logits, labels, classes, temperature)
    return {
        **_compute_metrics(logits, labels, classes, temperature),
        "test_acc_tta": loaded.evaluate(data.test, tta).accuracy if tta != "none" else None,
        "tta": tta,
        "temperature_missing": None if temperature else temperature_missing,
        "shifted": evaluate_shifted(loaded, *shifted) if shifted else None,
        "corruptions": evaluate_corruptions(loaded, data.test, console) if with_corruptions else None,
        "plots": str(plots_dir) if plots_dir else None,
        "arch": loaded.recipe.arch,
        "eval_weights": loaded.weights,
        "checkpoint": str(loaded.checkpoint_path),
        "data": data.source,
        "device": loaded.execution.device,
        "precision": loaded.execution.precision,
        "normalize": normalization_name(loaded.recipe),
    }


def _compute_metrics(logits: Tensor, labels: Tensor, classes: list[str], temperature: float | None) -> LogitMetrics:
    def by_class(values: list[float | None]) -> PerClass:
        return dict(zip(classes, values, strict=True))

    scores = compute_scores(logits, labels)
    scaled = compute_scores(logits.double() / temperature, labels) if temperature else None
    confusion_matrix = metrics.compute_confusion_matrix(logits, labels)
    precision, recall, f1 = map(by_class, metrics.precision_recall_f1(confusion_matrix))
    return {
        "test_acc": scores.accuracy,
        "test_acc_interval": metrics.wilson_interval(scores.correct, scores.total),
        "test_loss": scores.loss,
        "correct": scores.correct,
        "total": scores.total,
        "ece": scores.ece,
        "per_class": by_class(scores.per_class),
        "precision_per_class": precision,
        "recall_per_class": recall,
        "f1_per_class": f1,
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
    recipe, reason = loaded.recipe, ""
    if loaded.weights == "published":
        reason = "the checkpoint does not record a validation split"
    elif recipe.val_size == 0:
        reason = "the run had no validation split"
    elif recipe.val_size >= len(train.labels):
        sizes = f"{recipe.val_size:,} images, but this data set has only {len(train.labels):,} training images"
        reason = f"the run's validation split has {sizes}"
    return split_validation(train, 0 if reason else recipe.val_size, recipe.val_seed)[1], reason


def _save_plots(folder: Path, logits: Tensor, labels: Tensor, classes: list[str], temperature: float | None) -> None:
    """Write reliability.png and confusion.png."""
    correct = logits.argmax(1) == labels
    curves = {"as trained": reliability_bins(logits, correct)}
    if temperature:
        curves[f"at temperature {temperature:.2f}"] = reliability_bins(logits.double() / temperature, correct)
    plotting.plot_reliability_diagram(folder / "reliability.png", curves)
    confusion_matrix = metrics.compute_confusion_matrix(logits, labels).numpy()
    plotting.plot_confusion_matrix(folder / "confusion.png", confusion_matrix, classes)
