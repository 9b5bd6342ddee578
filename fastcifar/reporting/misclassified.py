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
from fastcifar.evaluation.load_run import rebuild
from fastcifar.reporting.aggregate import Row
from fastcifar.training.evaluate import predict_logits


@dataclass(frozen=True, eq=False)
class Mistakes:
    """confusion: float64 [classes, classes], images of a class (the row) that a network calls another, the mean over
    the networks. The rest is of single images, the worst first: uint8 [n, 32, 32, 3], class numbers int64 [n], and the
    probability [n] that the networks give what they say, in the mean over them."""

    classes: list[str]
    networks: int
    confusion: np.ndarray
    images: np.ndarray
    labels: np.ndarray
    said: np.ndarray
    sure: np.ndarray

    def captions(self) -> list[str]:
        """`cat 98 %, not dog` for each image."""
        return [
            f"{self.classes[said]} {100 * sure:.0f} %, not {self.classes[label]}"
            for said, sure, label in zip(self.said, self.sure, self.labels, strict=True)
        ]


def look(row: Row, count: int, console: Console | None = None, **changes: Any) -> Mistakes:
    """The mistakes of the finished runs of `row`, at most `count` images of them.

    What several networks say is their mean probability. `changes`: of their recipes (data, device, precision); None
    keeps the recipe's. Errors: those of `rebuild`, `DataError`, `NonFiniteError`, `CheckpointError` if they do not know
    the same classes.
    """
    matrices, likely, classes, test = [], [], None, None
    for record in row.done:
        assert record.summary
        if console:
            console.print(f"{record.folder}: asked for the test set", markup=False, highlight=False)
        found = rebuild(str(record.folder), record.summary.weights, **changes)
        if classes not in (None, found.classes):
            raise CheckpointError(f"{record.folder} knows other classes than {row.done[0].folder}", "report them apart")
        classes, test = found.classes, found.data().test
        found.hurry(len(test.labels))
        logits = predict_logits(found.model, found.forward, test, found.device)
        if not torch.isfinite(logits).all():
            raise NonFiniteError(f"{record.folder} gives logits that are not finite", "use --precision fp32")
        matrices.append(metrics.confusion(logits, torch.from_numpy(test.labels)).double().numpy())
        likely.append(logits.double().softmax(1).numpy())
    assert classes
    assert test
    mean = np.mean(likely, axis=0)
    worst = surest_mistakes(mean, test.labels, count)
    return Mistakes(
        classes=classes,
        networks=len(likely),
        confusion=np.mean(matrices, axis=0),
        images=test.images[worst].transpose(0, 2, 3, 1),
        labels=test.labels[worst],
        said=mean[worst].argmax(1),
        sure=mean[worst].max(1),
    )


def surest_mistakes(likely: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """Positions int64 of at most `count` images whose likeliest class is not the label, the surest first.

    `likely`: probabilities [n, classes]. Of equals the first.
    """
    wrong = np.flatnonzero(likely.argmax(1) != labels)
    return wrong[np.argsort(-likely[wrong].max(1), kind="stable")][:count]
