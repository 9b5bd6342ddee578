"""CIFAR-10 and CIFAR-100: locating, downloading, verifying, caching, splitting. Does not import torch."""

import contextlib
import hashlib
import http.client
import json
import os
import shutil
import sys
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import platformdirs
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from fastcifar.data import arrays, class_folders
from fastcifar.data.archives import iter_folder_files, iter_tar_files
from fastcifar.data.cifar_files import DATASETS, Dataset, DatasetSpec, SourceContents, Split, read_official_files
from fastcifar.data.safe_pickle import is_html_page
from fastcifar.errors import DataError, disk_errors, lookup
from fastcifar.files import lock_folder
from fastcifar.format import DataConsole
from fastcifar.python_objects import PYTHON_DATA, active_objects
from fastcifar.recipe import Recipe

DATA_VARIABLE = "FASTCIFAR_DATA"  # environment variable with the default of --data
DATA_REMEDY = "give --data PATH, set FASTCIFAR_DATA, or try --data synthetic"
TIMEOUT_S = 30.0  # longest wait for the server, in seconds; a download as a whole may take longer
_CHUNK_BYTES = 2**18
_MAX_BYTES = 2**30  # a larger download is aborted; the largest official archive has 170 MB


# An entry of the cache is a folder `<cache>/<dataset>-<key>/` with two .npy files for each split and meta.json. A
# complete entry is moved to its final name by one rename, so any number of processes may write and read simultaneously.
CACHE_FORMAT_VERSION = 2  # increase it when the meaning of the files changes; older entries are then ignored


class _DataSource(NamedTuple):
    kind: str  # in words
    path: Path
    files: list[Path]  # they identify the cache entry
    read: Callable[[], SourceContents]
    note: str = ""  # for the user
    own_images: bool = False


def load_dataset(
    data: str | None = None,
    dataset: str = "cifar10",
    *,
    cache_dir: Path | None = None,
    download: bool = True,
    refresh_cache: bool = False,
    val_seed: int = 0,
    resize: int | None = None,
) -> Dataset:
    """Load the data set `data`: official files, class folders, a folder of one of these, .npz, or "synthetic[:N]".

    Official files are a folder or .tar.gz of the Python or binary version. If `data` is None, use the environment
    variable FASTCIFAR_DATA, then the cache folder (`cache_dir`, or the user's), then, if `download`, download the
    official archive. The decoded arrays are stored in the cache folder and memory-mapped. `refresh_cache` reads and
    checks the source even if a cache entry exists. Own images may have any size with `resize=32`, and are split by
    `val_seed` if the source has no splits. All remarks are issued as one `UserWarning`. Raises `DataError` if the data
    is missing, damaged or malicious.
    """
    spec = lookup(DATASETS, dataset, "data set")
    folder = cache_dir if cache_dir is not None else Path(platformdirs.user_cache_dir("fastcifar"))
    data = data or os.environ.get(DATA_VARIABLE)
    if data == PYTHON_DATA:
        if (given := active_objects().data) is None:
            raise DataError("the data set was given from Python", "pass it again as data=, or its files as --data")
        return given(dataset, resize, val_seed)
    if data and data.split(":")[0] == "synthetic":
        return class_folders.make_synthetic_dataset(data, dataset, spec)
    try:
        if data:
            source = _identify_source(Path(data).expanduser(), dataset, spec, val_seed, resize)
        else:
            source = _detect_source(folder, spec) if folder.is_dir() else None
            if source is None and not download:
                raise DataError(f"{dataset} is not in {folder}", DATA_REMEDY)
            archive = folder / spec.python.archive_name
            source = source or _identify_source(download_file(spec.url, spec.archive_md5, archive), dataset, spec)
        contents, cache_note = load_or_cache(folder, dataset, source, refresh_cache)
    except OSError as error:
        raise DataError(f"cannot read {error.filename or data}: {error.strerror or error}", DATA_REMEDY) from None
    notes = [note for note in (source.note, contents.note, cache_note) if note]
    if notes:
        warnings.warn("; ".join(notes), UserWarning, stacklevel=2)
    return contents.to_dataset(dataset, str(source.path), source.kind, source.own_images)


