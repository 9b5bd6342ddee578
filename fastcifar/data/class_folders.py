"""Data sets other than the official files: class folders of images, and synthetic images for tests without data."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastcifar.data.cifar_files import Dataset, DatasetSpec, SourceContents, Split
from fastcifar.data.image_files import (
    IMAGE_SUFFIXES,
    LeftOut,
    count_file,
    decode_image,
    describe_left_out,
    is_hidden,
    list_images,
    reason_to_leave_out,
)
from fastcifar.data.splits import split_80_10_10
from fastcifar.errors import DataError, UsageError

SPLIT_FOLDERS = ("train", "val", "test")
_LAYOUT_REMEDY = "arrange them as <class>/*.png, or train/<class>/*.png and test/<class>/*.png"


LabeledFile = tuple[Path, int]  # an image file and the label of its class


@dataclass(frozen=True)
class ClassFolders:
    """The image files of class folders, by split."""

    classes: tuple[str, ...]
    files: dict[str, list[LabeledFile]]
    note: str  # what is left out, for the user; "" if nothing is

    def read(self, resize: bool = False) -> SourceContents:
        """Decode all images. Raises `DataError` if one is not an image, or not of 32x32 pixels without `resize`."""
        splits = {}
        for split, files in self.files.items():
            images = np.empty((len(files), 3, 32, 32), np.uint8)
            for index, (file, _) in enumerate(files):
                images[index] = decode_image(file, resize)
            splits[split] = Split(images, np.array([label for _, label in files], np.int64))
        return SourceContents(splits, self.classes)


def list_split_folders(path: Path, class_names: tuple[str, ...]) -> ClassFolders:
    """List the images in `train/<class>/` and, if they exist, in `val/<class>/` and `test/<class>/`.

    Raises `DataError` if these do not have the same two or more classes, or if a class has no images.
    """
    left_out = LeftOut()
    folders = {split: path / split for split in SPLIT_FOLDERS if (path / split).is_dir()}
    _list_subfolders(path, left_out, f"not in {', '.join(f'{split}/' for split in folders)}", folders)
    names = {split: _list_subfolders(folder, left_out, "not in a class folder") for split, folder in folders.items()}
    train = names["train"]
    for split, split_names in names.items():
        if len(train) < 2 or split_names != train:
            unmatched = sorted(set(train) ^ set(split_names))[:5]
            details = f" (only in one of them: {', '.join(unmatched)})" if unmatched else ""
            counts = f"{len(train)} training classes and {len(split_names)} {split} classes{details}"
            raise DataError(f"{path} has {counts}, expected the same two or more in both", _LAYOUT_REMEDY)
    classes = class_names if sorted(class_names) == sorted(train) else tuple(train)
    files = {split: _list_classes(folder, classes, left_out) for split, folder in folders.items()}
    return ClassFolders(classes, files, describe_left_out(path, left_out))


def list_flat_folders(path: Path, class_names: tuple[str, ...], seed: int) -> ClassFolders | None:
    """List the images in `<class>/`, a tenth for validation and a tenth for testing; None without class folders.

    `seed` selects the images of each split, stratified by class. Raises `DataError` if there is one class.
    """
    left_out = LeftOut()
    names = _list_subfolders(path, left_out, "not in a class folder")
    with_images = [name for name in names if not all(map(reason_to_leave_out, (path / name).iterdir()))]
    if len(with_images) == 1 and set(SPLIT_FOLDERS).isdisjoint(names):
        raise DataError(f"{path} has images of one class, {with_images[0]}, expected two or more", _LAYOUT_REMEDY)
    if len(with_images) < 2 or not set(SPLIT_FOLDERS).isdisjoint(names):
        return None
    classes = class_names if sorted(class_names) == sorted(names) else tuple(names)
    files = _list_classes(path, classes, left_out)
    parts = split_80_10_10(np.array([label for _, label in files]), seed)
    by_split = {split: [files[index] for index in part] for split, part in zip(SPLIT_FOLDERS, parts, strict=True)}
    return ClassFolders(classes, by_split, describe_left_out(path, left_out))


def _list_subfolders(
    folder: Path, left_out: LeftOut, reason: str, expected: dict[str, Path] | None = None
) -> list[str]:
    """Return the names of the visible folders in `folder`, or of those in `expected`; count all else in `left_out`."""
    names = []
    for entry in folder.iterdir():
        if is_hidden(entry.name):
            count_file(entry, "hidden", left_out)
        elif entry.is_dir() and (expected is None or entry.name in expected):
            names.append(entry.name)
        else:
            count_file(entry, reason, left_out)
    return sorted(names, key=natural_order)


def natural_order(name: str) -> tuple[list[tuple[int, str]], str]:
    """Return a sort key that compares numbers in names by value: 2 before 10, class2 before class10."""
    parts = re.split(r"([0-9]+)", name)
    return [(int(part), "") if index % 2 else (-1, part) for index, part in enumerate(parts)], name


def _list_classes(folder: Path, classes: tuple[str, ...], left_out: LeftOut) -> list[LabeledFile]:
    """List the images of every class, class by class. Raises `DataError` if one has none."""
    files: list[LabeledFile] = []
    for label, name in enumerate(classes):
        images = list_images(folder / name, left_out)
        if not images:
            suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
            raise DataError(f"{folder / name} contains no images, expected {suffixes}", _LAYOUT_REMEDY)
        files += [(image, label) for image in images]
    return files


def make_synthetic_dataset(data: str, name: str, spec: DatasetSpec) -> Dataset:
    """Return the deterministic data set `synthetic[:N]` of N training and N // 5 test images, patterns plus noise."""
    size_text = data.partition(":")[2] or "50000"
    if not size_text.isdecimal():
        raise UsageError(f"--data {data!r} is not a synthetic data set", "write synthetic or synthetic:N")
    train_size = max(int(size_text), 10)
    if train_size > 5_000_000:
        raise UsageError(f"--data {data!r} is too large", "choose at most synthetic:5000000")
    # A pattern is a 4x4 color grid, interpolated linearly: a crop changes it little, unlike a flip.
    grid = np.random.Generator(np.random.Philox(key=[7, 0])).random((spec.num_classes, 3, 4, 4), np.float32) * 127
    positions = np.linspace(0, 3, 32)
    weights = np.maximum(0, 1 - np.abs(positions[:, None] - np.arange(4))).astype(np.float32)
    patterns = np.einsum("ya,xb,ncab->ncyx", weights, weights, grid).astype(np.uint8)
    classes = tuple(spec.default_class_names)
    splits = _make_noisy_split(patterns, train_size, 1), _make_noisy_split(patterns, max(train_size // 5, 10), 2)
    return Dataset(name, *splits, classes, data, is_official=False, source_type="synthetic images")


def _make_noisy_split(patterns: np.ndarray, size: int, seed: int) -> Split:
    rng = np.random.Generator(np.random.Philox(key=[7, seed]))
    labels = rng.permutation(np.arange(size, dtype=np.int64) % len(patterns))
    # Each 64-bit word holds eight pixels, masked to 0..127, so that adding a pattern of 0..127 cannot overflow.
    words = rng.bit_generator.random_raw(size * 3072 // 8)
    words &= np.uint64(0x7F7F7F7F7F7F7F7F)
    images = words.view(np.uint8).reshape(size, 3, 32, 32)
    for start in range(0, size, 256):
        images[start : start + 256] += patterns[labels[start : start + 256]]
    return Split(images, labels)
