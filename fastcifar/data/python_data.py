"""Data sets given from Python: a `Dataset`, arrays and tensors, data sets of PyTorch, or a dict of these by split."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastcifar.data import cifar
from fastcifar.data.arrays import ARRAYS_REMEDY, KEYS, MAX_CLASSES, SPLITS, check_labels, parse_arrays, to_planar
from fastcifar.data.cifar_files import Dataset, Split
from fastcifar.data.image_files import to_rgb
from fastcifar.errors import DataError

Images = np.ndarray | Tensor  # uint8 [n, 32, 32, 3] or [n, 3, 32, 32]
Labels = np.ndarray | Tensor | Sequence[int]  # integers [n] from 0 to the number of classes - 1
LabeledImages = tuple[Images, Labels] | Split | torch.utils.data.Dataset[Any]
Data = str | Path | Dataset | LabeledImages | Mapping[str, Any]

REMEDY = "give a path, a pair (images, labels), a data set, or a dict of these with the keys train, val and test"


def to_dataset(data: Any, name: str = "cifar10", resize: int | None = None, val_seed: int = 0) -> Dataset:
    """Return the data set of `data`, which is no path. Raises `DataError` for other types, shapes, dtypes or labels.

    `name`, `resize`, `val_seed`: the options `dataset`, `resize` and `val_seed` of the recipe.
    """
    if isinstance(data, Dataset):
        return replace(
            data, **{key: _check_split(split, key, len(data.classes)) for key, split in data.all_splits.items()}
        )
    arrays: dict[str, Any] = {}
    for key, value in data.items() if isinstance(data, Mapping) else [("", data)]:
        if key in ("", *SPLITS):
            prefix = f"{key}_" if key else ""
            images, labels = _to_pair(value, f"data[{key!r}]" if key else "data=")
            arrays |= {f"{prefix}images": images, f"{prefix}labels": labels}
        elif key in KEYS:
            arrays[key] = value
        else:
            raise DataError(f"data= has the key {key!r}", REMEDY)
    contents = parse_arrays(arrays, "data=", resize, val_seed)
    if "train" not in contents.splits:
        raise DataError("data= has no training images", REMEDY)
    return contents.to_dataset(name, "arrays from Python", "arrays", own_images=True)


def training_split(data: Any, resize: int | None = None) -> Split:
    """Return the training images of `data`, or all images if it is a pair or a data set of PyTorch."""
    if isinstance(data, str | Path):
        return cifar.load_dataset(str(data), resize=resize).train
    if isinstance(data, Split):
        return _check_split(data, "data=")
    return to_dataset(data if isinstance(data, Dataset | Mapping) else {"train": data}, resize=resize).train


def _to_pair(value: Any, name: str) -> tuple[Any, Any]:
    """Return the images and labels of a split."""
    if isinstance(value, Split):
        return value.images, value.labels
    if isinstance(value, torch.utils.data.Dataset):
        return _read_items(value, name)
    if isinstance(value, tuple | list) and len(value) == 2:
        return value[0], value[1]
    raise DataError(f"{name} is of type {type(value).__name__}", REMEDY)


def _read_items(dataset: Any, name: str) -> tuple[np.ndarray, list[Any]]:
    """Return the images and labels of a map-style data set of PyTorch; PIL images are converted as image files are."""
    if isinstance(dataset, torch.utils.data.IterableDataset) or not hasattr(dataset, "__len__"):
        raise DataError(f"{name} has no length or no index", "give a map-style data set, or arrays")
    arrays, labels = [], []
    for index in range(len(dataset)):
        item = dataset[index]
        if not isinstance(item, tuple | list) or len(item) != 2:
            kind = f"{len(item)} values" if isinstance(item, tuple | list) else f"type {type(item).__name__}"
            raise DataError(f"{name}[{index}] is of {kind}, expected an image and a label", REMEDY)
        try:
            arrays.append(np.asarray(to_rgb(item[0]) if isinstance(item[0], Image.Image) else item[0]))
        except ValueError as error:
            raise DataError(f"{name}[{index}]: {error}", "convert the image to RGB") from None
        labels.append(item[1])
    if not arrays:
        raise DataError(f"{name} contains no images", REMEDY)
    if len(shapes := {array.shape for array in arrays}) > 1:
        raise DataError(f"{name} has images of the shapes {', '.join(map(str, list(shapes)[:3]))}", "resize them")
    return np.stack(arrays), labels


def _check_split(split: Split, name: str, num_classes: int = MAX_CLASSES) -> Split:
    """Return `split` with checked contiguous arrays. Raises `DataError` for other shapes, dtypes or labels."""
    images, _ = to_planar(split.images, f"{name}: images", ARRAYS_REMEDY)
    labels = check_labels(split.labels, len(images), f"{name}: labels")
    if labels.max() >= num_classes:
        problem = f"{name}: labels from {labels.min()} to {labels.max()}"
        raise DataError(problem, f"there are {num_classes} classes, numbered from 0")
    return Split(np.ascontiguousarray(images), labels)