def absolute_data_path(data: str | None) -> str | None:
    """Return `data` as an absolute path, if it is a path."""
    return os.path.abspath(os.path.expanduser(data)) if data is not None and is_data_path(data) else data


def is_data_path(data: str) -> bool:
    """Return whether `data` is a path, not synthetic images or a data set given from Python."""
    return data.split(":")[0] != "synthetic" and data != PYTHON_DATA


def saved_data_path(data: Any) -> Any:
    """Return the `data` of a saved recipe, or the environment variable, which overrides a path."""
    is_path = isinstance(data, str) and is_data_path(data)
    return absolute_data_path(os.environ.get(DATA_VARIABLE) or data) if is_path else data


def load_recipe_dataset(recipe: Recipe, **options: Any) -> Dataset:
    """Load the data set of a recipe; `options` are further arguments of `load_dataset`."""
    return load_dataset(recipe.data, recipe.dataset, val_seed=recipe.val_seed, resize=recipe.resize, **options)


def _identify_source(
    path: Path, dataset: str, spec: DatasetSpec, val_seed: int = 0, resize: int | None = None
) -> _DataSource:
    """Recognize the source at `path` by its contents. Raises `DataError` that lists the supported layouts."""
    if not path.exists():
        raise DataError(f"no such file or folder: {path}", DATA_REMEDY)
    source = _detect_source(path, spec) or _detect_own_images(path, spec, val_seed, resize)
    if source is not None:
        return source
    for name, other_spec in DATASETS.items():
        if name != dataset and _detect_source(path, other_spec) is not None:
            raise DataError(f"{path} contains {name}, expected {dataset}", f"give --dataset {name}")
    if path.is_dir() and any(path.glob("*.npy")):
        remedy = "give eval --corrupted FOLDER for CIFAR-10-C, and eval --data NAME_data.npy for CIFAR-10.1"
        raise DataError(f"{path} contains .npy files, which are not training images", remedy)
    folders = f"{spec.python.folder}/, {spec.binary.folder}/, the files of these folders"
    others = f"{spec.python.archive_name}, {spec.binary.archive_name}, train/<class>/*.png, <class>/*.png, *.npz"
    raise DataError(f"{path} contains no {dataset}; expected one of {folders}, {others}", DATA_REMEDY)


def _detect_source(path: Path, spec: DatasetSpec) -> _DataSource | None:
    """Recognize official files."""
    if path.is_file() and path.suffix not in (".npz", ".npy"):
        read = partial(read_official_files, spec, iter_tar_files(path, spec), path)
        return _DataSource("archive", path.resolve(), [path], read)
    for version, layout in (("Python", spec.python), ("binary", spec.binary)):
        for folder in (path, path / layout.folder):
            files = [folder / name for name in layout.file_names]
            if any(file.is_file() for file in files):
                members = iter_folder_files(folder, spec, layout)
                read = partial(read_official_files, spec, members, folder)
                return _DataSource(f"folder of the {version} version", folder.resolve(), files, read)
    for layout in (spec.python, spec.binary):
        if (path / layout.archive_name).is_file():
            return _detect_source(path / layout.archive_name, spec)
    return None


