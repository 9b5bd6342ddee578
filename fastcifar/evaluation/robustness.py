"""A finished run on images that are not drawn as the test set was: corrupted ones, and CIFAR-10.1.

Read only when it is asked for. The images come from `corruptions` or from files; nothing is trained or chosen on them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from fastcifar.data.cifar import DATASETS, Split
from fastcifar.errors import DataError
from fastcifar.evaluation.corruptions import CORRUPTIONS, SEVERITIES, Corruption
from fastcifar.evaluation.load_run import LoadedRun
from fastcifar.evaluation.metrics import wilson_interval
from fastcifar.training.evaluate import compute_scores, predict_logits

CIFAR10_1_VERSIONS = ("cifar10.1_v6", "cifar10.1_v4")  # the balanced one, which its authors recommend, first
CORRUPTION_SEED = 0  # one for all runs: what they are compared on is the same
CIFAR10_1_REMEDY = "give the folder of https://github.com/modestyachts/CIFAR-10.1/tree/master/datasets"


@dataclass(frozen=True)
class RobustnessEval:
    """What a run is measured on beside the test set. `shifted`: a name and its images, or None."""

    shifted_test_set: tuple[str, Split] | None
    with_corruptions: bool

    def num_images(self, num_test_images: int) -> int:
        """How many images that is, with a test set of `tests`."""
        moved = len(self.shifted_test_set[1].labels) if self.shifted_test_set else 0
        return moved + self.with_corruptions * num_test_images * len(CORRUPTIONS) * len(SEVERITIES)

    def evaluate(self, loaded: LoadedRun, test: Split, console: Console | None) -> dict[str, Any]:
        """`shifted` and `corruptions`, each None if it was not asked for."""
        return {
            "shifted": evaluate_shifted(loaded, *self.shifted_test_set) if self.shifted_test_set else None,
            "corruptions": evaluate_corruptions(loaded, test, console) if self.with_corruptions else None,
        }


def load_cifar10_1(folder: Path, classes: list[str]) -> tuple[str, Split]:
    """The version's name and the images of CIFAR-10.1 (Recht et al. 2018) in `folder`, v6 before v4.

    `classes`: of the run, which must be CIFAR-10's. Errors: `DataError` for another run, and for files that are
    missing, damaged, pickled, or of another shape, type or range than published.
    """
    if tuple(classes) != DATASETS["cifar10"].class_names:
        raise DataError("CIFAR-10.1 has the classes of CIFAR-10, the run has others", "leave --shifted out")
    found = [version for version in CIFAR10_1_VERSIONS if (folder / f"{version}_data.npy").is_file()]
    if not found:
        raise DataError(f"no {CIFAR10_1_VERSIONS[0]}_data.npy in {folder}", CIFAR10_1_REMEDY)
    data, truth = (folder / f"{found[0]}_{part}.npy" for part in ("data", "labels"))
    images, labels = _load_npy(data), _load_npy(truth)
    if images.dtype != np.uint8 or images.shape[1:] != (32, 32, 3) or not len(images):
        raise DataError(
            f"{data} is {images.dtype} {list(images.shape)}, expected uint8 [n, 32, 32, 3]", CIFAR10_1_REMEDY
        )
    if labels.dtype.kind not in "iu" or labels.shape != (len(images),):
        expected = f"expected {len(images):,} whole numbers"
        raise DataError(f"{truth} is {labels.dtype} {list(labels.shape)}, {expected}", CIFAR10_1_REMEDY)
    if not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
        raise DataError(
            f"{truth} holds labels from {labels.min()} to {labels.max()}, expected 0 to 9", CIFAR10_1_REMEDY
        )
    planar = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    return found[0], Split(planar, labels.astype(np.int64))


def _load_npy(path: Path) -> np.ndarray:
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"cannot read {path}: {error}", CIFAR10_1_REMEDY) from None
    if not isinstance(found, np.ndarray):
        raise DataError(f"{path} is an archive, expected one array", CIFAR10_1_REMEDY)
    return found


def evaluate_shifted(loaded: LoadedRun, name: str, split: Split) -> dict[str, Any]:
    """`name`, and the accuracy with its interval, the loss and the calibration error of the run on `split`."""
    scores = compute_scores(
        predict_logits(loaded.model, loaded.forward, split, loaded.device), torch.from_numpy(split.labels)
    )
    return {
        "name": name,
        "acc": scores.accuracy,
        "acc_interval": wilson_interval(scores.correct, scores.total),
        "correct": scores.correct,
        "total": scores.total,
        "loss": scores.loss,
        "ece": scores.ece,
    }


def evaluate_corruptions(loaded: LoadedRun, split: Split, console: Console | None) -> dict[str, Any]:
    """The accuracies on `split` under every row of CORRUPTIONS at severities 1 to 5, and `mean_acc` over all of them.

    A bar on a terminal. Not the mean corruption error, which is relative to another network's.
    """
    hidden = console is None or not console.is_terminal
    accuracies: dict[str, list[float]] = {}
    for name in track(CORRUPTIONS, "corrupt", console=console, disable=hidden, transient=True):
        accuracies[name] = [_corrupted_accuracy(loaded, split, CORRUPTIONS[name], severity) for severity in SEVERITIES]
    measured = [accuracy for row in accuracies.values() for accuracy in row]
    return {"mean_acc": sum(measured) / len(measured), "acc": accuracies, "seed": CORRUPTION_SEED}


def _corrupted_accuracy(loaded: LoadedRun, split: Split, corruption: Corruption, severity: int) -> float:
    generator = torch.Generator(loaded.device).manual_seed(CORRUPTION_SEED)

    def forward(images: Tensor) -> Tensor:
        return loaded.forward(apply_corruption(images, corruption, severity, generator))

    return compute_scores(
        predict_logits(loaded.model, forward, split, loaded.device), torch.from_numpy(split.labels)
    ).accuracy


def apply_corruption(images: Tensor, corruption: Corruption, severity: int, generator: torch.Generator) -> Tensor:
    """uint8 images [n,3,32,32] -> uint8, channels_last, cut to whole levels as CIFAR-10-C is.

    In float64: a GPU's shorter products would move values across a level.
    """
    damaged = corruption(images.double() / 255, severity, generator) * 255
    return (damaged + 1e-6).to(torch.uint8).contiguous(memory_format=torch.channels_last)
