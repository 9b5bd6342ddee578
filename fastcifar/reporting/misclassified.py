"""The test images that the runs of a group misclassify, found by an evaluation of these runs."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console

from fastcifar.errors import CheckpointError, NonFiniteError
from fastcifar.evaluation.load_run import load_model
from fastcifar.format import format_percent
from fastcifar.reporting.aggregate import RunGroup
from fastcifar.training.evaluate import compute_confusion_matrix


@dataclass(frozen=True, eq=False)
class Misclassified:
    """Test images that the models of a group misclassify, the most confident first."""

    classes: list[str]
    num_models: int
    confusion_matrix: np.ndarray  # float64 [true class, predicted class], mean number of images over the models
    images: np.ndarray  # uint8 [n, 32, 32, 3]
    labels: np.ndarray  # int64 [n]
    predictions: np.ndarray  # int64 [n]
    confidences: np.ndarray  # float64 [n], mean probability of the predicted class over the models

    def captions(self) -> list[str]:
        """Return a caption such as `cat 98 %, not dog` for each image."""
        return [
            f"{self.classes[prediction]} {format_percent(confidence, 0)}, not {self.classes[label]}"
            for prediction, confidence, label in zip(self.predictions, self.confidences, self.labels, strict=True)
        ]


def find_misclassified(group: RunGroup, count: int, console: Console | None = None, **overrides: Any) -> Misclassified:
    """Evaluate the finished runs of `group` on the test set and return at most `count` misclassified images.

    The predictions are those of the mean probabilities over the models, with the weights of the original evaluation.
    `overrides` are those of `load_model`. Raises `CheckpointError` if the models have different classes.
    """
    matrices, probabilities, classes, test = [], [], None, None
    for record in group.finished_runs:
        assert record.summary
        if console:
            console.print(f"{record.folder}: evaluating on the test set", markup=False, highlight=False)
        loaded = load_model(str(record.folder), record.summary.eval_weights, **overrides)
        if classes not in (None, loaded.classes):
            problem = f"{record.folder} has other classes than {group.finished_runs[0].folder}"
            raise CheckpointError(problem, "report them separately")
        classes, test = loaded.classes, loaded.load_dataset().require_test_set()
        loaded.compile_for(len(test.labels))
        try:
            logits = loaded.predict_logits(test)
        except NonFiniteError as error:
            raise NonFiniteError(f"{record.folder}: {error.problem}", error.remedy) from None
        matrices.append(compute_confusion_matrix(logits, torch.from_numpy(test.labels)).double().numpy())
        probabilities.append(logits.double().softmax(1).numpy())
    assert classes
    assert test
    mean_probabilities = np.mean(probabilities, axis=0)
    wrong = np.flatnonzero(mean_probabilities.argmax(1) != test.labels)
    indices = wrong[np.argsort(-mean_probabilities[wrong].max(1), kind="stable")][:count]
    return Misclassified(
        classes=classes,
        num_models=len(probabilities),
        confusion_matrix=np.mean(matrices, axis=0),
        images=test.images[indices].transpose(0, 2, 3, 1),
        labels=test.labels[indices],
        predictions=mean_probabilities[indices].argmax(1),
        confidences=mean_probabilities[indices].max(1),
    )
