"""Metrics computed from logits and labels in float64, in addition to those of `training.evaluate`."""

import math

import torch.nn.functional as F
from torch import Tensor

Z_SCORE_95 = 1.959963984540054  # 97.5 % quantile of the standard normal distribution
TEMPERATURE_RANGE = (0.01, 100.0)
NO_TEMPERATURE = "no temperature from 0.01 to 100 minimizes the loss on the validation split"
BISECTION_STEPS = 45  # reduce the interval of length 2 ln(100) to thirteen digits


def precision_recall_f1(confusion_matrix: Tensor) -> tuple[list[float | None], ...]:
    """Return precision, recall and F1 = 2 PR / (P + R) of every class, None where the denominator is 0."""
    correct, predicted, labeled = confusion_matrix.diagonal(), confusion_matrix.sum(0), confusion_matrix.sum(1)
    fractions = ((correct, predicted), (correct, labeled), (2 * correct, predicted + labeled))
    return tuple(
        [count / total if total else None for count, total in zip(counts.tolist(), totals.tolist(), strict=True)]
        for counts, totals in fractions
    )


def brier_score(logits: Tensor, labels: Tensor) -> float:
    """Return the mean squared distance, from 0 to 2, of the probabilities from the one-hot label (Brier 1950)."""
    targets = F.one_hot(labels, logits.shape[1])
    return (logits.double().softmax(1) - targets).square().sum(1).mean().item()


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of `correct / total` over samples of test images (Wilson 1927)."""
    z2_over_n = Z_SCORE_95**2 / total
    fraction = correct / total
    center = fraction + z2_over_n / 2
    half_width = math.sqrt(z2_over_n * (fraction * (1 - fraction) + z2_over_n / 4))
    return max(0.0, (center - half_width) / (1 + z2_over_n)), min(1.0, (center + half_width) / (1 + z2_over_n))


def fit_temperature(logits: Tensor, labels: Tensor) -> float | None:
    """Return the temperature T that minimizes the cross-entropy of `logits / T` (temperature scaling, Guo et al. 2017).

    The loss is convex in 1 / T, so bisection finds the root of its derivative. Returns None if T is out of range.
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
