"""Sets that are not the official files: class folders of images, and synthetic images for machines without data.

It must not guess: an image that is not 32x32 or does not decode is an error that names it.
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
    """`test`, or `val` where there is no `test`, as ImageNet names it."""
    return path / "val" if (path / "val").is_dir() and not (path / "test").is_dir() else path / "test"


def list_image_files(path: Path) -> list[Path]:
    """Every image below `path`'s train and test folders, sorted by class and name; other files are left alone."""
    parts = (path / "train", _test_folder(path))
    return [
        file for part in parts if part.is_dir() for name in _list_classes(part) for file in _list_images(part / name)
    ]


def _list_classes(split_folder: Path) -> list[str]:
    return sorted(entry.name for entry in split_folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _list_images(folder: Path) -> list[Path]:
    return sorted(
        file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".")
    )


def read_class_folders(path: Path, class_names: tuple[str, ...]) -> tuple[dict[str, Split], tuple[str, ...], bool, str]:
    """Both splits and the class names: those of `names` in their order if they are the same, else sorted.

    Images are decoded by Pillow to RGB; `DataError` names the first file that is not an image of 32x32.
    """
    parts = {"train": path / "train", "test": _test_folder(path)}
    found = {part: _list_classes(folder) if folder.is_dir() else [] for part, folder in parts.items()}
    if len(found["train"]) < 2 or found["test"] != found["train"]:
        differ = sorted(set(found["train"]) ^ set(found["test"]))[:5]
        counts = f"{len(found['train'])} classes to train on and {len(found['test'])} to test"
        also = f" (only in one of them: {', '.join(differ)})" if differ else ""
        raise DataError(f"{path} has {counts}{also}, expected the same two or more in both", _LAYOUT_REMEDY)
    classes = class_names if sorted(class_names) == found["train"] else tuple(found["train"])
    return {part: _load_split(folder, classes) for part, folder in parts.items()}, classes, False, ""


def _load_split(folder: Path, classes: tuple[str, ...]) -> Split:
    files = [(file, label) for label, name in enumerate(classes) for file in _list_images(folder / name)]
    labels = np.array([label for _, label in files], np.int64)
    empty = sorted(set(range(len(classes))) - set(labels.tolist()))
    if empty:
        raise DataError(
            f"{folder / classes[empty[0]]} holds no images, expected {', '.join(sorted(IMAGE_SUFFIXES))}",
            _LAYOUT_REMEDY,
        )
    images = np.empty((len(files), 3, 32, 32), np.uint8)
    for position, (file, _) in enumerate(files):
        images[position] = decode_image(file).transpose(2, 0, 1)
    return Split(images, labels)


def decode_image(file: Path) -> np.ndarray:
    """One image as uint8 [32, 32, 3] RGB; `DataError` naming the file if it is anything else."""
    try:
        with Image.open(file) as image:
            # Before decoding, so that a bomb of a thousand megapixels is only ever a header.
            if image.size != (32, 32):
                raise DataError(f"{file} is {image.width}x{image.height}, expected 32x32", _LAYOUT_REMEDY)
            return np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError, EOFError) as error:
        raise DataError(f"{file} is not an image that can be read ({error})", "replace or remove it") from None


def make_synthetic_dataset(spec: str, name: str, num_classes: int, class_names: tuple[str, ...]) -> Dataset:
    """`synthetic[:N]`: N training images (50,000) and N // 5 for testing, always the same, of `count` classes.

    Each class is a smooth colour pattern under noise, which a small network learns in an epoch. Never cached on disk.
    """
    _, _, wanted = spec.partition(":")
    if not (wanted or "50000").isdecimal():
        raise UsageError(f"--data {spec!r} is no synthetic set", "write synthetic or synthetic:N")
    train = max(int(wanted or 50_000), 10)
    if train > 5_000_000:
        raise UsageError(f"--data {spec!r} would fill the memory", "choose at most synthetic:5000000")
    # A coarse grid of colours, blown up linearly: low frequencies survive crops, and both halves differ after a flip.
    grid = np.random.Generator(np.random.Philox(key=[7, 0])).random((num_classes, 3, 4, 4), np.float32) * 127
    along = np.linspace(0, 3, 32)
    weights = np.maximum(0, 1 - np.abs(along[:, None] - np.arange(4))).astype(np.float32)
    patterns = np.einsum("ya,xb,ncab->ncyx", weights, weights, grid).astype(np.uint8)
    classes = class_names or tuple(f"class_{label:02d}" for label in range(num_classes))
    test = max(train // 5, 10)
    splits = _make_noisy_split(patterns, train, 1), _make_noisy_split(patterns, test, 2)
    return Dataset(name, *splits, classes, spec, is_official=False, source_type="synthetic images")


def _make_noisy_split(patterns: np.ndarray, size: int, seed: int) -> Split:
    random = np.random.Generator(np.random.Philox(key=[7, seed]))
    labels = random.permutation(np.arange(size, dtype=np.int64) % len(patterns))
    # Eight pixels a word, each halved to 0-127, so that adding a pattern of 0-127 cannot overflow.
    words = random.bit_generator.random_raw(size * 3072 // 8)
    words &= np.uint64(0x7F7F7F7F7F7F7F7F)
    images = words.view(np.uint8).reshape(size, 3, 32, 32)
    for start in range(0, size, 256):
        images[start : start + 256] += patterns[labels[start : start + 256]]
    return Split(images, labels)
