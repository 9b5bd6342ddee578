"""Images that somebody wants labels for, with their ids: Kaggle pickles, .npy arrays, image files, the data set's own.

`read` is the door. A layout is known by its shape alone, and what could be two things is an error: planar data read as
channel-last would run and scramble every image. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fastcifar.data import cifar
from fastcifar.data.class_folders import IMAGE_SUFFIXES
from fastcifar.data.safe_pickle import load_pickle
from fastcifar.errors import DataError

PICKLE_SUFFIXES = (".pkl", ".pickle", "")
SPLIT_NAMES = ("train", "test")
MAX_PIXELS = 100_000_000  # of an image file: a bomb is only ever a header
_EXPECTED_SHAPES = "uint8 of (N, 3072) planar, (N, 32, 32, 3) or (N, 3, 32, 32)"
_PICKLE_REMEDY = f"give a pickle of {{'data': {_EXPECTED_SHAPES}, 'ids': N different ints}}"
_INPUT_REMEDY = f"give a pickle, a .npy, an image, a folder of images, or data:test; images end in {', '.join(sorted(IMAGE_SUFFIXES))}"


@dataclass(frozen=True)
class InputImages:
    """images uint8 [n,3,32,32], planar; their ids in the file's order, all different; labels int64 [n] where known.

    `layout`: how they lay in the file, in words.
    """

    images: np.ndarray
    ids: list[int] | list[str]
    source: str
    layout: str
    labels: np.ndarray | None = None


def read_inputs(source: str, data: str | None = None, dataset: str = "cifar10") -> InputImages:
    """The images in `source`, a path, or "data:test" or "data:train" for a split of the data set `data`.

    Files named .pkl, .pickle or without a suffix are pickles, read by the restricted reader; of a folder every image
    below it, by path, whose path without the suffix is its id; in a .npy and in the data set an image's position is.
    Errors: `DataError`, also for duplicate and missing ids, and those of `cifar.load`.
    """
    if source.startswith("data:"):
        return _read_dataset_split(source, data, dataset)
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            return _read_image_folder(path)
        if not path.is_file():
            raise DataError(f"no such file or folder: {path}", _INPUT_REMEDY)
        suffix = path.suffix.lower()
        if suffix in IMAGE_SUFFIXES:
            return InputImages(_read_image(path)[None], [path.stem], source, "image")
        if suffix == ".npy":
            return _read_npy(path)
        if suffix in PICKLE_SUFFIXES:
            return _read_input_pickle(path)
    except OSError as error:
        raise DataError(f"cannot read {error.filename or path}: {error.strerror or error}", "check the path") from None
    raise DataError(f"{path} is no kind of input that is known", _INPUT_REMEDY)


def to_planar(array: Any, source_name: str) -> tuple[np.ndarray, str]:
    """`array`, uint8 in one of the three layouts, as [n,3,32,32] (a view where that will do), and the layout's name.

    Errors: `DataError` for another type, dtype or shape, and for no images.
    """
    if not isinstance(array, np.ndarray):
        raise DataError(f"{source_name} is of type {type(array).__name__}, expected an array", _PICKLE_REMEDY)
    if array.dtype != np.uint8:
        raise DataError(f"{source_name} is {array.dtype}, expected uint8 pixels of 0 to 255", _PICKLE_REMEDY)
    if not array.size:
        raise DataError(f"{source_name} of shape {array.shape} holds no images", _PICKLE_REMEDY)
    if array.shape[1:] == (3072,):
        return array.reshape(-1, 3, 32, 32), "planar (N, 3072)"
    if array.shape[1:] == (3, 32, 32):
        return array, "channel first (N, 3, 32, 32)"
    if array.shape[1:] == (32, 32, 3):
        return array.transpose(0, 3, 1, 2), "channel last (N, 32, 32, 3)"
    raise DataError(f"{source_name} has the shape {array.shape}, expected {_EXPECTED_SHAPES}", _PICKLE_REMEDY)


def _read_input_pickle(path: Path) -> InputImages:
    content = load_pickle(path)
    images, layout = to_planar(_get_value(content, "data", path), f"{path}: data")
    ids = _check_ids(_get_value(content, "ids", path), len(images), path)
    return InputImages(images, ids, str(path), layout)


def _get_value(content: dict[Any, Any], name: str, path: Path) -> Any:
    """What the key `name` holds, written as text or as bytes."""
    found = [key for key in (name, name.encode()) if key in content]
    if len(found) == 2:
        raise DataError(f"{path} holds {name} twice, as text and as bytes", "leave one of them out")
    if not found:
        keys = ", ".join(sorted(repr(key) for key in content)[:6]) or "nothing"
        raise DataError(f"{path} lacks {name}, it holds {keys}", _PICKLE_REMEDY)
    return content[found[0]]


def _check_ids(ids: Any, count: int, path: Path) -> list[int]:
    """Integers as they come, from a list or an array; as many as images and no two the same."""
    if isinstance(ids, np.ndarray):
        whole = ids.ndim == 1 and np.issubdtype(ids.dtype, np.integer)
        ids = ids.tolist() if whole else [None]
    if not isinstance(ids, list | tuple) or any(type(value) is not int for value in ids):
        raise DataError(f"{path}: ids are not a list of integers", _PICKLE_REMEDY)
    if len(ids) != count:
        raise DataError(f"{path} holds {len(ids):,} ids and {count:,} images, expected as many", _PICKLE_REMEDY)
    _require_unique(ids, path)
    return list(ids)


def _require_unique(ids: Sequence[int] | Sequence[str], path: Path) -> None:
    seen: set[int | str] = set()
    for value in ids:
        if value in seen:
            raise DataError(f"{path}: the id {value!r} is there twice", "give every image an id of its own")
        seen.add(value)


def _read_npy(path: Path) -> InputImages:
    try:
        # Mapped: the header's shape is compared with the file's size, and nothing is allocated for it.
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, SyntaxError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise DataError(f"{path} is not a .npy that can be read safely: {reason}", f"save {_EXPECTED_SHAPES}") from None
    images, layout = to_planar(array, str(path))
    return InputImages(images, list(range(len(images))), str(path), f".npy, {layout}")


def _read_image_folder(folder: Path) -> InputImages:
    hidden = (file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
    files = sorted(file for file in hidden if not file.name.startswith("."))
    if not files:
        remedy = "for a data set say --data PATH and data:test as the input"
        raise DataError(f"{folder} holds no images", f"{_INPUT_REMEDY}; {remedy}")
    ids = [file.relative_to(folder).with_suffix("").as_posix() for file in files]
    _require_unique(ids, folder)
    images = np.empty((len(files), 3, 32, 32), np.uint8)
    for position, file in enumerate(files):
        images[position] = _read_image(file)
    return InputImages(images, ids, str(folder), "folder of images")


def _read_image(file: Path) -> np.ndarray:
    """An image file of any size as uint8 [3,32,32] RGB: its largest centred square, by antialiased bicubic.

    One of 32x32 is left as it is; a photograph is first turned as its EXIF says.
    """
    try:
        with Image.open(file) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{file} has {image.width}x{image.height} pixels", "make it smaller")
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError, EOFError) as error:
        raise DataError(f"{file} is not an image that can be read ({error})", "replace or remove it") from None
    side = min(upright.size)
    left, top = (upright.width - side) / 2, (upright.height - side) / 2
    square = upright.resize((32, 32), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return np.asarray(square).transpose(2, 0, 1)


def _read_dataset_split(source: str, data: str | None, dataset: str) -> InputImages:
    name = source.removeprefix("data:")
    if name not in SPLIT_NAMES:
        raise DataError(f"{source} is no split of a data set", "say data:test or data:train")
    loaded = cifar.load_dataset(data, dataset)
    split = loaded.test if name == "test" else loaded.train
    ids = list(range(len(split.labels)))
    return InputImages(split.images, ids, f"{source} of {loaded.source}", loaded.source_type, split.labels)
