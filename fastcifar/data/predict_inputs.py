"""Input images for prediction, with their ids: Kaggle pickles, .npy arrays, image files, or a split of the data set."""

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastcifar.data import cifar
from fastcifar.data.arrays import LAYOUTS, open_npy, to_planar
from fastcifar.data.cifar_files import Dataset
from fastcifar.data.image_files import IMAGE_SUFFIXES, LeftOut, decode_image, describe_left_out, list_images
from fastcifar.data.safe_pickle import load_pickle
from fastcifar.errors import DataError

PICKLE_SUFFIXES = (".pkl", ".pickle", "")
MAX_PICKLE_BYTES = 2**29  # CIFAR-100's `train`, the largest official file, has 155 MB
_PICKLE_REMEDY = f"give a pickle of {{'data': {LAYOUTS}, 'ids': N unique integers}}"
_INPUT_REMEDY = (
    "give a pickle, a .npy file, an image, a folder of images, or data:test; images end in "
    f"{', '.join(sorted(IMAGE_SUFFIXES))}"
)


@dataclass(frozen=True)
class InputImages:
    """Images uint8 [n,3,32,32], planar, their unique ids, the layout in words, and labels int64 [n] if known."""

    images: np.ndarray
    ids: list[int] | list[str]
    source: str
    layout: str
    labels: np.ndarray | None = None


def read_inputs(
    source: str, resize: int | None = None, load_dataset: Callable[[], Dataset] = cifar.load_dataset
) -> InputImages:
    """Read the images in `source`: a path, or "data:test" or "data:train" for a split of the data set.

    Files named .pkl, .pickle or without a suffix are pickles with images and ids. Images in a folder and its subfolders
    are sorted by path; ids are the paths without suffix. The id of a single image is its stem; other ids are indices.
    Image files are resized; arrays in a .npy file are resized if `resize` is given. A `UserWarning` counts the files
    of a folder that are left out.
    """
    if source.startswith("data:"):
        if source not in ("data:test", "data:train"):
            raise DataError(f"{source} is not a split of a data set", "give data:test or data:train")
        contents = load_dataset()
        if source == "data:test":
            split = contents.require_test_set()
        else:
            split = contents.require_training_images("give data:test, or another --data")
        ids = list(range(len(split.labels)))
        return InputImages(split.images, ids, f"{source} of {contents.source}", contents.source_type, split.labels)
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            return _read_image_folder(path)
        if not path.is_file():
            raise DataError(f"no such file or folder: {path}", _INPUT_REMEDY)
        suffix = path.suffix.lower()
        if suffix in IMAGE_SUFFIXES:
            return InputImages(decode_image(path, resize=True)[None], [path.stem], source, "image")
        if suffix == ".npy":
            images, layout = to_planar(open_npy(path, f"save {LAYOUTS}"), str(path), _PICKLE_REMEDY, resize)
            return InputImages(images, list(range(len(images))), str(path), f".npy, {layout}")
        if suffix in PICKLE_SUFFIXES:
            return _read_input_pickle(path)
    except OSError as error:
        raise DataError(f"cannot read {error.filename or path}: {error.strerror or error}", "check the path") from None
    raise DataError(f"{path} is not a supported kind of input", _INPUT_REMEDY)


def _read_input_pickle(path: Path) -> InputImages:
    size = path.stat().st_size
    if size > MAX_PICKLE_BYTES:  # before reading, so that a huge file cannot exhaust the memory
        raise DataError(f"{path} has {size:,} bytes, expected at most {MAX_PICKLE_BYTES:,}", _PICKLE_REMEDY)
    content = load_pickle(path.read_bytes(), str(path))
    values = []
    for name in ("data", "ids"):
        matching = [key for key in (name, name.encode()) if key in content]
        if len(matching) == 2:
            raise DataError(f"{path} has the key {name!r} twice, as str and as bytes", "remove one of them")
        if not matching:
            keys = ", ".join(sorted(repr(key) for key in content)[:6]) or "none"
            raise DataError(f"{path} has no key {name!r}; its keys: {keys}", _PICKLE_REMEDY)
        values.append(content[matching[0]])
    images, layout = to_planar(values[0], f"{path}: data", _PICKLE_REMEDY)
    ids = values[1]
    if isinstance(ids, np.ndarray):
        ids = ids.tolist()
    if not isinstance(ids, list | tuple) or any(type(value) is not int for value in ids):
        raise DataError(f"{path}: ids are not a list of integers", _PICKLE_REMEDY)
    if len(ids) != len(images):
        raise DataError(f"{path} has {len(ids):,} ids but {len(images):,} images", _PICKLE_REMEDY)
    _require_unique(ids, path)
    return InputImages(images, list(ids), str(path), layout)


def _require_unique(ids: Any, path: Path) -> None:
    value, count = Counter(ids).most_common(1)[0]
    if count > 1:
        raise DataError(f"{path}: duplicate id {value!r}", "give every image a unique id")


def _read_image_folder(folder: Path) -> InputImages:
    left_out = LeftOut()
    files = list_images(folder, left_out)
    if note := describe_left_out(folder, left_out):
        warnings.warn(note, UserWarning, stacklevel=3)
    if not files:
        remedy = "for a data set, give --data PATH and the input data:test"
        raise DataError(f"{folder} contains no images", f"{_INPUT_REMEDY}; {remedy}")
    ids = [file.relative_to(folder).with_suffix("").as_posix() for file in files]
    _require_unique(ids, folder)
    images = np.empty((len(files), 3, 32, 32), np.uint8)
    for index, file in enumerate(files):
        images[index] = decode_image(file, resize=True)
    return InputImages(images, ids, str(folder), "folder of images")
