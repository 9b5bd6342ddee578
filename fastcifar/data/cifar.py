"""CIFAR-10 and CIFAR-100: locating, downloading, verifying, caching, splitting. Does not import torch."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import platformdirs

from fastcifar.data import archive, class_folders, dataset_cache
from fastcifar.data.cifar_files import DATASETS, Dataset, DatasetSpec, SourceContents, Split, read_official_files
from fastcifar.data.download import DATA_REMEDY, download_file
from fastcifar.errors import DataError, UsageError, lookup

__all__ = ["DATASETS", "Dataset", "Split", "load_dataset", "stratified_split"]


def stratified_split(labels: np.ndarray, val_size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return sorted int64 indices `(train, val)` into `labels` int64 [n]: a stratified split fixed by `seed`.

    Each class contributes its share rounded down, and the classes with the largest remainders contribute one more.
    """
    n = len(labels)
    if not 0 <= val_size < max(n, 1):
        raise UsageError(
            f"--val-size {val_size} is out of range for {n:,} training images", f"choose 0 to {max(n - 1, 0):,}"
        )
    if seed < 0:
        raise UsageError(f"--val-seed {seed} is negative", "choose 0 or more")
    classes, counts = np.unique(labels, return_counts=True)
    quota, remainder = np.divmod(val_size * counts, max(n, 1))
    quota[np.argsort(-remainder, kind="stable")[: val_size - quota.sum()]] += 1
    # Raw words, not `permutation`: NumPy keeps the bit stream stable across versions, but not the methods of Generator.
    order = np.argsort(np.random.Philox(key=seed).random_raw(n), kind="stable")
    in_val = np.zeros(n, bool)
    for label, size in zip(classes, quota, strict=True):
        in_val[order[labels[order] == label][:size]] = True
    return np.flatnonzero(~in_val).astype(np.int64), np.flatnonzero(in_val).astype(np.int64)


@dataclass(frozen=True)
class _DataSource:
    """A recognized source: its kind in words, its path, the files that identify its cache entry, and its reader."""

    kind: str
    path: Path
    files: list[Path]
    read: Callable[[], SourceContents]


def load_dataset(
    data: str | None = None,
    dataset: str = "cifar10",
    *,
    cache_dir: Path | None = None,
    download: bool = True,
    refresh_cache: bool = False,
) -> Dataset:
    """Load the data set `data`: official files, class folders of images, a folder with one of these, or "synthetic[:N]".

    Official files are a folder or a .tar.gz of the Python or binary version. If `data` is None, use the environment variable FASTCIFAR_DATA, then the cache folder (`cache_dir`, or the user's
    cache folder), then, if `download`, download the official archive. The decoded arrays are stored in the cache folder
    as .npy files and memory-mapped. `refresh_cache` reads and checks the source even if a cache entry exists. All
    remarks are issued as one `UserWarning`. Raises `DataError` if the data is missing, damaged or malicious.
    """
    spec = lookup(DATASETS, dataset, "data set")
    folder = cache_dir if cache_dir is not None else Path(platformdirs.user_cache_dir("fastcifar"))
    data = data or os.environ.get("FASTCIFAR_DATA")
    if data and data.split(":")[0] == "synthetic":
        return class_folders.make_synthetic_dataset(data, dataset, spec)
    try:
        if data:
            source = _identify_source(Path(data).expanduser(), dataset, spec)
        else:
            source = _find_or_download(folder, dataset, spec, download)
        contents, cache_note = dataset_cache.load_or_cache(
            folder, dataset, source.path, source.files, source.read, refresh_cache
        )
    except OSError as error:
        raise DataError(f"cannot read {error.filename or data}: {error.strerror or error}", DATA_REMEDY) from None
    notes = [note for note in (contents.note, cache_note) if note]
    if notes:
        warnings.warn("; ".join(notes), UserWarning, stacklevel=2)
    splits, classes, is_official, _ = contents
    return Dataset(dataset, splits["train"], splits["test"], classes, str(source.path), is_official, source.kind)


def _find_or_download(cache_dir: Path, dataset: str, spec: DatasetSpec, download: bool) -> _DataSource:
    source = _detect_source(cache_dir, spec) if cache_dir.is_dir() else None
    if source is not None:
        return source
    if not download:
        raise DataError(f"{dataset} is not in {cache_dir}", DATA_REMEDY)
    return _archive_source(download_file(spec.url, spec.archive_md5, cache_dir / spec.python.archive_name), spec)


def _identify_source(path: Path, dataset: str, spec: DatasetSpec) -> _DataSource:
    """Recognize the source at `path` by its contents. Raises `DataError` that lists the supported layouts."""
    if not path.exists():
        raise DataError(f"no such file or folder: {path}", DATA_REMEDY)
    source = _detect_source(path, spec)
    if source is not None:
        return source
    for name, other_spec in DATASETS.items():
        if name != dataset and _detect_source(path, other_spec) is not None:
            raise DataError(f"{path} contains {name}, expected {dataset}", f"give --dataset {name}")
    folders = f"{spec.python.folder}/, {spec.binary.folder}/, the files of these folders"
    others = f"{spec.python.archive_name}, {spec.binary.archive_name}, train/<class>/*.png"
    raise DataError(f"{path} contains no {dataset}; expected one of {folders}, {others}", DATA_REMEDY)


def _detect_source(path: Path, spec: DatasetSpec) -> _DataSource | None:
    if path.is_file():
        return _archive_source(path, spec)
    for version, layout in (("Python", spec.python), ("binary", spec.binary)):
        for folder in (path, path / layout.folder):
            files = [folder / name for name in layout.file_names]
            if any(file.is_file() for file in files):
                members = archive.iter_folder_files(folder, spec, layout)
                read = partial(read_official_files, spec, members, folder)
                return _DataSource(f"folder of the {version} version", folder.resolve(), files, read)
    for layout in (spec.python, spec.binary):
        if (path / layout.archive_name).is_file():
            return _archive_source(path / layout.archive_name, spec)
    if (path / "train").is_dir():
        files = class_folders.list_image_files(path)
        read = partial(class_folders.read_class_folders, path, spec.class_names)
        return _DataSource("class folders of images", path.resolve(), files, read)
    return None


def _archive_source(path: Path, spec: DatasetSpec) -> _DataSource:
    read = partial(read_official_files, spec, archive.iter_tar_files(path, spec), path)
    return _DataSource("archive", path.resolve(), [path], read)
