"""Evaluation: images -> logits -> accuracy, loss and calibration, without changing weights or running statistics.

Accuracies are fractions correct / total in [0, 1] over all images, not means of batch means. `VIEWS` defines test-time
augmentation: the logits of an image are a weighted mean over views of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcifar.data.cifar import Split
from fastcifar.data.loaders import eval_batches
from fastcifar.errors import lookup
from fastcifar.training.compilation import compile_function
from fastcifar.training.cuda_graph import cuda_graphed_forward, pad_batch
from fastcifar.training.step import Forward

EVAL_BATCH_SIZE = 500
MIN_IMAGES_TO_COMPILE = 100_000  # with fewer evaluated images, compilation takes longer than it saves (LOG.md)
ECE_BINS = 15


class View(NamedTuple):
    """A translation by (`dy`, `dx`) pixels with reflection padding, followed by a horizontal flip if `flipped`."""

    weight: float
    dy: int
    dx: int
    flipped: bool


def _add_flips(*views: View) -> tuple[View, ...]:
    return tuple(view._replace(weight=view.weight / 2, flipped=flip) for view in views for flip in (False, True))


# Name -> views whose weights sum to 1; the unchanged image comes first. "6view" is that of cifar10-airbench (Jordan
# 2024): half of the weight is on the image, half on the image translated by one pixel along the diagonal. "10crop" is
# the center and corner crops of the image padded by four pixels, and their flips (Krizhevsky et al. 2012).
VIEWS: dict[str, tuple[View, ...]] = {
    "none": (View(1, 0, 0, False),),
    "flip": _add_flips(View(1, 0, 0, False)),
    "6view": _add_flips(View(1 / 2, 0, 0, False), View(1 / 4, 1, 1, False), View(1 / 4, -1, -1, False)),
    "10crop": _add_flips(*(View(1 / 5, *shift, False) for shift in ((0, 0), (4, 4), (4, -4), (-4, 4), (-4, -4)))),
}


@dataclass(frozen=True)
class Scores:
    """Scores of logits: fractions of correct predictions, mean cross-entropy in nats, expected calibration error.

    `per_class` is None for a class without images.
    """

    accuracy: float
    loss: float
    correct: int
    total: int
    ece: float
    per_class: list[float | None]


def evaluate(model: nn.Module, forward: Forward, split: Split, device: torch.device, tta: str = "none") -> Scores:
    """Return the scores of `model` on all images of `split`, with the arguments of `predict_logits`."""
    return compute_scores(predict_logits(model, forward, split, device, tta), torch.from_numpy(split.labels))


def predict_logits(model: nn.Module, forward: Forward, split: Split, device: torch.device, tta: str = "none") -> Tensor:
    """Return float32 logits [n, classes] on the host, in the order of `split`: the weighted mean over the views `tta`.

    `forward`: uint8 images [b, 3, 32, 32] -> logits [b, classes]. Raises `UsageError` if `tta` is not in VIEWS.
    """
    views = lookup(VIEWS, tta, "test-time augmentation")
    with eval_mode(model):
        batches = eval_batches(split.images, split.labels, EVAL_BATCH_SIZE, device)
        return torch.cat([_average_views(views, forward, images) for images, _ in batches]).float().cpu()


def optimize_forward(
    model: nn.Module, forward: Forward, device: torch.device, compile: bool, use_cuda_graph: bool, mode: str = "auto"
) -> Forward:
    """Return `forward` of `model`, compiled and captured in a CUDA graph as requested.

    The result takes batches of up to EVAL_BATCH_SIZE images and uses the current weights of `model`. Call it in
    evaluation mode and under `torch.no_grad()`, as `predict_logits` does. `mode`: a key of COMPILE_MODES.
    """
    if not compile and not use_cuda_graph:
        return forward
    example = torch.zeros(EVAL_BATCH_SIZE, 3, 32, 32, dtype=torch.uint8, device=device)
    example = example.contiguous(memory_format=torch.channels_last)
    optimized = compile_function(forward, mode) if compile else forward
    with eval_mode(model):
        if use_cuda_graph:
            optimized = cuda_graphed_forward(optimized, example)
        else:
            optimized(example)
    return pad_batch(optimized, EVAL_BATCH_SIZE)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode and disable gradients in the `with` block."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():  # not `inference_mode`: a CUDA graph may be captured or replayed here
            yield
    finally:
        model.train(was_training)


def apply_view(images: Tensor, view: View) -> Tensor:
    """Return the `view` of images [n, c, h, w] of any dtype, in channels_last memory format."""
    if not any(view[1:]):
        return images
    rows = _reflected_indices(images.shape[2], view.dy, images.device)
    columns = _reflected_indices(images.shape[3], view.dx, images.device)
    if view.flipped:
        columns = columns.flip(0)
    return images[:, :, rows[:, None], columns].contiguous(memory_format=torch.channels_last)


def _reflected_indices(size: int, shift: int, device: torch.device) -> Tensor:
    """Return int64 [size], the source index of each pixel of a line that is translated by `shift`."""
    source = (torch.arange(size, device=device) - shift).abs()
    return source.minimum(2 * (size - 1) - source)


def _average_views(views: tuple[View, ...], forward: Forward, images: Tensor) -> Tensor:
    """Return the logits [n, classes] of a batch, the weighted mean over its views."""
    logits = views[0].weight * forward(apply_view(images, views[0]))
    for view in views[1:]:
        logits += view.weight * forward(apply_view(images, view))
    return logits


def compute_scores(logits: Tensor, labels: Tensor) -> Scores:
    """Return the scores of logits [n, classes] for int64 labels [n], both on the host."""
    correct = logits.argmax(1) == labels
    num_correct = int(correct.sum())
    class_totals = torch.bincount(labels, minlength=logits.shape[1]).tolist()
    class_correct = torch.bincount(labels[correct], minlength=logits.shape[1]).tolist()
    return Scores(
        accuracy=num_correct / len(labels),
        loss=F.cross_entropy(logits.double(), labels).item(),
        correct=num_correct,
        total=len(labels),
        ece=expected_calibration_error(logits, correct),
        per_class=[right / total if total else None for right, total in zip(class_correct, class_totals, strict=True)],
    )


class CalibrationBin(NamedTuple):
    """The images in a range of confidences: their number, mean confidence and accuracy (None without images)."""

    images: int
    confidence: float | None
    accuracy: float | None


def expected_calibration_error(logits: Tensor, correct: Tensor, bins: int = ECE_BINS) -> float:
    """Return the expected calibration error (Guo et al. 2017) of logits [n, classes] with `bins` bins of equal width.

    `correct`: bool [n], whether the largest logit is that of the label.
    """
    _, confidence_sums, num_correct = _sum_by_bin(logits, correct, bins)
    return (confidence_sums - num_correct).abs().sum().item() / len(correct)


def reliability_bins(logits: Tensor, correct: Tensor, bins: int = ECE_BINS) -> list[CalibrationBin]:
    """Return the bins of `expected_calibration_error`, in order of increasing confidence, for the same arguments."""
    sums = zip(*(column.tolist() for column in _sum_by_bin(logits, correct, bins)), strict=True)
    return [
        CalibrationBin(int(images), confidence_sum / images, num_correct / images)
        if images
        else CalibrationBin(0, None, None)
        for images, confidence_sum, num_correct in sums
    ]


def _sum_by_bin(logits: Tensor, correct: Tensor, bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the float64 [bins] sums of images, confidences and correct predictions over bins of confidence."""
    confidence = logits.double().softmax(1).amax(1)
    index = (confidence * bins).ceil().clamp(1, bins).long() - 1
    zeros = torch.zeros(bins, dtype=torch.float64)
    images = zeros.index_add(0, index, torch.ones_like(confidence))
    return images, zeros.index_add(0, index, confidence), zeros.index_add(0, index, correct.double())
