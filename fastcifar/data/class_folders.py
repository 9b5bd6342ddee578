"""Data sets other than the official files: class folders of images, and synthetic images for tests without data.

An image that is not 32x32 or cannot be decoded is an error that names the file.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from fastcifar.data.cifar_files import Dataset, Split
from fastcifar.errors import DataError, UsageError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".webp"})
_LAYOUT_REMEDY = "arrange them as train/<class>/*.png and test/<class>/*.png, 32x32 pixels"


def _test_folder(path: Path) -> Path:
    """Return the folder `test`, or `val` (the name in ImageNet) if only that one exists."""
    return path / "val" if (path / "val").is_dir() and not (path / "test").is_dir() else path / "test"


def list_image_files(path: Path) -> list[Path]:
    """Return all image files in the train and test folders of `path`, sorted by class and name."""
    split_folders = [folder for folder in (path / "train", _test_folder(path)) if folder.is_dir()]
    return [file for folder in split_folders for name in _list_classes(folder) for file in _list_images(folder / name)]


def _list_classes(split_folder: Path) -> list[str]:
    return sorted(entry.name for entry in split_folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _list_images(folder: Path) -> list[Path]:
    return sorted(
        file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".")
    )


def read_class_folders(path: Path, class_names: tuple[str, ...]) -> tuple[dict[str, Split], tuple[str, ...], bool, str]:
    """Return both splits, the class names, False (not official) and an empty note.

    The class order is that of `class_names` if the folders have exactly these names, otherwise alphabetical. Images are
    decoded by Pillow to RGB. Raises `DataError` if the folders of the two splits differ, or naming the first file that
    is not a 32x32 image.
    """
    folders = {"train": path / "train", "test": _test_folder(path)}
    class_lists = {split: _list_classes(folder) if folder.is_dir() else [] for split, folder in folders.items()}
    if len(class_lists["train"]) < 2 or class_lists["test"] != class_lists["train"]:
        unmatched = sorted(set(class_lists["train"]) ^ set(class_lists["test"]))[:5]
        counts = f"{len(class_lists['train'])} training classes and {len(class_lists['test'])} test classes"
        details = f" (only in one of them: {', '.join(unmatched)})" if unmatched else ""
        raise DataError(f"{path} has {counts}{details}, expected the same two or more in both", _LAYOUT_REMEDY)
    classes = class_names if sorted(class_names) == class_lists["train"] else tuple(class_lists["train"])
    return {split: _load_split(folder, classes) for split, folder in folders.items()}, classes, False, ""


def _load_split(folder: Path, classes: tuple[str, ...]) -> Split:
    files = [(file, label) for label, name in enumerate(classes) for file in _list_images(folder / name)]
    labels = np.array([label for _, label in files], np.int64)
    empty = sorted(set(range(len(classes))) - set(labels.tolist()))
    if empty:
        raise DataError(
            f"{folder / classes[empty[0]]} contains no images, expected {', '.join(sorted(IMAGE_SUFFIXES))}",
            _LAYOUT_REMEDY,
        )
    images = np.empty((len(files), 3, 32, 32), np.uint8)
    for index, (file, _) in enumerate(files):
        images[index] = decode_image(file).transpose(2, 0, 1)
    return Split(images, labels)


def decode_image(file: Path) -> np.ndarray:
    """Return a 32x32 image file as uint8 [32, 32, 3] RGB. Raises `DataError` if it is anything else."""
    try:
        with Image.open(file) as image:
            # Check before decoding, so that only the header of a decompression bomb is read.
            if image.size != (32, 32):
                raise DataError(f"{file} is {image.width}x{image.height}, expected 32x32", _LAYOUT_REMEDY)
            return np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError, EOFError) as error:
        raise DataError(f"{file} is not a readable image ({error})", "replace or remove it") from None


def make_synthetic_dataset(spec: str, name: str, num_classes: int, class_names: tuple[str, ...]) -> Dataset:
    """Return the deterministic data set `synthetic[:N]`: N training images (default 50,000) and N // 5 test images.

    Each class is a smooth color pattern plus noise, which a small network learns in one epoch. It is never cached on
    disk. Raises `UsageError` if N is not an integer or exceeds 5,000,000.
    """
    _, _, size_text = spec.partition(":")
    if not (size_text or "50000").isdecimal():
        raise UsageError(f"--data {spec!r} is not a synthetic data set", "write synthetic or synthetic:N")
    train_size = max(int(size_text or 50_000), 10)
    if train_size > 5_000_000:
        raise UsageError(f"--data {spec!r} is too large", "choose at most synthetic:5000000")
    # A coarse color grid, interpolated linearly: low frequencies survive crops, and a flipped image differs.
    grid = np.random.Generator(np.random.Philox(key=[7, 0])).random((num_classes, 3, 4, 4), np.float32) * 127
    positions = np.linspace(0, 3, 32)
    weights = np.maximum(0, 1 - np.abs(positions[:, None] - np.arange(4))).astype(np.float32)
    patterns = np.einsum("ya,xb,ncab->ncyx", weights, weights, grid).astype(np.uint8)
    classes = class_names or tuple(f"class_{label:02d}" for label in range(num_classes))
    splits = _make_noisy_split(patterns, train_size, 1), _make_noisy_split(patterns, max(train_size // 5, 10), 2)
    return Dataset(name, *splits, classes, spec, is_official=False, source_type="synthetic images")


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
