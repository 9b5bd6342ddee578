"""Data sets in arrays, from Python or an .npz file, and .npy files: their layouts, checks and limits."""

import math
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastcifar.data.cifar_files import SourceContents, Split
from fastcifar.data.image_files import RESIZE_REMEDY, resize_square
from fastcifar.data.splits import split_80_10_10
from fastcifar.errors import DataError, UserError, first_message_line
from fastcifar.files import open_regular_file

MAX_EXPANSION, MAX_BYTES_BEYOND_FILE = 8, 2**27  # of an .npz file, whose arrays may be compressed
LAYOUTS = "uint8 of shape (N, 3072) planar, (N, 32, 32, 3) or (N, 3, 32, 32)"
ARRAYS_REMEDY = f"give images as {LAYOUTS}, and labels as N integers from 0 on"
NPZ_REMEDY = "save arrays by np.savez(FILE, train_images=..., train_labels=..., test_images=..., test_labels=...)"
CLASSES_REMEDY = "give two or more different names of classes in the order of the labels"
CIFAR10_1_REMEDY = "give a copy of the folder https://github.com/modestyachts/CIFAR-10.1/tree/master/datasets"
MAX_CLASSES = 2**16
SPLITS = ("train", "val", "test")
KERAS_KEYS = {f"{x}_{split}": f"{split}_{name}" for x, name in (("x", "images"), ("y", "labels")) for split in SPLITS}
KEYS = ("images", "labels", *(f"{split}_{kind}" for split in SPLITS for kind in ("images", "labels")), "classes")


def parse_arrays(arrays: Mapping[str, Any], source: str, resize: int | None, val_seed: int) -> SourceContents:
    """Check arrays with the keys `KEYS`, and return the splits and classes. Raises `DataError` that names the array.

    An array is a NumPy array, a tensor on the CPU, or anything else that NumPy converts. Images are uint8 in a layout
    of `to_planar`, and labels are integers from 0 to the number of classes - 1. `images` and `labels` alone are split
    80/10/10 by `val_seed`. `classes` are names in the order of the labels, by default the numbers.
    """
    splits = {}
    for split in ("", *SPLITS):
        images_key, labels_key = (f"{split}_{kind}" if split else kind for kind in ("images", "labels"))
        if (images_key in arrays) != (labels_key in arrays):
            missing, present = sorted((images_key, labels_key), key=lambda key: key in arrays)
            raise DataError(f"{source} has {present} but no {missing}", ARRAYS_REMEDY)
        if images_key in arrays:
            name = f"{source}: {images_key}"
            images, _ = to_planar(_to_array(arrays[images_key], name), name, ARRAYS_REMEDY, resize)
            labels = check_labels(arrays[labels_key], len(images), f"{source}: {labels_key}")
            splits[split] = Split(np.ascontiguousarray(images), labels)
    if not splits or ("" in splits and len(splits) > 1):
        keys = ", ".join(key for key in KEYS if key in arrays) or "none"
        expected = "expected images and labels, or train_images and train_labels, with val_ and test_ if there are any"
        raise DataError(f"{source} has the arrays {keys}", expected)
    largest = max(int(split.labels.max()) for split in splits.values())
    classes = _check_classes(arrays.get("classes"), largest + 1, source)
    train = splits.get("", splits.get("train"))
    counts = np.bincount(train.labels, minlength=len(classes)) if train else np.ones(1)
    if (empty := np.flatnonzero(counts == 0)).size:
        problem = f"{source} has no training images of class {empty[0]} ({classes[empty[0]]})"
        raise DataError(problem, "number the labels from 0 on without gaps, and name only these classes")
    if "" in splits:
        flat = splits[""]
        parts = zip(SPLITS, split_80_10_10(flat.labels, val_seed), strict=True)
        splits = {name: Split(flat.images[part], flat.labels[part]) for name, part in parts}
    return SourceContents(splits, classes)


def _to_array(value: Any, name: str) -> np.ndarray:
    try:
        return np.asarray(value)
    except Exception as error:  # of any library, such as torch for a tensor on a GPU
        raise DataError(f"{name}: {first_message_line(error, type(error).__name__)}", ARRAYS_REMEDY) from None


def check_labels(values: Any, num_images: int, name: str) -> np.ndarray:
    """Return labels as int64 [num_images]; a second dimension of size 1 is dropped."""
    labels = _to_array(values, name)
    if labels.dtype.kind not in "iu" or not labels.size or labels.shape not in ((num_images,), (num_images, 1)):
        actual = f"{labels.dtype} {list(labels.shape)}"
        raise DataError(f"{name} is {actual}, expected {num_images:,} integers", ARRAYS_REMEDY)
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= MAX_CLASSES:
        raise DataError(f"{name} contains the label {low if low < 0 else high}", "number the classes from 0 on")
    return labels.reshape(-1).astype(np.int64)


def _check_classes(classes: Any, num_labels: int, source: str) -> tuple[str, ...]:
    values = _to_array(range(num_labels) if classes is None else classes, f"{source}: classes").ravel()
    names = tuple(map(str, values[:MAX_CLASSES].tolist()))
    if (classes is not None and values.dtype.kind != "U") or not all(names) or len(set(names)) < values.size:
        raise DataError(f"{source}: the class names are not distinct strings", CLASSES_REMEDY)
    if len(names) < max(num_labels, 2):
        problem = f"{source} has labels of {num_labels} classes and {len(names)} names, expected two or more of each"
        raise DataError(problem, CLASSES_REMEDY)
    return names


