"""Images -> logits -> accuracy, loss and calibration. Never changes a weight or a running statistic.

Accuracies are fractions correct / total in [0, 1] over every image, not means of batch means. `VIEWS` is test-time
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
MIN_IMAGES_TO_COMPILE = 100_000  # images through the network below which compiling it costs more than it saves (LOG.md)
ECE_BINS = 15


class View(NamedTuple):
    """An image moved by whole pixels, what comes in mirrored at the edge, and then perhaps flipped left to right."""

    weight: float
    dy: int
    dx: int
    flipped: bool


def _add_flips(*views: View) -> tuple[View, ...]:
    return tuple(view._replace(weight=view.weight / 2, flipped=flip) for view in views for flip in (False, True))


# Name -> views whose weights sum to 1; the image itself comes first. "6view" is that of cifar10-airbench (Jordan 2024):
# half the weight on the image, half on it moved by one pixel along the diagonal. "10crop" is the five crops of the
# image padded by four, as Krizhevsky et al. (2012) took ten of larger images.
VIEWS: dict[str, tuple[View, ...]] = {
    "none": (View(1, 0, 0, False),),
    "flip": _add_flips(View(1, 0, 0, False)),
    "6view": _add_flips(View(1 / 2, 0, 0, False), View(1 / 4, 1, 1, False), View(1 / 4, -1, -1, False)),
    "10crop": _add_flips(*(View(1 / 5, *by, False) for by in ((0, 0), (4, 4), (4, -4), (-4, 4), (-4, -4)))),
}


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


def evaluate(model: nn.Module, forward: Forward, split: Split, device: torch.device, tta: str = "none") -> Scores:
    """The scores of `model` on all of `split`. `forward`: uint8 images [b,3,32,32] -> logits [b,classes].

    `tta`: a row of VIEWS. Errors: `UsageError` for another name.
    """
    return compute_scores(predict_logits(model, forward, split, device, tta), torch.from_numpy(split.labels))


def predict_logits(model: nn.Module, forward: Forward, split: Split, device: torch.device, tta: str = "none") -> Tensor:
    """float32 logits [n, classes] on the host, in the split's order: the weighted mean over the views `tta`.

    Errors: `UsageError` for a name that is not in VIEWS.
    """
    views = lookup(VIEWS, tta, "test-time augmentation")
    with eval_mode(model):
        batches = eval_batches(split.images, split.labels, EVAL_BATCH_SIZE, device)
        return torch.cat([_average_views(views, forward, images) for images, _ in batches]).float().cpu()


def optimize_forward(
    model: nn.Module, forward: Forward, device: torch.device, compile: bool, use_cuda_graph: bool, mode: str = "auto"
) -> Forward:
    """`forward` of `model` compiled, captured or both, for batches of up to BATCH_SIZE images; itself if neither.

    It is made and must be called in evaluation mode, under no_grad, as `predict_logits` does; it reads the weights of
    the moment.
    """
    if not compile and not use_cuda_graph:
        return forward
    example = torch.zeros(EVAL_BATCH_SIZE, 3, 32, 32, dtype=torch.uint8, device=device)
    example = example.contiguous(memory_format=torch.channels_last)
    fast = compile_function(forward, mode) if compile else forward
    with eval_mode(model):
        if use_cuda_graph:
            fast = cuda_graphed_forward(fast, example)
        else:
            fast(example)
    return pad_batch(fast, EVAL_BATCH_SIZE)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients, and the mode as before afterwards.

    no_grad and not inference_mode: a captured graph may be near.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def apply_view(images: Tensor, view: View) -> Tensor:
    """The `view` of images [n,c,h,w] of any dtype, in their memory format where that is channels_last."""
    if not any(view[1:]):
        return images
    rows = _reflected_indices(images.shape[2], view.dy, images.device)
    columns = _reflected_indices(images.shape[3], view.dx, images.device)
    if view.flipped:
        columns = columns.flip(0)
    return images[:, :, rows[:, None], columns].contiguous(memory_format=torch.channels_last)


def _reflected_indices(size: int, shift: int, device: torch.device) -> Tensor:
    """Where each of `size` pixels of a moved line comes from: int64, mirrored at both edges (which come once)."""
    source = (torch.arange(size, device=device) - shift).abs()
    return source.minimum(2 * (size - 1) - source)


def _average_views(views: tuple[View, ...], forward: Forward, images: Tensor) -> Tensor:
    """Logits [n, classes] of a batch: the weighted mean over its views."""
    logits = views[0].weight * forward(apply_view(images, views[0]))
    for view in views[1:]:
        logits += view.weight * forward(apply_view(images, view))
    return logits


def compute_scores(logits: Tensor, labels: Tensor) -> Scores:
    """Logits [n, classes] against int64 labels [n], both on the host."""
    hits = logits.argmax(1) == labels
    counts = torch.bincount(labels, minlength=logits.shape[1]).tolist()
    right = torch.bincount(labels[hits], minlength=logits.shape[1]).tolist()
    return Scores(
        accuracy=int(hits.sum()) / len(labels),
        loss=F.cross_entropy(logits.double(), labels).item(),
        correct=int(hits.sum()),
        total=len(labels),
        ece=expected_calibration_error(logits, hits),
        per_class=[hit / count if count else None for hit, count in zip(right, counts, strict=True)],
    )


class CalibrationBin(NamedTuple):
    """The images of a range of confidences: how many, how sure the network is of them, and how often it is right."""

    images: int
    confidence: float | None  # the means; None without an image
    accuracy: float | None


def expected_calibration_error(logits: Tensor, correct: Tensor, bins: int = ECE_BINS) -> float:
    """Expected calibration error (Guo et al. 2017): the gap of confidence and accuracy over equal bins, weighted."""
    _, sure, right = _sum_by_bin(logits, correct, bins)
    return (sure - right).abs().sum().item() / len(correct)


def reliability_bins(logits: Tensor, correct: Tensor, bins: int = ECE_BINS) -> list[CalibrationBin]:
    """The bins of `calibration_error`, from confidence 0 up. `hits`: bool [n], where the largest logit is the label."""
    sums = zip(*(column.tolist() for column in _sum_by_bin(logits, correct, bins)), strict=True)
    return [
        CalibrationBin(int(count), sure / count, right / count) if count else CalibrationBin(0, None, None)
        for count, sure, right in sums
    ]


def _sum_by_bin(logits: Tensor, correct: Tensor, bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """float64 [bins] sums over equal bins of confidence: images, confidence, hits."""
    confidence = logits.double().softmax(1).amax(1)
    index = (confidence * bins).ceil().clamp(1, bins).long() - 1
    empty = torch.zeros(bins, dtype=torch.float64)
    images, sure, right = (
        empty.index_add(0, index, values) for values in (torch.ones_like(confidence), confidence, correct.double())
    )
    return images, sure, right
