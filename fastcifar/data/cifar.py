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
from fastcifar.data.cifar_files import DATASETS, Dataset, DatasetSpec, Split, read_official_files
from fastcifar.data.download import DATA_REMEDY, download_file
from fastcifar.data.normalization import NORMALIZATIONS, channel_mean_std, parse_normalization
from fastcifar.errors import DataError, UsageError, lookup

__all__ = [
    "DATASETS",
    "NORMALIZATIONS",
    "Dataset",
    "Split",
    "channel_mean_std",
    "load_dataset",
    "parse_normalization",
    "stratified_split",
]


def stratified_split(labels: np.ndarray, val_size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
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
class _DataSource:
    """What `_find` recognised: what it is, where it is, the files its cache depends on, and how to read it."""

    kind: str
    path: Path
    files: Callable[[], list[Path]]
    read: Callable[[], tuple[dict[str, Split], tuple[str, ...], bool, str]]


def load_dataset(
    data: str | None = None,
    dataset: str = "cifar10",
    *,
    cache_dir: Path | None = None,
    download: bool = True,
    refresh_cache: bool = False,
) -> Dataset:
    """The data set in `data`: an official folder or .tar.gz (Python or binary), class folders of images, a folder that
    contains one of these, or "synthetic[:N]".

    Without `data`: the environment variable FASTCIFAR_DATA, then the cache folder (`cache`, or the user's), then, if
    `download`, the official archive. What was read is kept in the cache folder as .npy and mapped from there; where
    that cannot be written the arrays stay in memory. `fresh` reads and checks the files even if they are kept.
    Everything worth saying comes as one `UserWarning` a call.
    Raises `DataError` for what is missing, damaged or malicious, `UsageError` for an unknown `dataset`.
    """
    row = lookup(DATASETS, dataset, "data set")
    folder = cache_dir if cache_dir is not None else Path(platformdirs.user_cache_dir("fastcifar"))
    data = data or os.environ.get("FASTCIFAR_DATA")
    if data and data.split(":")[0] == "synthetic":
        return class_folders.make_synthetic_dataset(data, dataset, row.num_classes, row.class_names)
    try:
        found = (
            _identify_source(Path(data).expanduser(), dataset, row)
            if data
            else _find_or_download(folder, dataset, row, download)
        )
        loaded, notes = dataset_cache.load_or_cache(
            folder, dataset, found.path, found.files(), found.read, refresh_cache
        )
    except OSError as error:
        raise DataError(f"cannot read {error.filename or data}: {error.strerror or error}", DATA_REMEDY) from None
    splits, classes, official, note = loaded
    if note:
        notes.insert(0, note)
    if notes:
        warnings.warn("; ".join(notes), UserWarning, stacklevel=2)
    return Dataset(dataset, splits["train"], splits["test"], classes, str(found.path), official, found.kind)


def _find_or_download(cache_dir: Path, dataset: str, spec: DatasetSpec, download: bool) -> _DataSource:
    found = _detect_source(cache_dir, spec) if cache_dir.is_dir() else None
    if found is not None:
        return found
    if not download:
        raise DataError(f"{dataset} is not in {cache_dir}", DATA_REMEDY)
    return _archive_source(download_file(spec.url, spec.archive_md5, cache_dir / spec.python.archive_name), spec)


def _identify_source(path: Path, dataset: str, spec: DatasetSpec) -> _DataSource:
    """What `path` is, by what it holds; `DataError` says what was looked for."""
    if not path.exists():
        raise DataError(f"no such file or folder: {path}", DATA_REMEDY)
    found = _detect_source(path, spec)
    if found is not None:
        return found
    for name, other in DATASETS.items():
        if name != dataset and _detect_source(path, other) is not None:
            raise DataError(f"{path} holds {name}, expected {dataset}", f"say --dataset {name}")
    places = [
        f"{spec.python.folder}/",
        f"{spec.binary.folder}/",
        "their files",
        spec.python.archive_name,
        spec.binary.archive_name,
    ]
    looked = ", ".join([*places, "train/<class>/*.png"])
    raise DataError(f"{path} holds no {dataset}; looked for {looked}", DATA_REMEDY)


def _detect_source(path: Path, spec: DatasetSpec) -> _DataSource | None:
    if path.is_file():
        return _archive_source(path, spec)
    for kind, packing in (("Python", spec.python), ("binary", spec.binary)):
        names = [*(batch.name for batch in packing.batches), packing.meta_file]
        for folder in (path, path / packing.folder):
            if any((folder / name).is_file() for name in names):
                return _DataSource(
                    f"folder of the {kind} version",
                    folder.resolve(),
                    lambda folder=folder, names=names: [folder / name for name in names],
                    lambda folder=folder, packing=packing: read_official_files(
                        spec, archive.iter_folder_files(folder, spec, packing), folder
                    ),
                )
    for packing in (spec.python, spec.binary):
        if (path / packing.archive_name).is_file():
            return _archive_source(path / packing.archive_name, spec)
    if (path / "train").is_dir():
        return _DataSource(
            "class folders of images",
            path.resolve(),
            lambda: class_folders.list_image_files(path),
            lambda: class_folders.read_class_folders(path, spec.class_names),
        )
    return None


def _archive_source(path: Path, spec: DatasetSpec) -> _DataSource:
    return _DataSource(
        "archive",
        path.resolve(),
        lambda: [path],
        lambda: read_official_files(spec, archive.iter_tar_files(path, spec), path),
    )