def _detect_own_images(path: Path, spec: DatasetSpec, val_seed: int, resize: int | None) -> _DataSource | None:
    """Recognize class folders and .npz files."""
    resized = ", resized to 32x32" if resize else ""
    split = f", split 80/10/10 by --val-seed {val_seed}"
    if path.suffix == ".npy":
        if not path.name.endswith("_data.npy"):
            raise DataError(f"{path} is not NAME_data.npy", "for CIFAR-10-C, give eval --corrupted FOLDER")
        files = [path, path.with_name(path.name.replace("_data.npy", "_labels.npy"))]
        read = partial(arrays.read_npy_pair, path, spec.default_class_names)
        return _DataSource("test set of .npy files", path.resolve(), files, read)
    if path.is_file():
        split = split if "images" in arrays.list_npz(path) else ""
        read = partial(arrays.read_npz, path, resize, val_seed)
        return _DataSource(f".npz file{resized}{split}", path.resolve(), [path], read, own_images=True)
    if (path / "train").is_dir():
        found, split = class_folders.list_split_folders(path, spec.class_names), ""
    else:
        found = class_folders.list_flat_folders(path, spec.class_names, val_seed)
    if found is None:
        return None
    files = [file for labeled in found.files.values() for file, _ in labeled]
    read = partial(found.read, resize=bool(resize))
    kind = f"class folders of images{resized}{split}"
    return _DataSource(kind, path.resolve(), files, read, found.note, own_images=True)


def download_file(url: str, md5: str, target: Path) -> Path:
    """Download `url` to `target` through `<target>.part`, which a later call resumes, and return `target`."""
    part = target.with_name(f"{target.name}.part")
    with disk_errors(f"write {part}", f"free space, or {DATA_REMEDY}"):
        target.parent.mkdir(parents=True, exist_ok=True)
        with lock_folder(target.parent, wait=True):
            if not target.exists():  # otherwise another process has already downloaded it
                _download_verified(url, md5, part)
                os.replace(part, target)
    return target


def _download_verified(url: str, md5: str, part: Path) -> None:
    """Complete `part` and check its MD5; if a resumed download has the wrong MD5, download once more from the start."""
    start = part.stat().st_size if part.exists() else 0
    _download_from(url, part, start)
    with part.open("rb") as file:
        head = file.read(512)
        file.seek(0)
        actual_md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if actual_md5 != md5:
        kind = "an HTML page" if is_html_page(head) else f"{part.stat().st_size:,} bytes"
        part.unlink()
        if not start:
            raise DataError(f"{url} sent {kind} with MD5 {actual_md5}, expected MD5 {md5}; deleted", DATA_REMEDY)
        _download_verified(url, md5, part)