def to_planar(array: Any, name: str, remedy: str, resize: int | None = None) -> tuple[np.ndarray, str]:
    """Return images as uint8 [n,3,32,32], a view if they are not resized, and the name of their layout.

    With `resize`, images of any size, also gray ones, are resized as image files are. Raises `DataError` with `remedy`
    for anything but uint8 in one of the layouts.
    """
    if not isinstance(array, np.ndarray):
        raise DataError(f"{name} is of type {type(array).__name__}, expected an array", remedy)
    if array.dtype != np.uint8:
        raise DataError(f"{name} is {array.dtype}, expected uint8 pixels of 0 to 255", remedy)
    if not array.size:
        raise DataError(f"{name} of shape {array.shape} contains no images", remedy)
    if array.shape[1:] == (3072,):
        return array.reshape(-1, 3, 32, 32), "planar (N, 3072)"
    if array.shape[1:] == (3, 32, 32):
        return array, "channel first (N, 3, 32, 32)"
    if array.shape[1:] == (32, 32, 3):
        return array.transpose(0, 3, 1, 2), "channel last (N, 32, 32, 3)"
    is_gray = array.ndim == 3 or array.shape[3:] == (1,)
    is_channel_first = array.ndim == 4 and array.shape[1] == 3
    if not (is_gray or is_channel_first or array.shape[3:] == (3,)):
        raise DataError(f"{name} has the shape {array.shape}, expected {LAYOUTS}", remedy)
    height, width = array.shape[2:] if is_channel_first else array.shape[1:3]
    if resize is None:
        color = "gray " if is_gray else ""
        raise DataError(f"{name} has {color}images of {width}x{height} pixels, expected 32x32 RGB", RESIZE_REMEDY)
    images = np.empty((len(array), 3, 32, 32), np.uint8)
    for index, pixels in enumerate(array):
        rows = pixels.reshape(height, width) if is_gray else pixels.transpose(1, 2, 0) if is_channel_first else pixels
        image = Image.fromarray(np.ascontiguousarray(rows)).convert("RGB")
        images[index] = np.asarray(resize_square(image)).transpose(2, 0, 1)
    return images, f"resized from {width}x{height}"


def list_npz(path: Path) -> dict[str, str]:
    """Return the names of the arrays to read from an .npz file, one or more, by their keys in `KEYS`."""
    with _open_npz(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
    found = {KERAS_KEYS.get(name, name): name for name in names if KERAS_KEYS.get(name, name) in KEYS}
    if len(found) < sum(KERAS_KEYS.get(name, name) in KEYS for name in names):
        raise DataError(f"{path} has an array twice: {', '.join(names[:10])}", "remove one of them")
    if not found:
        problem = f"{path} contains {', '.join(names[:6]) or 'nothing'}, expected arrays such as train_images"
        raise DataError(problem, NPZ_REMEDY)
    return found


def read_npz(path: Path, resize: int | None, val_seed: int) -> SourceContents:
    """Read the arrays of an .npz file. Pickled objects are refused, as is a file that expands too much."""
    found = list_npz(path)
    with _open_npz(path) as archive:
        return parse_arrays(
            {key: _read_member(archive, f"{name}.npy") for key, name in found.items()}, str(path), resize, val_seed
        )


@contextmanager
def _open_npz(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open an .npz file, whose arrays are read only if they match their headers; every error is a `DataError`."""
    try:
        with open_regular_file(path) as file, zipfile.ZipFile(file) as archive:
            size, total = os.fstat(file.fileno()).st_size, sum(member.file_size for member in archive.infolist())
            if total > MAX_EXPANSION * size + MAX_BYTES_BEYOND_FILE:
                raise DataError(f"{path} has {size:,} bytes and unpacks to {total:,}", NPZ_REMEDY)
            yield archive
    except UserError:
        raise
    except Exception as error:  # zipfile and NumPy raise many types for a damaged file
        reason = first_message_line(error, type(error).__name__)[:200]
        raise DataError(f"{path} is not an .npz file that can be read safely: {reason}", NPZ_REMEDY) from None


def _read_member(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    member = archive.getinfo(name)
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, _, dtype = read_header[version](stream)
        if dtype.hasobject:
            raise ValueError(f"{name} contains pickled objects, which are never read")
        # checked before NumPy allocates an array of this shape
        if not dtype.itemsize or math.prod(shape) * dtype.itemsize != member.file_size - stream.tell():
            raise ValueError(f"{name} is truncated, or its header is damaged")
        stream.seek(0)
        return np.lib.format.read_array(stream, allow_pickle=False)


def open_npy(path: Path, remedy: str) -> np.ndarray:
    """Return the array of an .npy file as a read-only memory map. Raises `DataError` if it cannot be read safely."""
    try:
        # With a memory map, NumPy checks the shape in the header against the size of the file and allocates nothing.
        array = np.lib.format.open_memmap(path, mode="r") if path.is_file() else None
    except Exception as error:  # NumPy raises many types for a damaged file
        reason = first_message_line(error, type(error).__name__)[:200]
        raise DataError(f"{path} is not an .npy file that can be read safely: {reason}", remedy) from None
    if array is None:
        raise DataError(f"no such file: {path}", remedy)
    return array


def read_npy_pair(path: Path, classes: Sequence[str]) -> SourceContents:
    """Read a test set in the format of CIFAR-10.1: `NAME_data.npy`, and `NAME_labels.npy` in the same folder."""
    images = open_npy(path, CIFAR10_1_REMEDY)
    labels = open_npy(path.with_name(f"{path.name.removesuffix('_data.npy')}_labels.npy"), CIFAR10_1_REMEDY)
    arrays = {"test_images": images, "test_labels": labels, "classes": classes}
    return parse_arrays(arrays, str(path), None, 0)
