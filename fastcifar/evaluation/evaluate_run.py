"""Evaluate a trained network on the test set, on CIFAR-10.1 and on corrupted test images: `fastcifar eval`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict, cast

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from fastcifar import plotting
from fastcifar.data.cifar import Split
from fastcifar.data.normalization import normalization_name
from fastcifar.evaluation import metrics
from fastcifar.evaluation.corruptions import CORRUPTIONS, SEVERITIES, Corruption
from fastcifar.evaluation.load_run import LoadedModel, load_model
from fastcifar.evaluation.published_test_sets import (
    BENCHMARK_CORRUPTIONS,
    CorruptedImages,
    load_cifar10_1,
    open_corrupted,
)
from fastcifar.training.evaluate import VIEWS, compute_confusion_matrix, compute_scores, reliability_bins

PerClass = dict[str, float | None]  # class name -> fraction, None where it is undefined
PER_CLASS_METRICS = ("per_class", "precision_per_class", "recall_per_class", "f1_per_class")
CORRUPTION_SEED = 0  # fixed, so that all runs are compared on the same images


class ShiftedResult(TypedDict):
    """The results on a version of CIFAR-10.1."""

    name: str
    acc: float
    acc_interval: tuple[float, float]  # 95 % confidence interval
    correct: int
    total: int
    loss: float
    ece: float


class CorruptionsResult(TypedDict):
    """The accuracies on corrupted test images."""

    source: str  # folder of the official files, or "computed"
    mean_acc: float  # of the benchmark; not the mean corruption error, which is relative to a reference network
    acc: dict[str, list[float]]  # of each corruption by severity
    seed: int | None  # of the random numbers of computed corruptions


class LogitMetrics(TypedDict):
    """The metrics that follow from the logits and labels of the test set. Accuracies are fractions, losses in nats.

    Without a test set they are None or empty.
    """

    test_acc: float | None
    test_acc_interval: tuple[float, float] | None  # 95 % confidence interval
    test_loss: float | None
    correct: int | None
    total: int | None
    ece: float | None
    per_class: PerClass  # accuracy
    precision_per_class: PerClass
    recall_per_class: PerClass
    f1_per_class: PerClass
    confusion: list[list[int]]  # a row for each label and a column for each predicted class
    classes: list[str]
    brier: float | None
    reliability: list[dict[str, float | None]]  # the bins of the calibration error `ece`
    temperature: float | None
    loss_scaled: float | None  # after temperature scaling
    ece_scaled: float | None


class EvalResult(LogitMetrics):
    """The document of `fastcifar eval --json`."""

    val_acc: float | None  # None without the run's validation split
    test_acc_tta: float | None  # with the test-time augmentation `tta`
    tta: str
    temperature_missing: str | None  # the reason why there is no temperature
    shifted: ShiftedResult | None
    corruptions: CorruptionsResult | None  # computed here
    corrupted: CorruptionsResult | None  # official files
    plots: str | None
    arch: str
    eval_weights: str
    checkpoint: str
    data: str
    device: str
    precision: str
    normalize: str


def evaluate_run(
    run: str | LoadedModel,
    eval_weights: str | None = None,
    arch: str | None = None,
    *,
    plots_dir: Path | None = None,
    shifted_dir: Path | None = None,
    with_corruptions: bool = False,
    corrupted_dir: Path | None = None,
    console: Console | None = None,
    **overrides: Any,
) -> EvalResult:
    """Evaluate the network of `run` on the test set, if there is one, and on the validation split of the run.

    The plots reliability.png and confusion.png are written to `plots_dir`. The network is also evaluated on
    CIFAR-10.1 if its folder `shifted_dir` is given, on CIFAR-10-C or CIFAR-100-C in `corrupted_dir`, and on corrupted
    test images if requested. See also `load_model`.
    """
    loaded = run if isinstance(run, LoadedModel) else load_model(run, eval_weights, arch, **overrides)
    data, tta, classes = loaded.load_dataset(), loaded.recipe.tta, loaded.classes
    if plots_dir is not None or with_corruptions:
        data.require_test_set()
    if plots_dir is not None:
        plotting.create_plots_dir(plots_dir)
    shifted = load_cifar10_1(shifted_dir, classes) if shifted_dir else None
    corrupted = open_corrupted(corrupted_dir, classes, loaded.recipe.dataset) if corrupted_dir else None
    validation, temperature_missing = loaded.validation_split(data)
    num_passes = 1 + len(VIEWS[tta]) * (tta != "none") + len(CORRUPTIONS) * len(SEVERITIES) * with_corruptions
    extra_sets = [validation, shifted[1]] if shifted else [validation]
    num_images = sum(len(split.labels) for split in extra_sets) + (corrupted.num_images if corrupted else 0)
    loaded.compile_for(num_passes * len(data.test.labels) + num_images, console)
    labels, validation_labels = torch.from_numpy(data.test.labels), torch.from_numpy(validation.labels)
    logits = loaded.predict_logits(data.test) if len(labels) else torch.empty(0, len(classes))
    temperature = val_acc = None
    if not temperature_missing:
        validation_logits = loaded.predict_logits(validation)
        val_acc = compute_scores(validation_logits, validation_labels).accuracy
        temperature = metrics.fit_temperature(validation_logits, validation_labels)
        low, high = metrics.TEMPERATURE_RANGE
        temperature_missing = f"no temperature from {low:g} to {high:g} minimizes the loss on the validation split"
    if plots_dir is not None:
        _save_plots(plots_dir, logits, labels, classes, temperature)
    return {
        **_compute_metrics(logits, labels, classes, temperature),
        "val_acc": val_acc,
        "test_acc_tta": loaded.evaluate(data.test, tta).accuracy if tta != "none" and len(labels) else None,
        "tta": tta,
        "temperature_missing": None if temperature else temperature_missing,
        "shifted": _evaluate_shifted(loaded, *shifted) if shifted else None,
        "corruptions": _evaluate_corruptions(loaded, data.test, console) if with_corruptions else None,
        "corrupted": _evaluate_corrupted(loaded, corrupted, console) if corrupted else None,
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

    if not len(labels):
        empty = {**{name: {} for name in PER_CLASS_METRICS}, "confusion": [], "reliability": []}
        found = {"classes": classes, "temperature": temperature}
        return cast(LogitMetrics, {**dict.fromkeys(LogitMetrics.__annotations__), **empty, **found})
    scores = compute_scores(logits, labels)
    scaled = compute_scores(logits.double() / temperature, labels) if temperature else None
    confusion_matrix = compute_confusion_matrix(logits, labels)
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


def _save_plots(folder: Path, logits: Tensor, labels: Tensor, classes: list[str], temperature: float | None) -> None:
    """Write reliability.png and confusion.png."""
    correct = logits.argmax(1) == labels
    curves = {"as trained": reliability_bins(logits, correct)}
    if temperature:
        curves[f"at temperature {temperature:.2f}"] = reliability_bins(logits.double() / temperature, correct)
    plotting.plot_reliability_diagram(folder / "reliability.png", curves)
    confusion_matrix = compute_confusion_matrix(logits, labels).numpy()
    plotting.plot_confusion_matrix(folder / "confusion.png", confusion_matrix, classes)


def _evaluate_shifted(loaded: LoadedModel, name: str, split: Split) -> ShiftedResult:
    scores = loaded.evaluate(split)
    return {
        "name": name,
        "acc": scores.accuracy,
        "acc_interval": metrics.wilson_interval(scores.correct, scores.total),
        "correct": scores.correct,
        "total": scores.total,
        "loss": scores.loss,
        "ece": scores.ece,
    }


def _evaluate_corruptions(loaded: LoadedModel, split: Split, console: Console | None) -> CorruptionsResult:
    def accuracy(corruption: Corruption, severity: int) -> float:
        generator = torch.Generator(loaded.device).manual_seed(CORRUPTION_SEED)

        def forward(images: Tensor) -> Tensor:
            return loaded.forward(apply_corruption(images, corruption, severity, generator))

        return replace(loaded, forward=forward).evaluate(split).accuracy

    accuracies = {
        name: [accuracy(CORRUPTIONS[name], severity) for severity in SEVERITIES]
        for name in _track_corruptions(CORRUPTIONS, console)
    }
    mean_acc = float(np.mean(list(accuracies.values())))
    return {"source": "computed", "mean_acc": mean_acc, "acc": accuracies, "seed": CORRUPTION_SEED}


def _evaluate_corrupted(loaded: LoadedModel, files: CorruptedImages, console: Console | None) -> CorruptionsResult:
    accuracies = {
        name: [loaded.evaluate(files.split(name, severity)).accuracy for severity in SEVERITIES]
        for name in _track_corruptions(files.images, console)
    }
    mean_acc = float(np.mean([accuracies[name] for name in BENCHMARK_CORRUPTIONS]))
    return {"source": files.folder, "mean_acc": mean_acc, "acc": accuracies, "seed": None}


def _track_corruptions(names: Iterable[str], console: Console | None) -> Iterable[str]:
    no_progress_bar = console is None or not console.is_terminal
    return track(list(names), "corruptions", console=console, disable=no_progress_bar, transient=True)


def apply_corruption(images: Tensor, corruption: Corruption, severity: int, generator: torch.Generator) -> Tensor:
    """Apply a corruption to uint8 images [n,3,32,32]; return uint8 images in channels_last memory format.

    It is computed in float64, so that all devices agree, and truncated to integers as in CIFAR-10-C.
    """
    corrupted = corruption(images.double() / 255, severity, generator) * 255
    return (corrupted + 1e-6).to(torch.uint8).contiguous(memory_format=torch.channels_last)