def _download_from(url: str, part: Path, start: int) -> None:
    """Append to `part` the bytes of `url` from `start` on, or write the whole file if the server cannot resume."""
    headers = {"User-Agent": "fastcifar", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:  # range not satisfiable: the file is already complete
            return
        raise DataError(f"cannot download {url}: HTTP error {error.code} {error.reason}", DATA_REMEDY) from None
    except (OSError, http.client.HTTPException) as error:
        raise DataError(f"cannot download {url}: {getattr(error, 'reason', None) or error}", DATA_REMEDY) from None
    with response:
        resumes = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        done = start if resumes else 0
        length = response.headers.get("Content-Length", "")
        total = done + int(length) if length.isdecimal() else None
        columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        progress = Progress(*columns, console=DataConsole(stderr=True), disable=not sys.stderr.isatty())
        with part.open("ab" if resumes else "wb") as file, progress:
            task = progress.add_task(part.stem, completed=done, total=total)
            while True:
                try:
                    chunk = response.read(_CHUNK_BYTES)
                except (OSError, http.client.HTTPException) as error:  # `download_file` handles errors of `write`
                    problem = f"{url}: connection failed: {error}"
                    raise DataError(problem, f"run again to resume, or {DATA_REMEDY}") from None
                if not chunk:
                    break
                file.write(chunk)
                done += len(chunk)
                progress.advance(task, len(chunk))
                if done > _MAX_BYTES:
                    raise DataError(f"{url} sent more than {_MAX_BYTES:,} bytes", DATA_REMEDY)
    if total is not None and done < total:
        problem = f"{url}: connection closed after {done:,} of {total:,} bytes"
        raise DataError(problem, f"run again to resume, or {DATA_REMEDY}")


def load_or_cache(cache_dir: Path, dataset: str, source: _DataSource, refresh: bool) -> tuple[SourceContents, str]:
    """Return the contents of `source` from its cache entry (written first if not intact), and a note for the user."""
    digest = hashlib.sha256(os.fsencode(f"{CACHE_FORMAT_VERSION}\n{source.kind}\n{source.path}\n"))
    root_length = len(os.path.commonpath(source.files))
    for file in source.files:
        key: tuple[Any, ...] = (os.fspath(file)[root_length:],)  # contains the split and the class
        with contextlib.suppress(OSError):  # a missing file
            stat = file.stat()  # a file that replaces another one has another inode or another time of change
            key += (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
        digest.update(os.fsencode(f"{key}\n"))
    entry = cache_dir / f"{dataset}-{digest.hexdigest()[:16]}"
    cached = _load_entry(entry)
    if cached is not None and not refresh:
        return cached, ""
    contents = source.read()
    if cached is not None:
        pairs = zip(_named_arrays(cached).values(), _named_arrays(contents).values(), strict=True)
        if cached[1:] == contents[1:] and all(np.array_equal(a, b) for a, b in pairs):
            return cached, ""
        shutil.rmtree(entry, ignore_errors=True)
    try:
        _write_entry(entry, contents)
    except OSError as error:
        return contents, f"cannot cache the data set in {cache_dir} ({error.strerror or error}): it stays in memory"
    return _load_entry(entry) or contents, ""


def _load_entry(entry: Path) -> SourceContents | None:
    """Return the contents of an entry, its images memory-mapped read-only; None if anything is missing or damaged."""
    try:
        meta = json.loads((entry / "meta.json").read_text(encoding="utf-8"))
        loaded = {}
        for name, (size, shape, dtype) in meta["arrays"].items():
            path = entry / f"{name}.npy"
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            if path.stat().st_size != size or list(array.shape) != shape or array.dtype != dtype:
                return None
            loaded[name] = array
        # Labels are small, so they are copied, which makes them writable.
        names = [name.removesuffix("_images") for name in loaded if name.endswith("_images")]
        splits = {name: Split(loaded[f"{name}_images"], np.array(loaded[f"{name}_labels"])) for name in names}
        contents = SourceContents(splits, tuple(map(str, meta["classes"])), bool(meta["official"]), str(meta["note"]))
        return contents if splits else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError):
        return None


def _named_arrays(contents: SourceContents) -> dict[str, np.ndarray]:
    return {f"{split}_{name}": array for split, data in contents.splits.items() for name, array in vars(data).items()}


def _write_entry(entry: Path, contents: SourceContents) -> None:
    """Write an entry atomically. If writing fails, raise `OSError` and delete all temporary files."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    for path in entry.parent.glob(f"{entry.name}.*.tmp"):
        if time.time() - path.stat().st_mtime > 3600:  # left behind by a killed process
            shutil.rmtree(path, ignore_errors=True)
    temporary = entry.with_name(f"{entry.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    temporary.mkdir()
    try:
        sizes = {}
        for name, array in _named_arrays(contents).items():
            path = temporary / f"{name}.npy"
            np.save(path, array, allow_pickle=False)
            sizes[name] = (path.stat().st_size, array.shape, array.dtype.name)
        facts = {"classes": contents.classes, "official": contents.is_official, "note": contents.note}
        meta = {"format": CACHE_FORMAT_VERSION, "arrays": sizes, **facts}
        (temporary / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
        if _load_entry(entry) is None:  # damaged, or missing: a rename cannot replace a folder that contains files
            shutil.rmtree(entry, ignore_errors=True)
        try:
            temporary.rename(entry)
        except OSError:
            if _load_entry(entry) is None:  # otherwise another process has already written the same contents
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
