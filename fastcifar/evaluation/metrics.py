"""Logits and labels -> what `eval` says beside accuracy: classes one by one, calibration, how sure the accuracy is.

Pure and in float64; accuracy, loss and the calibration error itself are `training.evaluate`'s. No images here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Z_SCORE_95 = 1.959963984540054  # standard deviations around a normal mean that hold 95 %
TEMPERATURE_RANGE = (0.01, 100.0)
BISECTION_STEPS = 45  # of an interval of two times ln 100: to thirteen digits


@dataclass(frozen=True)
class PerClassMetrics:
    """Fractions of each class; None where there is nothing to divide by: a class never said, or without an image."""

    precision: list[float | None]
    recall: list[float | None]
    f1: list[float | None]


def compute_confusion_matrix(logits: Tensor, labels: Tensor) -> Tensor:
    """Counts int64 [classes, classes]: rows are the labels, columns what the network says."""
    classes = logits.shape[1]
    return torch.bincount(labels * classes + logits.argmax(1), minlength=classes**2).view(classes, classes)


def per_class_metrics(confusion_matrix: Tensor) -> PerClassMetrics:
    """Precision, recall and F1 = 2 PR / (P + R) of a matrix that `confusion` counted."""
    right, said, true = (
        confusion_matrix.diagonal().tolist(),
        confusion_matrix.sum(0).tolist(),
        confusion_matrix.sum(1).tolist(),
    )
    return PerClassMetrics(
        precision=[_divide_or_none(hit, whole) for hit, whole in zip(right, said, strict=True)],
        recall=[_divide_or_none(hit, whole) for hit, whole in zip(right, true, strict=True)],
        f1=[_divide_or_none(2 * hit, a + b) for hit, a, b in zip(right, said, true, strict=True)],
    )


def _divide_or_none(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def brier_score(logits: Tensor, labels: Tensor) -> float:
    """Brier's score (1950), 0 to 2: the squared distance of the probabilities from the label's, summed over classes."""
    wanted = F.one_hot(labels, logits.shape[1])
    return (logits.double().softmax(1) - wanted).square().sum(1).mean().item()


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a fraction (Wilson 1927): what the draw of the `total` images leaves open, not the seed."""
    spread = Z_SCORE_95**2 / total
    fraction = correct / total
    middle = fraction + spread / 2
    reach = math.sqrt(spread * (fraction * (1 - fraction) + spread / 4))
    return max(0.0, (middle - reach) / (1 + spread)), min(1.0, (middle + reach) / (1 + spread))


def fit_temperature(logits: Tensor, labels: Tensor) -> float | None:
    """What to divide logits by for the least cross-entropy on these labels (Guo et al. 2017).

    The loss is convex in 1 / T, so the root of its slope is the answer, found by halving. None where it lies outside
    TEMPERATURES: all labels are the largest logits, or the logits know no more than chance.
    """
    scores = logits.double()
    wanted = scores.gather(1, labels[:, None])[:, 0].mean()

    def slope(inverse: float) -> float:
        return ((scores * inverse).softmax(1) * scores).sum(1).mean().item() - wanted.item()

    low, high = (math.log(1 / bound) for bound in reversed(TEMPERATURE_RANGE))
    if not slope(math.exp(low)) < 0 < slope(math.exp(high)):
        return None
    for _ in range(BISECTION_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(math.exp(middle)) < 0 else (low, middle)
    return math.exp(-low)
