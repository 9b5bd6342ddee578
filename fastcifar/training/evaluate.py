"""Images -> logits -> accuracy, loss and calibration. Never changes a weight or a running statistic.

Accuracies are fractions correct / total in [0, 1] over every image, not means of batch means.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcifar.data.cifar import Split
from fastcifar.data.loaders import eval_batches

BATCH_SIZE = 500
ECE_BINS = 15


@dataclass(frozen=True)
class Scores:
    """What logits are worth. `accuracy` and `per_class` (None for a class without an image) are fractions, `loss` is
    the mean cross-entropy in nats, `ece` the expected calibration error."""

    accuracy: float
    loss: float
    correct: int
    total: int
    ece: float
    per_class: list[float | None]


def evaluate(model: nn.Module, forward: Callable[[Tensor], Tensor], split: Split, device: torch.device) -> Scores:
    """The scores of `model` on all of `split`. `forward`: uint8 images [b,3,32,32] -> logits [b,classes]."""
    return score(predict_logits(model, forward, split, device), torch.from_numpy(split.labels))


def predict_logits(model: nn.Module, forward: Callable[[Tensor], Tensor], split: Split, device: torch.device) -> Tensor:
    """float32 logits [n, classes] on the host, in the split's order, in evaluation mode and without gradients.

    no_grad and not inference_mode: a captured graph may be near.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            batches = eval_batches(split.images, split.labels, BATCH_SIZE, device)
            return torch.cat([forward(images) for images, _ in batches]).float().cpu()
    finally:
        model.train(training)


def score(logits: Tensor, labels: Tensor) -> Scores:
    """Logits [n, classes] against int64 labels [n], both on the host."""
    hits = logits.argmax(1) == labels
    counts = torch.bincount(labels, minlength=logits.shape[1]).tolist()
    right = torch.bincount(labels[hits], minlength=logits.shape[1]).tolist()
    return Scores(
        accuracy=int(hits.sum()) / len(labels),
        loss=F.cross_entropy(logits.double(), labels).item(),
        correct=int(hits.sum()),
        total=len(labels),
        ece=calibration_error(logits, hits),
        per_class=[hit / count if count else None for hit, count in zip(right, counts, strict=True)],
    )


def calibration_error(logits: Tensor, hits: Tensor, bins: int = ECE_BINS) -> float:
    """Expected calibration error (Guo et al. 2017): the gap of confidence and accuracy over equal bins, weighted."""
    confidence = logits.double().softmax(1).amax(1)
    index = (confidence * bins).ceil().clamp(1, bins).long() - 1
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, index, confidence - hits.double())
    return gaps.abs().sum().item() / len(hits)
