"""CIFAR-10 and CIFAR-100 for everybody: find, download, verify, cache; and the split into training and validation.

`load` is the door; `official` and `archive` read the published files, `folders` everything else.
The arrays are numpy's, uint8 and int64: this room must not import torch, normalise or augment.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import platformdirs

from fastcifar.data import archive, class_folders, dataset_cache
from fastcifar.data.cifar_files import DATASETS, Dataset, Official, Split, read
from fastcifar.data.download import ELSEWHERE, fetch
from fastcifar.errors import DataError, UsageError, pick

__all__ = ["DATASETS", "NORMALISATIONS", "Dataset", "Split", "load", "normalisation", "split", "statistics"]

Channels = tuple[float, ...]

# Name -> (mean, std) of each channel of images scaled to [0, 1]. "cifar10" and "cifar100" are the true per-pixel values
# of the training sets; "kuangliu" is the mean of per-image deviations, 22-30 % too small and in wide use.
NORMALISATIONS: dict[str, tuple[Channels, Channels]] = {
    "cifar10": ((0.49139968, 0.48215841, 0.44653091), (0.24703223, 0.24348513, 0.26158784)),
    "kuangliu": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.50707516, 0.48654887, 0.44091784), (0.26733429, 0.25643846, 0.27615047)),
}


def normalisation(spec: str) -> tuple[Channels, Channels]:
    """Mean and std, three floats each in units of [0, 1], of a name or "MEAN:STD" (one number, or three with commas).

    Raises `UsageError` for anything else, and for a std that is not positive.
    """
    if ":" not in spec:
        return pick(NORMALISATIONS, spec, "normalisation")
    try:
        mean, std = (tuple(float(value) for value in part.split(",")) for part in spec.split(":"))
    except ValueError:
        mean = std = ()
    mean, std = (part * 3 if len(part) == 1 else part for part in (mean, std))
    if len(mean) != 3 or len(std) != 3 or not np.isfinite([*mean, *std]).all() or min(std) <= 0:
        remedy = (
            f"choose from {', '.join(NORMALISATIONS)}, or write MEAN:STD as 0.5,0.5,0.5:0.25,0.25,0.25 with std > 0"
        )
        raise UsageError(f"--normalise {spec!r} is no normalisation", remedy)
    return mean, std


def statistics(images: np.ndarray) -> tuple[Channels, Channels]:
    """Mean and std of each channel of `images` uint8 [n,3,h,w], scaled to [0, 1]: exact, from counts of the values."""
    counts = np.zeros((3, 256), np.int64)
    for start in range(0, len(images), 1000):  # bincount takes eight bytes a pixel
        for channel in range(3):
            counts[channel] += np.bincount(images[start : start + 1000, channel].ravel(), minlength=256)
    values, pixels = np.arange(256) / 255, counts[0].sum()
    mean = counts @ values / pixels
    std = np.sqrt((counts * (values - mean[:, None]) ** 2).sum(1) / pixels)
    return tuple(mean.tolist()), tuple(std.tolist())


def split(labels: np.ndarray, val_size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted int64 positions `(train, val)` in `labels` int64 [n]: exactly `val_size`, stratified, fixed by `seed`.

    Each class gives its share rounded down, and those that lost most to the rounding give one more.
    Raises `UsageError` for a size outside [0, n) and for a negative seed.
    """
    n = len(labels)
    if not 0 <= val_size < max(n, 1):
        raise UsageError(f"--val-size {val_size} of {n:,} training images", f"choose 0 to {max(n - 1, 0):,}")
    if seed < 0:
        raise UsageError(f"--val-seed {seed} is negative", "choose 0 or more")
    classes, counts = np.unique(labels, return_counts=True)
    quota, lost = np.divmod(val_size * counts, max(n, 1))
    quota[np.argsort(-lost, kind="stable")[: val_size - quota.sum()]] += 1
    # Raw words, not `permutation`: numpy promises the bit stream for ever, the methods built on it only per version.
    order = np.argsort(np.random.Philox(key=seed).random_raw(n), kind="stable")
    chosen = np.zeros(n, bool)
    for label, size in zip(classes, quota, strict=True):
        chosen[order[labels[order] == label][:size]] = True
    return np.flatnonzero(~chosen).astype(np.int64), np.flatnonzero(chosen).astype(np.int64)


