"""What the networks of a row get wrong: their mean confusion matrix, and the images that they are surest of and miss.

The networks are asked for the test set again, by the weights that met it in training; nothing is chosen by it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console

from fastcifar.errors import CheckpointError, NonFiniteError
from fastcifar.evaluation import metrics
from fastcifar.evaluation.load_run import load_model
from fastcifar.format import format_percent
from fastcifar.reporting.aggregate import RunGroup
from fastcifar.training.evaluate import predict_logits


@dataclass(frozen=True, eq=False)
class Misclassified:
    """confusion: float64 [classes, classes], images of a class (the row) that a network calls another, the mean over
    the networks. The rest is of single images, the worst first: uint8 [n, 32, 32, 3], class numbers int64 [n], and the
    probability [n] that the networks give what they say, in the mean over them."""

    classes: list[str]
    num_models: int
    confusion_matrix: np.ndarray
    images: np.ndarray
    labels: np.ndarray
    predictions: np.ndarray
    confidences: np.ndarray

    def captions(self) -> list[str]:
        """`cat 98 %, not dog` for each image."""
        return [
            f"{self.classes[said]} {format_percent(sure, 0)}, not {self.classes[label]}"
            for said, sure, label in zip(self.predictions, self.confidences, self.labels, strict=True)
        ]


def find_misclassified(row: RunGroup, count: int, console: Console | None = None, **overrides: Any) -> Misclassified:
    """The mistakes of the finished runs of `row`, at most `count` images of them.

    What several networks say is their mean probability. `changes`: of their recipes (data, device, precision); None
    keeps the recipe's. Errors: those of `rebuild`, `DataError`, `NonFiniteError`, `CheckpointError` if they do not know
    the same classes.
    """
    matrices, likely, classes, test = [], [], None, None
    for record in row.finished_runs:
        assert record.summary
        if console:
            console.print(f"{record.folder}: asked for the test set", markup=False, highlight=False)
        found = load_model(str(record.folder), record.summary.eval_weights, **overrides)
        if classes not in (None, found.classes):
            raise CheckpointError(
                f"{record.folder} knows other classes than {row.finished_runs[0].folder}", "report them apart"
            )
        classes, test = found.classes, found.load_dataset().test
        found.compile_for(len(test.labels))
        logits = predict_logits(found.model, found.forward, test, found.device)
        if not torch.isfinite(logits).all():
            raise NonFiniteError(f"{record.folder} gives logits that are not finite", "use --precision fp32")
        matrices.append(metrics.compute_confusion_matrix(logits, torch.from_numpy(test.labels)).double().numpy())
        likely.append(logits.double().softmax(1).numpy())
    assert classes
    assert test
    mean = np.mean(likely, axis=0)
    worst = most_confident_misclassified(mean, test.labels, count)
    return Misclassified(
        classes=classes,
        num_models=len(likely),
        confusion_matrix=np.mean(matrices, axis=0),
        images=test.images[worst].transpose(0, 2, 3, 1),
        labels=test.labels[worst],
        predictions=mean[worst].argmax(1),
        confidences=mean[worst].max(1),
    )


def most_confident_misclassified(probabilities: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """Positions int64 of at most `count` images whose likeliest class is not the label, the surest first.

    `likely`: probabilities [n, classes]. Of equals the first.
    """
    wrong = np.flatnonzero(probabilities.argmax(1) != labels)
    return wrong[np.argsort(-probabilities[wrong].max(1), kind="stable")][:count]
