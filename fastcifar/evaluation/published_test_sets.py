"""The .npy files of CIFAR-10.1, CIFAR-10-C and CIFAR-100-C, checked before the network runs on them."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastcifar.data.arrays import CIFAR10_1_REMEDY, check_labels, open_npy, read_npy_pair, to_planar
from fastcifar.data.cifar import DATASETS, Split
from fastcifar.errors import DataError
from fastcifar.evaluation.corruptions import SEVERITIES

CIFAR10_1_VERSIONS = ("cifar10.1_v6", "cifar10.1_v4")  # v6 first: it is class-balanced and recommended by its authors
CORRUPTED_REMEDY = "unpack the official archive again, and give the folder of its .npy files"
# The published mean is that of the benchmark's corruptions, without the extra ones.
BENCHMARK_CORRUPTIONS = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow",
    "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
)  # fmt: skip
EXTRA_CORRUPTIONS = ("speckle_noise", "gaussian_blur", "spatter", "saturate")


class CorruptedImages(NamedTuple):
    """Images by corruption, memory-mapped views uint8 [5 * n, 3, 32, 32] by ascending severity, and labels [5 * n]."""

    folder: str
    images: dict[str, np.ndarray]
    labels: np.ndarray

    @property
    def num_images(self) -> int:
        return len(self.images) * len(self.labels)

    def split(self, name: str, severity: int) -> Split:
        """Return the images of a corruption at a severity of 1 to 5."""
        n = len(self.labels) // len(SEVERITIES)
        part = slice((severity - 1) * n, severity * n)
        return Split(np.ascontiguousarray(self.images[name][part]), self.labels[part])


def load_cifar10_1(folder: Path, classes: list[str]) -> tuple[str, Split]:
    """Return the version name and the images of CIFAR-10.1 (Recht et al. 2018) in `folder`, preferring v6 over v4."""
    if tuple(classes) != DATASETS["cifar10"].class_names:
        raise DataError("CIFAR-10.1 has the classes of CIFAR-10, but the run has other classes", "omit --shifted")
    for version in CIFAR10_1_VERSIONS:
        if (folder / f"{version}_data.npy").is_file():
            contents = read_npy_pair(folder / f"{version}_data.npy", tuple(classes))
            return version, contents.splits["test"]
    raise DataError(f"no {CIFAR10_1_VERSIONS[0]}_data.npy in {folder}", CIFAR10_1_REMEDY)


def open_corrupted(folder: Path, classes: list[str], dataset: str) -> CorruptedImages:
    """Open the files of CIFAR-10-C or CIFAR-100-C (Hendrycks and Dietterich, 2019) in `folder`.

    Each has the images of five severities one after another. Raises `DataError` if one is missing or damaged, or if
    `classes`, those of a run on `dataset`, are not the classes of the files.
    """
    names = (*BENCHMARK_CORRUPTIONS, *EXTRA_CORRUPTIONS)
    if missing := [f"{name}.npy" for name in ("labels", *names) if not (folder / f"{name}.npy").is_file()]:
        count = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise DataError(f"missing in {folder}: {', '.join(missing[:3])}{count}", CORRUPTED_REMEDY)
    labels = open_npy(folder / "labels.npy", CORRUPTED_REMEDY)
    labels = check_labels(labels, labels.size, str(folder / "labels.npy"))
    if labels.max() + 1 != len(classes) or DATASETS[dataset].class_names not in ((), tuple(classes)):
        problem = f"{folder} has {labels.max() + 1} classes, which are not the {len(classes)} classes of the run"
        raise DataError(problem, "give CIFAR-10-C for a run on CIFAR-10, and CIFAR-100-C for one on CIFAR-100")
    images = {}
    for name in names:
        path = folder / f"{name}.npy"
        images[name], _ = to_planar(open_npy(path, CORRUPTED_REMEDY), str(path), CORRUPTED_REMEDY)
        if len(images[name]) != len(labels) or len(labels) % len(SEVERITIES):
            expected = f"{len(labels):,}, as many as labels, and a multiple of {len(SEVERITIES)}"
            raise DataError(f"{path} has {len(images[name]):,} images, expected {expected}", CORRUPTED_REMEDY)
    return CorruptedImages(str(folder), images, labels)
