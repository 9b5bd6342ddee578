"""Decoded data sets on disk: `<cache>/<dataset>-<fingerprint>/` of four .npy files and meta.json.

An entry appears by one rename, so any number of processes may write and read at once; one that is damaged, or of files
that have changed since, is made again. It must not fail a run: what cannot be kept stays in memory, and a note says so.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fastcifar.data.cifar_files import Split

CACHE_FORMAT_VERSION = 1  # raise it whenever what the files mean changes, and every older entry is forgotten
DatasetContents = tuple[dict[str, Split], tuple[str, ...], bool, str]


def load_or_cache(
    cache_dir: Path,
    dataset: str,
    source: Path,
    files: list[Path],
    read_source: Callable[[], DatasetContents],
    refresh_cache: bool = False,
) -> tuple[DatasetContents, list[str]]:
    """What `read()` returns, from the cache entry of `files` if it is whole, else made and kept for the next time.

    `fresh`: read in any case, and make the entry again if it holds anything else.
    Also the notes for the user: one if the entry could not be written.
    """
    entry = cache_dir / f"{dataset}-{_cache_key(source, files)}"
    kept = _load_entry(entry)
    if kept is not None and not refresh_cache:
        return kept, []
    loaded = read_source()
    if kept is not None:
        if _same_contents(kept, loaded):
            return kept, []
        shutil.rmtree(entry, ignore_errors=True)
    try:
        _write_entry(entry, loaded)
    except OSError as error:
        return loaded, [f"cannot cache the data set in {cache_dir} ({error.strerror or error}): it stays in memory"]
    return _load_entry(entry) or loaded, []


def _cache_key(source: Path, files: list[Path]) -> str:
    """Of the path and every file's name, size and time: 16 hexadecimal digits. A missing file counts as such."""
    digest = hashlib.sha256(f"{CACHE_FORMAT_VERSION}\n{source}\n".encode())
    for path in files:
        try:
            stat = path.stat()
        except OSError:
            digest.update(f"{path.name}\n".encode())
            continue
        digest.update(f"{path.parent.name}/{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _load_entry(entry: Path) -> DatasetContents | None:
    """The entry, its arrays mapped read-only; None unless all of it is there, as it was written."""
    try:
        meta = json.loads((entry / "meta.json").read_text(encoding="utf-8"))
        arrays = {}
        for name, (size, shape, dtype) in meta["arrays"].items():
            path = entry / f"{name}.npy"
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            if path.stat().st_size != size or list(array.shape) != shape or array.dtype != dtype:
                return None
            arrays[name] = array
        splits = {
            # Labels are small, and a copy of them is writable and contiguous for every consumer.
            part: Split(arrays[f"{part}_images"], np.array(arrays[f"{part}_labels"]))
            for part in ("train", "test")
        }
        return splits, tuple(map(str, meta["classes"])), bool(meta["official"]), str(meta["note"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError):
        return None


def _same_contents(a: DatasetContents, b: DatasetContents) -> bool:
    pairs = [(a[0][part], b[0][part]) for part in ("train", "test")]
    equal = (np.array_equal(x.images, y.images) and np.array_equal(x.labels, y.labels) for x, y in pairs)
    return a[1:] == b[1:] and all(equal)


def _write_entry(entry: Path, contents: DatasetContents) -> None:
    """The entry, whole or not at all; raises `OSError`, with nothing left behind."""
    splits, classes, official, note = contents
    entry.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale_temporaries(entry)
    made = entry.with_name(f"{entry.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    made.mkdir()
    try:
        sizes = {}
        for part, split in splits.items():
            for name, array in ((f"{part}_images", split.images), (f"{part}_labels", split.labels)):
                path = made / f"{name}.npy"
                np.save(path, array, allow_pickle=False)
                sizes[name] = (path.stat().st_size, array.shape, array.dtype.name)
        meta = {"format": CACHE_FORMAT_VERSION, "arrays": sizes, "classes": classes, "official": official, "note": note}
        (made / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
        if entry.exists() and _load_entry(entry) is None:
            # A rename cannot replace a folder that holds files, so the damaged one steps aside first.
            entry.rename(made.with_suffix(".old.tmp"))
        try:
            made.rename(entry)
        except OSError:
            if _load_entry(entry) is None:  # otherwise another process was first, with the same content
                raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
        shutil.rmtree(made.with_suffix(".old.tmp"), ignore_errors=True)


def _remove_stale_temporaries(entry: Path) -> None:
    """Removes what killed processes left: temporaries an hour old, which no living writer needs."""
    for path in entry.parent.glob(f"{entry.name}.*.tmp"):
        if time.time() - path.stat().st_mtime > 3600:
            shutil.rmtree(path, ignore_errors=True)
