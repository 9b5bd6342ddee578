"""Evaluation: images -> logits -> accuracy, loss and calibration, with test-time augmentation."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcifar.data.cifar import Split
from fastcifar.data.loaders import eval_batches
from fastcifar.errors import lookup
from fastcifar.training.compilation import compile_function
from fastcifar.training.cuda_graph import cuda_graphed_forward
from fastcifar.training.distributed import SINGLE_PROCESS, World
from fastcifar.training.fallback import run_stage
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
    """The scores that `compute_scores` computes from logits."""

    accuracy: float
    loss: float  # mean cross-entropy in nats
    correct: int
    total: int
    ece: float  # expected calibration error (Guo et al. 2017) in ECE_BINS bins of equal width
    per_class: list[float | None]  # accuracy; None for a class without images
    confusion: list[list[int]]  # see `compute_confusion_matrix`


def evaluate(model: nn.Module, forward: Forward, split: Split, device: torch.device, tta: str = "none") -> Scores:
    """Return the scores of `model` on all images of `split`. For the arguments, see `predict_logits`."""
    return compute_scores(predict_logits(model, forward, split, device, tta), torch.from_numpy(split.labels))


def predict_logits(model: nn.Module, forward: Forward, split: Split, device: torch.device, tta: str = "none") -> Tensor:
    """Return float32 logits [n, classes] on the host, in the order of `split`: the weighted mean over the views `tta`.

    `forward`: uint8 images [b, 3, 32, 32] -> logits [b, classes]. Raises `UsageError` if `tta` is not in VIEWS.
    """
    views = lookup(VIEWS, tta, "test-time augmentation")
    with eval_mode(model):
        batch_logits = []
        for images, _ in eval_batches(split.images, split.labels, EVAL_BATCH_SIZE, device):
            logits = views[0].weight * forward(apply_view(images, views[0]))
            for view in views[1:]:
                logits += view.weight * forward(apply_view(images, view))
            batch_logits.append(logits)
        return torch.cat(batch_logits).float().cpu()


def optimize_forward(
    model: nn.Module,
    forward: Forward,
    device: torch.device,
    compile: bool,
    use_cuda_graph: bool,
    mode: str = "auto",
    world: World = SINGLE_PROCESS,
) -> Forward:
    """Return `forward` of `model`, compiled (`mode`: see `compile_function`) and captured in a CUDA graph as requested.

    The result takes batches of up to EVAL_BATCH_SIZE images. Call it in `eval_mode`, as `predict_logits` does.
    All ranks of `world` must call this together. Raises `ExecutionError` if compilation or the capture fails on one.
    """
    if not compile and not use_cuda_graph:
        return forward
    example = torch.zeros(EVAL_BATCH_SIZE, 3, 32, 32, dtype=torch.uint8, device=device)
    example = example.contiguous(memory_format=torch.channels_last)
    optimized = compile_function(forward, mode) if compile else forward
    with eval_mode(model):
        if compile:
            run_stage("compile", lambda: optimized(example), device, world)
        if use_cuda_graph:
            capture = partial(cuda_graphed_forward, optimized, example)
            optimized = run_stage("cuda_graph", capture, device, world)

    def padded_forward(images: Tensor) -> Tensor:
        if len(images) == len(example):
            return optimized(images)
        padded = torch.cat([images, example[len(images) :]]).contiguous(memory_format=torch.channels_last)
        return optimized(padded)[: len(images)]

    return padded_forward


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
    sources = []  # the source index of each row and of each column
    for size, shift in zip(images.shape[2:], (view.dy, view.dx), strict=True):
        source = (torch.arange(size, device=images.device) - shift).abs()
        sources.append(source.minimum(2 * (size - 1) - source))
    rows, columns = sources
    if view.flipped:
        columns = columns.flip(0)
    return images[:, :, rows[:, None], columns].contiguous(memory_format=torch.channels_last)


def compute_scores(logits: Tensor, labels: Tensor) -> Scores:
    """Return the scores of logits [n, classes] for int64 labels [n], both on the host."""
    correct = logits.argmax(1) == labels
    num_correct = int(correct.sum())
    confusion = compute_confusion_matrix(logits, labels)
    _, confidences, correct_per_bin = _sum_by_bin(logits, correct)
    class_correct, class_totals = confusion.diagonal().tolist(), confusion.sum(1).tolist()
    return Scores(
        accuracy=num_correct / len(labels),
        loss=F.cross_entropy(logits.double(), labels).item(),
        correct=num_correct,
        total=len(labels),
        ece=(confidences - correct_per_bin).abs().sum().item() / len(labels),
        per_class=[right / total if total else None for right, total in zip(class_correct, class_totals, strict=True)],
        confusion=confusion.tolist(),
    )


def compute_confusion_matrix(logits: Tensor, labels: Tensor) -> Tensor:
    """Return int64 counts [classes, classes] with a row for each label and a column for each predicted class."""
    classes = logits.shape[1]
    return torch.bincount(labels * classes + logits.argmax(1), minlength=classes**2).view(classes, classes)


class CalibrationBin(NamedTuple):
    """The images in a range of confidences: their number, mean confidence and accuracy (None without images)."""

    images: int
    confidence: float | None = None
    accuracy: float | None = None


def reliability_bins(logits: Tensor, correct: Tensor) -> list[CalibrationBin]:
    """Return the bins of the expected calibration error of logits [n, classes], in order of increasing confidence."""
    return [
        CalibrationBin(int(images), confidences / images, num_correct / images) if images else CalibrationBin(0)
        for images, confidences, num_correct in torch.stack(_sum_by_bin(logits, correct), 1).tolist()
    ]


def _sum_by_bin(logits: Tensor, correct: Tensor) -> list[Tensor]:
    """Return, as float64 [bins], the number of images, the sum of confidences and the number correct in each bin."""
    confidence = logits.double().softmax(1).amax(1).nan_to_num()  # the caller reports a loss that is NaN
    index = (confidence * ECE_BINS).ceil().clamp(1, ECE_BINS).long() - 1
    zeros = torch.zeros(ECE_BINS, dtype=torch.float64)
    return [zeros.index_add(0, index, value) for value in (torch.ones_like(confidence), confidence, correct.double())]
