"""Evaluate a trained network under distribution shift: on corrupted test images and on CIFAR-10.1.

Nothing is trained or selected on these images.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TypedDict

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

CIFAR10_1_VERSIONS = ("cifar10.1_v6", "cifar10.1_v4")  # v6 first: it is class-balanced and recommended by its authors
NUM_CORRUPTED_TEST_SETS = len(CORRUPTIONS) * len(SEVERITIES)
CORRUPTION_SEED = 0  # fixed, so that all runs are compared on the same images
CIFAR10_1_REMEDY = "give a copy of the folder https://github.com/modestyachts/CIFAR-10.1/tree/master/datasets"


class ShiftedResult(TypedDict):
    """The results on a version of CIFAR-10.1; `acc_interval` is the 95 % confidence interval of the accuracy."""

    name: str
    acc: float
    acc_interval: tuple[float, float]
    correct: int
    total: int
    loss: float
    ece: float


class CorruptionsResult(TypedDict):
    """The accuracies on corrupted test images, of each corruption by severity.

    `mean_acc` is their mean. It is not the mean corruption error, which is relative to a reference network.
    """

    mean_acc: float
    acc: dict[str, list[float]]
    seed: int


def load_cifar10_1(folder: Path, classes: list[str]) -> tuple[str, Split]:
    """Return the version name and the images of CIFAR-10.1 (Recht et al. 2018) in `folder`, preferring v6 over v4.

    Raises `DataError` if `classes`, those of the run, are not those of CIFAR-10, or if a file is not as published.
    """
    if tuple(classes) != DATASETS["cifar10"].class_names:
        raise DataError("CIFAR-10.1 has the classes of CIFAR-10, but the run has other classes", "omit --shifted")
    versions = [version for version in CIFAR10_1_VERSIONS if (folder / f"{version}_data.npy").is_file()]
    if not versions:
        raise DataError(f"no {CIFAR10_1_VERSIONS[0]}_data.npy in {folder}", CIFAR10_1_REMEDY)
    images_path, labels_path = (folder / f"{versions[0]}_{content}.npy" for content in ("data", "labels"))
    images, labels = _load_npy(images_path), _load_npy(labels_path)
    if images.dtype != np.uint8 or images.shape[1:] != (32, 32, 3) or not len(images):
        actual = f"{images.dtype} {list(images.shape)}"
        raise DataError(f"{images_path} is {actual}, expected uint8 [n, 32, 32, 3]", CIFAR10_1_REMEDY)
    if labels.dtype.kind not in "iu" or labels.shape != (len(images),):
        expected = f"expected {len(images):,} integers"
        raise DataError(f"{labels_path} is {labels.dtype} {list(labels.shape)}, {expected}", CIFAR10_1_REMEDY)
    if not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
        actual = f"labels from {labels.min()} to {labels.max()}"
        raise DataError(f"{labels_path} contains {actual}, expected 0 to 9", CIFAR10_1_REMEDY)
    planar = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    return versions[0], Split(planar, labels.astype(np.int64))


def _load_npy(path: Path) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"cannot read {path}: {error}", CIFAR10_1_REMEDY) from None
    if not isinstance(array, np.ndarray):
        raise DataError(f"{path} is an archive, expected one array", CIFAR10_1_REMEDY)
    return array


def evaluate_shifted(loaded: LoadedRun, name: str, split: Split) -> ShiftedResult:
    """Return the scores on `split`, the images of the CIFAR-10.1 version `name`."""
    scores = loaded.evaluate(split)
    return {
        "name": name,
        "acc": scores.accuracy,
        "acc_interval": wilson_interval(scores.correct, scores.total),
        "correct": scores.correct,
        "total": scores.total,
        "loss": scores.loss,
        "ece": scores.ece,
    }


def evaluate_corruptions(loaded: LoadedRun, split: Split, console: Console | None) -> CorruptionsResult:
    """Return the accuracies on `split` for every corruption and severity. A terminal `console` shows a progress bar."""
    no_progress_bar = console is None or not console.is_terminal
    accuracies: dict[str, list[float]] = {}
    for name in track(CORRUPTIONS, "corruptions", console=console, disable=no_progress_bar, transient=True):
        accuracies[name] = [_corrupted_accuracy(loaded, split, CORRUPTIONS[name], severity) for severity in SEVERITIES]
    mean = float(np.mean(list(accuracies.values())))
    return {"mean_acc": mean, "acc": accuracies, "seed": CORRUPTION_SEED}


def _corrupted_accuracy(loaded: LoadedRun, split: Split, corruption: Corruption, severity: int) -> float:
    generator = torch.Generator(loaded.device).manual_seed(CORRUPTION_SEED)

    def forward(images: Tensor) -> Tensor:
        return loaded.forward(apply_corruption(images, corruption, severity, generator))

    return replace(loaded, forward=forward).evaluate(split).accuracy


def apply_corruption(images: Tensor, corruption: Corruption, severity: int, generator: torch.Generator) -> Tensor:
    """Apply a corruption to uint8 images [n,3,32,32]; return uint8 images in channels_last memory format.

    Values are truncated to integers as in CIFAR-10-C. The corruption is computed in float64, because
    reduced-precision matrix products on a GPU would change some of the truncated values.
    """
    corrupted = corruption(images.double() / 255, severity, generator) * 255
    return (corrupted + 1e-6).to(torch.uint8).contiguous(memory_format=torch.channels_last)