@dataclass(frozen=True)
class _Found:
    """What `_find` recognised: what it is, where it is, the files its cache depends on, and how to read it."""

    kind: str
    path: Path
    files: Callable[[], list[Path]]
    read: Callable[[], tuple[dict[str, Split], tuple[str, ...], bool, str]]


def load(
    data: str | None = None,
    dataset: str = "cifar10",
    *,
    cache: Path | None = None,
    download: bool = True,
    fresh: bool = False,
) -> Dataset:
    """The data set in `data`: an official folder or .tar.gz (Python or binary), class folders of images, a folder that
    contains one of these, or "synthetic[:N]".

    Without `data`: the environment variable FASTCIFAR_DATA, then the cache folder (`cache`, or the user's), then, if
    `download`, the official archive. What was read is kept in the cache folder as .npy and mapped from there; where
    that cannot be written the arrays stay in memory. `fresh` reads and checks the files even if they are kept.
    Everything worth saying comes as one `UserWarning` a call.
    Raises `DataError` for what is missing, damaged or malicious, `UsageError` for an unknown `dataset`.
    """
    row = pick(DATASETS, dataset, "data set")
    folder = cache if cache is not None else Path(platformdirs.user_cache_dir("fastcifar"))
    data = data or os.environ.get("FASTCIFAR_DATA")
    if data and data.split(":")[0] == "synthetic":
        return class_folders.synthetic(data, dataset, row.classes, row.names)
    try:
        found = _find(Path(data).expanduser(), dataset, row) if data else _in_cache(folder, dataset, row, download)
        loaded, notes = dataset_cache.through(folder, dataset, found.path, found.files(), found.read, fresh)
    except OSError as error:
        raise DataError(f"cannot read {error.filename or data}: {error.strerror or error}", ELSEWHERE) from None
    splits, classes, official, note = loaded
    if note:
        notes.insert(0, note)
    if notes:
        warnings.warn("; ".join(notes), UserWarning, stacklevel=2)
    return Dataset(dataset, splits["train"], splits["test"], classes, str(found.path), official, found.kind)


def _in_cache(folder: Path, dataset: str, row: Official, allowed: bool) -> _Found:
    found = _recognise(folder, row) if folder.is_dir() else None
    if found is not None:
        return found
    if not allowed:
        raise DataError(f"{dataset} is not in {folder}", ELSEWHERE)
    return _tar(fetch(row.url, row.tar_md5, folder / row.python.tar), row)


def _find(path: Path, dataset: str, row: Official) -> _Found:
    """What `path` is, by what it holds; `DataError` says what was looked for."""
    if not path.exists():
        raise DataError(f"no such file or folder: {path}", ELSEWHERE)
    found = _recognise(path, row)
    if found is not None:
        return found
    for name, other in DATASETS.items():
        if name != dataset and _recognise(path, other) is not None:
            raise DataError(f"{path} holds {name}, expected {dataset}", f"say --dataset {name}")
    places = [f"{row.python.folder}/", f"{row.binary.folder}/", "their files", row.python.tar, row.binary.tar]
    looked = ", ".join([*places, "train/<class>/*.png"])
    raise DataError(f"{path} holds no {dataset}; looked for {looked}", ELSEWHERE)


def _recognise(path: Path, row: Official) -> _Found | None:
    if path.is_file():
        return _tar(path, row)
    for kind, packing in (("Python", row.python), ("binary", row.binary)):
        names = [*(batch.name for batch in packing.batches), packing.meta]
        for folder in (path, path / packing.folder):
            if any((folder / name).is_file() for name in names):
                return _Found(
                    f"folder of the {kind} version",
                    folder.resolve(),
                    lambda folder=folder, names=names: [folder / name for name in names],
                    lambda folder=folder, packing=packing: read(
                        row, archive.folder_members(folder, row, packing), folder
                    ),
                )
    for packing in (row.python, row.binary):
        if (path / packing.tar).is_file():
            return _tar(path / packing.tar, row)
    if (path / "train").is_dir():
        return _Found(
            "class folders of images",
            path.resolve(),
            lambda: class_folders.image_files(path),
            lambda: class_folders.read(path, row.names),
        )
    return None


def _tar(path: Path, row: Official) -> _Found:
    return _Found("archive", path.resolve(), lambda: [path], lambda: read(row, archive.tar_members(path, row), path))
