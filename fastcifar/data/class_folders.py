"""Data sets other than the official files: class folders of images, and synthetic images for tests without data."""

from __future__ import annotations

import contextlib
import itertools
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from fastcifar.data.cifar_files import Dataset, DatasetSpec, SourceContents, Split
from fastcifar.errors import DataError, UsageError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".webp"})
# What Pillow raises for damaged files
_DECODING_ERRORS = (OSError, SyntaxError, EOFError, struct.error, ValueError, TypeError, LookupError, OverflowError)
_LAYOUT_REMEDY = "arrange them as train/<class>/*.png and test/<class>/*.png, 32x32 pixels"


def _split_folders(path: Path) -> dict[str, Path]:
    """Return the folder of each split; the test set is `val`, as in ImageNet, if `val` exists and `test` does not."""
    test = "val" if (path / "val").is_dir() and not (path / "test").is_dir() else "test"
    return {"train": path / "train", "test": path / test}


def list_image_files(path: Path) -> list[Path]:
    """Return all image files in the train and test folders of `path`, sorted by class and name."""
    folders = _split_folders(path).values()
    return [file for folder in folders for name in _list_classes(folder) for file in _list_images(folder / name)]


def _list_classes(folder: Path) -> list[str]:
    entries = folder.iterdir() if folder.is_dir() else ()
    return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _list_images(folder: Path) -> list[Path]:
    files = (file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    return sorted(file for file in files if not file.name.startswith("."))


def read_class_folders(path: Path, class_names: tuple[str, ...]) -> SourceContents:
    """Read both splits; classes are in the order of `class_names` if the folders have these names, else sorted."""
    folders = _split_folders(path)
    train, test = (_list_classes(folder) for folder in folders.values())
    if len(train) < 2 or test != train:
        unmatched = sorted(set(train) ^ set(test))[:5]
        details = f" (only in one of them: {', '.join(unmatched)})" if unmatched else ""
        counts = f"{len(train)} training classes and {len(test)} test classes{details}"
        raise DataError(f"{path} has {counts}, expected the same two or more in both", _LAYOUT_REMEDY)
    classes = class_names if sorted(class_names) == train else tuple(train)
    splits = {}
    for split, folder in folders.items():
        files = [_list_images(folder / name) for name in classes]
        if [] in files:
            empty, suffixes = folder / classes[files.index([])], ", ".join(sorted(IMAGE_SUFFIXES))
            raise DataError(f"{empty} contains no images, expected {suffixes}", _LAYOUT_REMEDY)
        labels = np.repeat(np.arange(len(classes)), [len(class_files) for class_files in files])
        images = np.empty((len(labels), 3, 32, 32), np.uint8)
        for index, file in enumerate(itertools.chain(*files)):
            images[index] = decode_image(file).transpose(2, 0, 1)
        splits[split] = Split(images, labels)
    return SourceContents(splits, classes)


@contextlib.contextmanager
def open_image(file: Path) -> Iterator[Image.Image]:
    """Open an image file and read only its header. Raise `DataError` if that or decoding in the `with` block fails."""
    try:
        with Image.open(file) as image:
            yield image
    except (*_DECODING_ERRORS, Image.DecompressionBombError) as error:
        raise DataError(f"{file} is not a readable image ({error})", "replace or remove it") from None


def decode_image(file: Path) -> np.ndarray:
    """Return a 32x32 image file as uint8 [32, 32, 3] RGB. Raises `DataError` if it is anything else."""
    with open_image(file) as image:
        if image.size != (32, 32):
            raise DataError(f"{file} is {image.width}x{image.height}, expected 32x32", _LAYOUT_REMEDY)
        return np.asarray(image.convert("RGB"))


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
