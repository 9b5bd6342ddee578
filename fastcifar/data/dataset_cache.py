"""Cache of decoded data sets on disk: `<cache>/<dataset>-<key>/` with four .npy files and meta.json.

An entry is put in place by one rename, so any number of processes may write and read at once.
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

from fastcifar.data.cifar_files import SourceContents, Split

CACHE_FORMAT_VERSION = 1  # increase it when the meaning of the files changes; older entries are then ignored


def load_or_cache(
    cache_dir: Path,
    dataset: str,
    source: Path,
    files: list[Path],
    read_source: Callable[[], SourceContents],
    refresh_cache: bool = False,
) -> tuple[SourceContents, str]:
    """Return the result of `read_source()`, from the cache entry for `files` if it is intact, and a note for the user.

    Otherwise write the entry; if that fails, the note says so. `refresh_cache` replaces an entry that differs.
    """
    entry = cache_dir / f"{dataset}-{_cache_key(source, files)}"
    cached = _load_entry(entry)
    if cached is not None and not refresh_cache:
        return cached, ""
    contents = read_source()
    if cached is not None:
        if _same_contents(cached, contents):
            return cached, ""
        shutil.rmtree(entry, ignore_errors=True)
    try:
        _write_entry(entry, contents)
    except OSError as error:
        return contents, f"cannot cache the data set in {cache_dir} ({error.strerror or error}): it stays in memory"
    return _load_entry(entry) or contents, ""


def _cache_key(source: Path, files: list[Path]) -> str:
    """Hash the source path and, of each file, name, size and modification time; of a missing file the name only."""
    digest = hashlib.sha256(f"{CACHE_FORMAT_VERSION}\n{source}\n".encode())
    for path in files:
        try:
            stat = path.stat()
        except OSError:
            digest.update(f"{path.name}\n".encode())
            continue
        digest.update(f"{path.parent.name}/{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _load_entry(entry: Path) -> SourceContents | None:
    """Return the contents of an entry, its images memory-mapped read-only; None if anything is missing or damaged."""
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
            # Labels are small, so they are copied, which makes them writable.
            split_name: Split(arrays[f"{split_name}_images"], np.array(arrays[f"{split_name}_labels"]))
            for split_name in ("train", "test")
        }
        return SourceContents(splits, tuple(map(str, meta["classes"])), bool(meta["official"]), str(meta["note"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError):
        return None


def _same_contents(a: SourceContents, b: SourceContents) -> bool:
    pairs = [(a.splits[split_name], b.splits[split_name]) for split_name in ("train", "test")]
    equal = (np.array_equal(x.images, y.images) and np.array_equal(x.labels, y.labels) for x, y in pairs)
    return a[1:] == b[1:] and all(equal)


def _write_entry(entry: Path, contents: SourceContents) -> None:
    """Write an entry atomically. Raises `OSError`, and then leaves nothing behind."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    for path in entry.parent.glob(f"{entry.name}.*.tmp"):
        if time.time() - path.stat().st_mtime > 3600:  # left behind by a killed process
            shutil.rmtree(path, ignore_errors=True)
    temporary = entry.with_name(f"{entry.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    replaced = temporary.with_suffix(".old.tmp")
    temporary.mkdir()
    try:
        sizes = {}
        for split_name, split in contents.splits.items():
            for name, array in ((f"{split_name}_images", split.images), (f"{split_name}_labels", split.labels)):
                path = temporary / f"{name}.npy"
                np.save(path, array, allow_pickle=False)
                sizes[name] = (path.stat().st_size, array.shape, array.dtype.name)
        meta = {
            "format": CACHE_FORMAT_VERSION,
            "arrays": sizes,
            "classes": contents.classes,
            "official": contents.is_official,
            "note": contents.note,
        }
        (temporary / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
        if entry.exists() and _load_entry(entry) is None:
            # A rename cannot replace a folder that contains files, so the damaged one is moved away first.
            entry.rename(replaced)
        try:
            temporary.rename(entry)
        except OSError:
            if _load_entry(entry) is None:  # otherwise another process has already written the same contents
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
