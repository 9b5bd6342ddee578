"""The figures of `eval` against torchmetrics, and calibration against what was put in."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torchmetrics.functional import classification as oracle

from fastcifar.evaluation import metrics
from fastcifar.training.evaluate import ECE_BINS, compute_scores, reliability_bins

CLASSES = 10


def drawn(count: int = 10_000, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    """Logits that know something of the labels: about two in three are right."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    logits = scale * torch.randn(count, CLASSES, generator=generator)
    logits[torch.arange(count), labels] += 2.5 * scale
    return logits, labels


def test_the_figures_are_those_of_torchmetrics() -> None:
    logits, labels = drawn()
    likely = logits.double().softmax(1)
    counts = metrics.compute_confusion_matrix(logits, labels)
    assert torch.equal(counts, oracle.multiclass_confusion_matrix(likely, labels, CLASSES))
    found, each = metrics.per_class_metrics(counts), {"num_classes": CLASSES, "average": "none"}
    for name, function in (
        ("precision", oracle.multiclass_precision),
        ("recall", oracle.multiclass_recall),
        ("f1", oracle.multiclass_f1_score),
    ):
        assert getattr(found, name) == pytest.approx(function(likely, labels, **each).tolist(), rel=1e-6), name
    scores = compute_scores(logits, labels)
    assert scores.accuracy == pytest.approx(
        oracle.multiclass_accuracy(likely, labels, CLASSES, average="micro").item(), rel=1e-6
    )
    assert scores.per_class == found.recall
    calibration = oracle.multiclass_calibration_error(likely, labels, CLASSES, n_bins=ECE_BINS, norm="l1").item()
    assert scores.ece == pytest.approx(calibration, rel=1e-4)
    brier = sum(
        sum((p - (k == label)) ** 2 for k, p in enumerate(row))
        for row, label in zip(likely.tolist(), labels.tolist(), strict=True)
    )
    assert metrics.brier_score(logits, labels) == pytest.approx(brier / len(labels), rel=1e-12)


def test_a_class_never_said_or_never_there_has_no_figure() -> None:
    logits = torch.tensor([[2.0, 1, 0], [2, 1, 0]])
    found = metrics.per_class_metrics(metrics.compute_confusion_matrix(logits, torch.tensor([0, 1])))
    assert (found.precision, found.recall) == ([0.5, None, None], [1.0, 0.0, None])
    assert found.f1 == [2 / 3, 0.0, None]


def test_the_bins_add_up_to_the_calibration_error() -> None:
    logits, labels = drawn(500)
    bins = reliability_bins(logits, logits.argmax(1) == labels)
    assert (len(bins), sum(cell.images for cell in bins)) == (ECE_BINS, 500)
    gap = 0.0
    for index, cell in enumerate(bins):
        if cell.confidence is None or cell.accuracy is None:
            assert cell.images == 0
            continue
        assert index / ECE_BINS <= cell.confidence <= (index + 1) / ECE_BINS
        gap += cell.images / 500 * abs(cell.confidence - cell.accuracy)
    assert compute_scores(logits, labels).ece == pytest.approx(gap, rel=1e-12)


@pytest.mark.parametrize("true", [0.4, 1.7, 6.0])
def test_the_temperature_is_recovered_and_moves_no_label(true: float) -> None:
    generator = torch.Generator().manual_seed(1)
    honest = 2 * torch.randn(10_000, CLASSES, generator=generator)
    labels = torch.multinomial(honest.softmax(1), 1, generator=generator)[:, 0]
    found = metrics.fit_temperature(true * honest, labels)
    assert found
    assert found == pytest.approx(true, rel=0.03)
    before, after = compute_scores(true * honest, labels), compute_scores(true * honest.double() / found, labels)
    assert after.correct == before.correct
    assert after.ece < 0.02 < before.ece
    for other in (0.99, 1.01):  # it is the least loss, not only a lower one
        assert compute_scores(true * honest.double() / (other * found), labels).loss > after.loss


def test_no_temperature_where_none_is_best() -> None:
    labels = torch.arange(CLASSES)
    certain = 5 * torch.eye(CLASSES)
    assert metrics.fit_temperature(certain, labels) is None, "the colder, the better, without end"
    assert metrics.fit_temperature(-certain, labels) is None, "the hotter, the better, without end"


def test_wilsons_interval() -> None:
    # the roots of (p - fraction)^2 = z^2 p (1 - p) / n, which define it
    for correct, total in ((9_500, 10_000), (1, 8), (50, 50), (0, 7)):
        low, high = metrics.wilson_interval(correct, total)
        assert 0 <= low <= correct / total <= high <= 1
        for bound in (low, high):
            reach = metrics.Z_SCORE_95 * math.sqrt(bound * (1 - bound) / total)
            assert abs(bound - correct / total) == pytest.approx(reach, abs=1e-9)
