"""Evaluate a trained network on the test set, on CIFAR-10.1 and on corrupted test images: `fastcifar eval`."""

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
from fastcifar.evaluation.load_run import LoadedModel, ModelDescription, load_model
from fastcifar.evaluation.published_test_sets import (
    BENCHMARK_CORRUPTIONS,
    CorruptedImages,
    load_cifar10_1,
    open_corrupted,
)
from fastcifar.training.evaluate import VIEWS, compute_confusion_matrix, compute_scores, reliability_bins

PerClass = dict[str, float | None]  # class name -> fraction, None where it is undefined
PER_CLASS_METRICS = ("per_class", "precision_per_class", "recall_per_class", "f1_per_class")
METRICS_WITHOUT_TEST_SET = {**{name: {} for name in PER_CLASS_METRICS}, "confusion": [], "reliability": []}
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


class EvalResult(ModelDescription):
    """The document of `fastcifar eval --json`. Accuracies are fractions, losses in nats; None if not measured."""

    test_acc: float | None
    test_acc_interval: tuple[float, float] | None  # 95 % confidence interval
    test_loss: float | None
    correct: int | None
    total: int | None
    ece: float | None
    per_class: PerClass  # accuracy; this and the following metrics of classes and bins are empty without a test set
    precision_per_class: PerClass
    recall_per_class: PerClass
    f1_per_class: PerClass
    confusion: list[list[int]]  # a row for each label and a column for each predicted class
    reliability: list[dict[str, float | None]]  # the bins of the calibration error `ece`
    brier: float | None
    loss_scaled: float | None  # after temperature scaling
    ece_scaled: float | None
    classes: list[str]
    val_acc: float | None  # None without the run's validation split
    temperature: float | None
    temperature_missing: str | None  # the reason why there is no temperature
    test_acc_tta: float | None  # with the test-time augmentation `tta`
    tta: str
    shifted: ShiftedResult | None
    corruptions: CorruptionsResult | None  # computed here
    corrupted: CorruptionsResult | None  # official files
    plots: str | None
    data: str
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
    temperature = val_acc = None
    if not temperature_missing:
        logits, labels = loaded.predict_logits(validation), torch.from_numpy(validation.labels)
        val_acc = compute_scores(logits, labels).accuracy
        temperature = metrics.fit_temperature(logits, labels)
        temperature_missing = None if temperature else metrics.NO_TEMPERATURE
    result = {
        **dict.fromkeys(EvalResult.__annotations__),
        **loaded.describe(),
        **METRICS_WITHOUT_TEST_SET,
        "classes": classes,
        "val_acc": val_acc,
        "temperature": temperature,
        "temperature_missing": temperature_missing,
        "tta": tta,
        "shifted": _evaluate_shifted(loaded, *shifted) if shifted else None,
        "corruptions": _evaluate_corruptions(loaded, data.test, console) if with_corruptions else None,
        "corrupted": _evaluate_corruptions(loaded, corrupted, console) if corrupted else None,
        "plots": str(plots_dir) if plots_dir else None,
        "data": data.source,
        "normalize": normalization_name(loaded.recipe),
    }
    if len(data.test.labels):
        logits, labels = loaded.predict_logits(data.test), torch.from_numpy(data.test.labels)
        result |= _compute_metrics(logits, labels, classes, temperature)
        result["test_acc_tta"] = None if tta == "none" else loaded.evaluate(data.test, tta).accuracy
        if plots_dir is not None:
            _save_plots(plots_dir, logits, labels, classes, temperature)
    return cast(EvalResult, result)


def _compute_metrics(logits: Tensor, labels: Tensor, classes: list[str], temperature: float | None) -> dict[str, Any]:
    scores = compute_scores(logits, labels)
    scaled = compute_scores(logits.double() / temperature, labels) if temperature else None
    metrics_by_class = scores.per_class, *metrics.precision_recall_f1(torch.tensor(scores.confusion))
    return {
        "test_acc": scores.accuracy,
        "test_acc_interval": metrics.wilson_interval(scores.correct, scores.total),
        "test_loss": scores.loss,
        "correct": scores.correct,
        "total": scores.total,
        "ece": scores.ece,
        **{
            name: dict(zip(classes, values, strict=True))
            for name, values in zip(PER_CLASS_METRICS, metrics_by_class, strict=True)
        },
        "confusion": scores.confusion,
        "reliability": [item._asdict() for item in reliability_bins(logits, logits.argmax(1) == labels)],
        "brier": metrics.brier_score(logits, labels),
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


def _evaluate_corruptions(
    loaded: LoadedModel, source: Split | CorruptedImages, console: Console | None
) -> CorruptionsResult:
    """Evaluate on the images of official files, or on corruptions of the images of a split that are computed here."""

    def accuracy(name: str, severity: int) -> float:
        if isinstance(source, CorruptedImages):
            return loaded.evaluate(source.split(name, severity)).accuracy
        generator = torch.Generator(loaded.device).manual_seed(CORRUPTION_SEED)

        def forward(images: Tensor) -> Tensor:
            return loaded.forward(apply_corruption(images, CORRUPTIONS[name], severity, generator))

        return replace(loaded, forward=forward).evaluate(source).accuracy

    is_computed = isinstance(source, Split)
    names = list(CORRUPTIONS if is_computed else source.images)
    is_terminal = console is not None and console.is_terminal
    progress = track(names, "corruptions", console=console, disable=not is_terminal, transient=True)
    accuracies = {name: [accuracy(name, severity) for severity in SEVERITIES] for name in progress}
    return {
        "source": "computed" if is_computed else source.folder,
        "mean_acc": float(np.mean([accuracies[name] for name in (names if is_computed else BENCHMARK_CORRUPTIONS)])),
        "acc": accuracies,
        "seed": CORRUPTION_SEED if is_computed else None,
    }


def apply_corruption(images: Tensor, corruption: Corruption, severity: int, generator: torch.Generator) -> Tensor:
    """Apply a corruption to uint8 images [n,3,32,32]; return uint8 images in channels_last memory format.

    It is computed in float64, so that all devices agree, and truncated to integers as in CIFAR-10-C.
    """
    corrupted = corruption(images.double() / 255, severity, generator) * 255
    return (corrupted + 1e-6).to(torch.uint8).contiguous(memory_format=torch.channels_last)
