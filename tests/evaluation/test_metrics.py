"""Test the evaluation metrics against torchmetrics, and temperature scaling against known temperatures."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastcifar.evaluation import metrics
from fastcifar.training.evaluate import compute_confusion_matrix, compute_scores, reliability_bins

CLASSES = 10


def random_logits(count: int = 10_000, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    """Return random logits and labels with an accuracy of about two thirds."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    logits = scale * torch.randn(count, CLASSES, generator=generator)
    logits[torch.arange(count), labels] += 2.5 * scale
    return logits, labels


@pytest.mark.medium
def test_metrics_match_torchmetrics() -> None:
    from torchmetrics.functional import classification as torchmetrics  # which imports much more than torch

    logits, labels = random_logits()
    probabilities = logits.double().softmax(1)
    counts = compute_confusion_matrix(logits, labels)
    assert torch.equal(counts, torchmetrics.multiclass_confusion_matrix(probabilities, labels, CLASSES))
    precision, recall, f1 = metrics.precision_recall_f1(counts)
    for actual, function in (
        (precision, torchmetrics.multiclass_precision),
        (recall, torchmetrics.multiclass_recall),
        (f1, torchmetrics.multiclass_f1_score),
    ):
        expected = function(probabilities, labels, num_classes=CLASSES, average="none").tolist()
        assert actual == pytest.approx(expected, rel=1e-6), function.__name__
    scores = compute_scores(logits, labels)
    assert scores.accuracy == pytest.approx(
        torchmetrics.multiclass_accuracy(probabilities, labels, CLASSES, average="micro").item(), rel=1e-6
    )
    assert scores.per_class == recall
    calibration = torchmetrics.multiclass_calibration_error(probabilities, labels, CLASSES, n_bins=15, norm="l1").item()
    assert scores.ece == pytest.approx(calibration, rel=1e-4)
    brier = sum(
        sum((p - (k == label)) ** 2 for k, p in enumerate(row))
        for row, label in zip(probabilities.tolist(), labels.tolist(), strict=True)
    )
    assert metrics.brier_score(logits, labels) == pytest.approx(brier / len(labels), rel=1e-12)


def test_undefined_per_class_metrics_are_none() -> None:
    logits = torch.tensor([[2.0, 1, 0], [2, 1, 0]])
    counts = compute_confusion_matrix(logits, torch.tensor([0, 1]))
    expected = ([0.5, None, None], [1.0, 0.0, None], [2 / 3, 0.0, None])
    assert metrics.precision_recall_f1(counts) == expected


def test_reliability_bins_give_the_calibration_error() -> None:
    logits, labels = random_logits(500)
    bins = reliability_bins(logits, logits.argmax(1) == labels)
    assert (len(bins), sum(item.images for item in bins)) == (15, 500)
    calibration_error = 0.0
    for index, item in enumerate(bins):
        if item.confidence is None or item.accuracy is None:
            assert item.images == 0
            continue
        assert index / 15 <= item.confidence <= (index + 1) / 15
        calibration_error += item.images / 500 * abs(item.confidence - item.accuracy)
    assert compute_scores(logits, labels).ece == pytest.approx(calibration_error, rel=1e-12)


@pytest.mark.parametrize("temperature", [0.4, 1.7, 6.0])
def test_fit_temperature_recovers_the_temperature(temperature: float) -> None:
    generator = torch.Generator().manual_seed(1)
    calibrated = 2 * torch.randn(10_000, CLASSES, generator=generator)
    labels = torch.multinomial(calibrated.softmax(1), 1, generator=generator)[:, 0]
    logits = temperature * calibrated.double()
    fitted = metrics.fit_temperature(temperature * calibrated, labels)
    assert fitted
    assert fitted == pytest.approx(temperature, rel=0.03)
    before, after = compute_scores(temperature * calibrated, labels), compute_scores(logits / fitted, labels)
    assert after.correct == before.correct
    assert after.ece < 0.02 < before.ece
    for factor in (0.99, 1.01):  # the loss is at its minimum
        assert compute_scores(logits / (factor * fitted), labels).loss > after.loss


@pytest.mark.parametrize(("temperature", "is_in_range"), [(0.011, True), (0.009, False), (95.0, True), (105.0, False)])
def test_range_of_fitted_temperatures(temperature: float, is_in_range: bool) -> None:
    logits, labels = random_logits(2_000, scale=0.5)
    at_one = metrics.fit_temperature(logits, labels)
    assert at_one
    fitted = metrics.fit_temperature(logits * temperature / at_one, labels)
    assert (fitted is not None) == is_in_range
    assert fitted is None or fitted == pytest.approx(temperature, rel=1e-4)


def test_fit_temperature_without_a_finite_minimum() -> None:
    labels = torch.arange(CLASSES)
    certain = 5 * torch.eye(CLASSES)
    assert metrics.fit_temperature(certain, labels) is None, "the loss decreases with the temperature, down to 0"
    assert metrics.fit_temperature(-certain, labels) is None, (
        "the loss decreases with increasing temperature, without bound"
    )


def test_wilson_interval() -> None:
    # The bounds are defined as the roots of (p - fraction)^2 = z^2 p (1 - p) / n.
    for correct, total in ((9_500, 10_000), (1, 8), (50, 50), (0, 7)):
        low, high = metrics.wilson_interval(correct, total)
        assert 0 <= low <= correct / total <= high <= 1
        for bound in (low, high):
            half_width = 1.959963984540054 * math.sqrt(bound * (1 - bound) / total)
            assert abs(bound - correct / total) == pytest.approx(half_width, abs=1e-9)
