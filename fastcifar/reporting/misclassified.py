"""Misclassified test images of a group of runs: the mean confusion matrix and the most confident wrong predictions.

The models are evaluated on the test set again, with the weights of the original evaluation; no choice is based on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console

from fastcifar.errors import CheckpointError
from fastcifar.evaluation import metrics
from fastcifar.evaluation.load_run import load_model
from fastcifar.format import format_percent
from fastcifar.reporting.aggregate import RunGroup


@dataclass(frozen=True, eq=False)
class Misclassified:
    """Test images that the models of a group misclassify, the most confident first.

    confusion_matrix     float64 [classes, classes], mean over the models of the number of images of each true class
                         (row) with each predicted class (column)
    images               uint8 [n, 32, 32, 3]
    labels, predictions  int64 [n], true and predicted class numbers
    confidences          float64 [n], probability of the predicted class, the mean over the models
    """

    classes: list[str]
    num_models: int
    confusion_matrix: np.ndarray
    images: np.ndarray
    labels: np.ndarray
    predictions: np.ndarray
    confidences: np.ndarray

    def captions(self) -> list[str]:
        """Return a caption such as `cat 98 %, not dog` for each image."""
        return [
            f"{self.classes[prediction]} {format_percent(confidence, 0)}, not {self.classes[label]}"
            for prediction, confidence, label in zip(self.predictions, self.confidences, self.labels, strict=True)
        ]


def find_misclassified(group: RunGroup, count: int, console: Console | None = None, **overrides: Any) -> Misclassified:
    """Evaluate the finished runs of `group` on the test set and return at most `count` misclassified images.

    The predictions are those of the mean probabilities over the models. `overrides` are passed to `load_model`. Raises
    its errors, those of `LoadedRun.load_dataset` and `LoadedRun.predict_logits`, and `CheckpointError` if the models
    have different classes.
    """
    matrices, probabilities, classes, test = [], [], None, None
    for record in group.finished_runs:
        assert record.summary
        if console:
            console.print(f"{record.folder}: evaluating on the test set", markup=False, highlight=False)
        loaded = load_model(str(record.folder), record.summary.eval_weights, **overrides)
        if classes not in (None, loaded.classes):
            raise CheckpointError(
                f"{record.folder} has other classes than {group.finished_runs[0].folder}", "report them separately"
            )
        classes, test = loaded.classes, loaded.load_dataset().test
        loaded.compile_for(len(test.labels))
        logits = loaded.predict_logits(test)
        matrices.append(metrics.compute_confusion_matrix(logits, torch.from_numpy(test.labels)).double().numpy())
        probabilities.append(logits.double().softmax(1).numpy())
    assert classes
    assert test
    mean_probabilities = np.mean(probabilities, axis=0)
    indices = most_confident_misclassified(mean_probabilities, test.labels, count)
    return Misclassified(
        classes=classes,
        num_models=len(probabilities),
        confusion_matrix=np.mean(matrices, axis=0),
        images=test.images[indices].transpose(0, 2, 3, 1),
        labels=test.labels[indices],
        predictions=mean_probabilities[indices].argmax(1),
        confidences=mean_probabilities[indices].max(1),
    )


def most_confident_misclassified(probabilities: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """Return the indices, int64, of at most `count` misclassified images, the most confident first.

    `probabilities` is [n, classes], `labels` is [n]. Images of equal confidence keep their order.
    """
    wrong = np.flatnonzero(probabilities.argmax(1) != labels)
    return wrong[np.argsort(-probabilities[wrong].max(1), kind="stable")][:count]
