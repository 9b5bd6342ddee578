"""Metrics computed from logits and labels: per-class metrics, calibration and a confidence interval of the accuracy.

All are computed in float64. Accuracy, loss and the expected calibration error are in `training.evaluate`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Z_SCORE_95 = 1.959963984540054  # 97.5 % quantile of the standard normal distribution
TEMPERATURE_RANGE = (0.01, 100.0)
BISECTION_STEPS = 45  # reduce the interval of length 2 ln(100) to thirteen digits


@dataclass(frozen=True)
class PerClassMetrics:
    """Per-class fractions; None where undefined because the class is never predicted or has no images."""

    precision: list[float | None]
    recall: list[float | None]
    f1: list[float | None]


def compute_confusion_matrix(logits: Tensor, labels: Tensor) -> Tensor:
    """Return int64 counts [classes, classes] with a row for each label and a column for each predicted class."""
    classes = logits.shape[1]
    return torch.bincount(labels * classes + logits.argmax(1), minlength=classes**2).view(classes, classes)


def per_class_metrics(confusion_matrix: Tensor) -> PerClassMetrics:
    """Return precision, recall and F1 = 2 PR / (P + R) of every class, for a matrix of `compute_confusion_matrix`."""
    correct = confusion_matrix.diagonal().tolist()
    predicted, labeled = confusion_matrix.sum(0).tolist(), confusion_matrix.sum(1).tolist()
    return PerClassMetrics(
        precision=[_divide_or_none(c, p) for c, p in zip(correct, predicted, strict=True)],
        recall=[_divide_or_none(c, n) for c, n in zip(correct, labeled, strict=True)],
        f1=[_divide_or_none(2 * c, p + n) for c, p, n in zip(correct, predicted, labeled, strict=True)],
    )


def _divide_or_none(numerator: int, denominator: int) -> float | None:
    return numerator / denominator if denominator else None


def brier_score(logits: Tensor, labels: Tensor) -> float:
    """Return the Brier score (Brier 1950), from 0 to 2.

    It is the squared difference between the probabilities and the one-hot label, summed over the classes and averaged
    over the images.
    """
    targets = F.one_hot(labels, logits.shape[1])
    return (logits.double().softmax(1) - targets).square().sum(1).mean().item()


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """Return the lower and upper bound of the 95 % confidence interval of `correct / total` (Wilson 1927).

    The interval covers the sampling of the `total` test images, not the variation between training seeds.
    """
    z2_over_n = Z_SCORE_95**2 / total
    fraction = correct / total
    center = fraction + z2_over_n / 2
    half_width = math.sqrt(z2_over_n * (fraction * (1 - fraction) + z2_over_n / 4))
    return max(0.0, (center - half_width) / (1 + z2_over_n)), min(1.0, (center + half_width) / (1 + z2_over_n))


def fit_temperature(logits: Tensor, labels: Tensor) -> float | None:
    """Return the temperature T that minimizes the cross-entropy of `logits / T` (temperature scaling, Guo et al. 2017).

    The loss is convex in 1 / T, so bisection finds the root of its derivative. Returns None if the root lies outside
    `TEMPERATURE_RANGE`, as when every prediction is correct or the predictions are no better than chance.
    """
    logits = logits.double()
    mean_label_logit = logits.gather(1, labels[:, None])[:, 0].mean().item()

    def loss_derivative(inverse_temperature: float) -> float:
        return ((logits * inverse_temperature).softmax(1) * logits).sum(1).mean().item() - mean_label_logit

    low, high = (math.log(1 / bound) for bound in reversed(TEMPERATURE_RANGE))
    if not loss_derivative(math.exp(low)) < 0 < loss_derivative(math.exp(high)):
        return None
    for _ in range(BISECTION_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if loss_derivative(math.exp(middle)) < 0 else (low, middle)
    return math.exp(-low)
