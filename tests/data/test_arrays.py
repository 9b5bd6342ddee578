"""Tests of data sets in arrays and .npz files: spellings, layouts, splits, resizing, and what is refused."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastcifar.data import cifar
from fastcifar.data.arrays import open_npy
from fastcifar.data.python_data import to_dataset
from fastcifar.errors import DataError

RNG = np.random.default_rng(5)
IMAGES = RNG.integers(0, 256, (30, 3, 32, 32), np.uint8)
LABELS = np.arange(30) % 3
SPLITS = {
    "train_images": IMAGES[:18], "train_labels": LABELS[:18], "val_images": IMAGES[18:24], "val_labels": LABELS[18:24],
    "test_images": IMAGES[24:], "test_labels": LABELS[24:],
}  # fmt: skip


def load(path: Path, **options: Any) -> cifar.Dataset:
    return cifar.load_dataset(str(path), cache_dir=path.parent / "cache", **options)


def save(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


SPELLINGS: dict[str, Callable[[str], str]] = {
    "train_images": str,
    "x_train": lambda key: f"{'x' if key.endswith('images') else 'y'}_{key.partition('_')[0]}",
}
LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "channel first": lambda images: images,
    "channel last": lambda images: images.transpose(0, 2, 3, 1),
    "planar": lambda images: images.reshape(len(images), 3072),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_and_layout_of_an_npz_file_gives_the_same_data_set(
    tmp_path: Path, spelling: str, layout: str
) -> None:
    arrays = {
        SPELLINGS[spelling](key): LAYOUTS[layout](array) if key.endswith("images") else array[:, None].astype(np.uint8)
        for key, array in SPLITS.items()
    }
    save(tmp_path / "a.npz", **arrays, classes=["cat", "dog", "cow"], mean=np.zeros(3))
    for _ in range(2):  # read, then from the cache
        data = load(tmp_path / "a.npz")
        assert (data.classes, data.own_images, data.source_type) == (("cat", "dog", "cow"), True, ".npz file")
        for split in ("train", "val", "test"):
            assert np.array_equal(data.all_splits[split].images, SPLITS[f"{split}_images"])
            assert np.array_equal(data.all_splits[split].labels, SPLITS[f"{split}_labels"])
            assert data.all_splits[split].labels.dtype == np.int64


def test_images_and_labels_alone_are_split_80_10_10_by_the_seed(tmp_path: Path) -> None:
    save(tmp_path / "a.npz", images=IMAGES, labels=LABELS)
    data, same, other = (load(tmp_path / "a.npz", val_seed=seed) for seed in (0, 0, 1))
    assert data.source_type == ".npz file, split 80/10/10 by --val-seed 0"
    assert [np.bincount(split.labels).tolist() for split in data.all_splits.values()] == [[8] * 3, [1] * 3, [1] * 3]
    assert len(np.unique(np.concatenate([split.images for split in data.all_splits.values()]), axis=0)) == 30
    assert data.digest == same.digest != other.digest
    assert to_dataset((IMAGES, LABELS)).digest == data.digest
    assert data.classes == ("0", "1", "2")


def test_resize_treats_arrays_as_image_files_are_treated(tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (4, 40, 64, 3), np.uint8)
    for index, pixels in enumerate(images):
        (tmp_path / "f" / "train" / "ab"[index % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "f" / "train" / "ab"[index % 2] / f"{index}.png")
    files = load(tmp_path / "f", resize=32)
    assert files.source_type == "class folders of images, resized to 32x32"
    save(tmp_path / "a.npz", train_images=images, train_labels=[0, 1, 0, 1])
    data = load(tmp_path / "a.npz", resize=32)
    assert data.source_type == ".npz file, resized to 32x32"
    assert np.array_equal(data.train.images[[0, 2, 1, 3]], files.train.images)
    first = to_dataset({"train": (images.transpose(0, 3, 1, 2), [0, 1, 0, 1])}, resize=32)
    assert np.array_equal(first.train.images, data.train.images)
    square = Image.fromarray(images[0]).resize((32, 32), Image.Resampling.BICUBIC, box=(12, 0, 52, 40))
    assert np.array_equal(data.train.images[0].transpose(1, 2, 0), np.asarray(square))
    for gray in (images[..., 0], images[..., :1]):
        save(tmp_path / "gray.npz", train_images=gray, train_labels=[0, 1, 0, 1])
        pixels = load(tmp_path / "gray.npz", resize=32).train.images
        assert (pixels == pixels[:, :1]).all()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no arrays": ({}, "contains nothing, expected arrays such as train_images"),
    "other arrays": ({"data": IMAGES}, "contains data, expected arrays such as train_images"),
    "no labels": ({"train_images": IMAGES}, "has train_images but no train_labels"),
    "no images": ({**SPLITS, "val_images": None}, "has val_labels but no val_images"),
    "flat and split": ({**SPLITS, "images": IMAGES, "labels": LABELS}, "expected images and labels, or train_images"),
    "both spellings": ({**SPLITS, "x_train": IMAGES}, "has an array twice"),
    "float images": ({**SPLITS, "train_images": IMAGES / 255}, "train_images is float64, expected uint8"),
    "other size": ({**SPLITS, "train_images": IMAGES[..., :28, :28]}, "images of 28x28 pixels.*; give --resize 32"),
    "gray": ({**SPLITS, "train_images": IMAGES[:, 0]}, "gray images of 32x32 pixels, expected 32x32 RGB"),
    "one image": ({**SPLITS, "train_images": IMAGES[0, 0]}, r"has the shape \(32, 32\)"),
    "five channels": ({**SPLITS, "train_images": np.zeros((18, 5, 32, 32), np.uint8)}, "has the shape"),
    "no image": ({**SPLITS, "train_images": IMAGES[:0]}, "contains no images"),
    "float labels": ({**SPLITS, "train_labels": LABELS[:18] * 1.0}, r"is float64 \[18\], expected 18 integers"),
    "too few labels": ({**SPLITS, "train_labels": LABELS[:17]}, r"is int64 \[17\], expected 18 integers"),
    "one-hot labels": ({**SPLITS, "train_labels": np.eye(3, dtype=int)[LABELS[:18]]}, r"is int64 \[18, 3\]"),
    "negative label": ({**SPLITS, "train_labels": LABELS[:18] - 1}, "train_labels contains the label -1"),
    "huge label": ({**SPLITS, "train_labels": LABELS[:18] + 2**40}, "contains the label 10995"),
    "label only in test": ({**SPLITS, "test_labels": LABELS[24:] + 1}, r"no training images of class 3 \(3\)"),
    "gap": ({**SPLITS, "train_labels": LABELS[:18] * 2}, r"no training images of class 1 \(1\)"),
    "one class": ({**SPLITS, **{key: LABELS[:n] * 0 for key, n in (("train_labels", 18), ("val_labels", 6),
                                                                ("test_labels", 6))}}, "labels of 1 classes"),
    "too few names": ({**SPLITS, "classes": ["cat", "dog"]}, "labels of 3 classes and 2 names"),
    "a name without images": ({**SPLITS, "classes": ["a", "b", "c", "d"]}, r"no training images of class 3 \(d\)"),
    "equal names": ({**SPLITS, "classes": ["cat", "cat", "dog"]}, "the class names are not distinct strings"),
    "numbers as names": ({**SPLITS, "classes": [1, 2, 3]}, "the class names are not distinct strings"),
    "pickled objects": ({**SPLITS, "classes": np.array(["a", 2, None], object)}, "pickled objects, which are never"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_fault12_a_wrong_npz_file_is_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    arrays, message = REFUSED[kind]
    save(tmp_path / "a.npz", **{key: array for key, array in arrays.items() if array is not None})
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path / "a.npz")
    assert str(tmp_path / "a.npz") in str(caught.value)
    assert caught.value.remedy
    assert "\n" not in str(caught.value)


def with_header(shape: tuple[int, ...], content: bytes, dtype: str = "|u1") -> bytes:
    file = io.BytesIO()
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + content


DAMAGED: dict[str, tuple[bytes, str]] = {
    "truncated array": (with_header((18, 3, 32, 32), bytes(9)), "is truncated"),
    "huge array": (with_header((2**40, 3, 32, 32), bytes(9)), "is truncated"),
    "array of nothing": (with_header((2**40,), b"", "|V0"), "is truncated"),
    "a pickle": (b"\x80\x04N.", "magic string"),
    "a bomb": (with_header((2**28,), bytes(2**28)), "unpacks to 268,"),
}


@pytest.mark.medium
@pytest.mark.parametrize("kind", DAMAGED)
def test_fault10_a_damaged_npz_file_is_refused_before_memory_is_allocated(tmp_path: Path, kind: str) -> None:
    content, message = DAMAGED[kind]
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("train_images.npy", content)
        archive.writestr("train_labels.npy", with_header((0,), b"", "<i8"))
    with pytest.raises(DataError, match=message):
        load(tmp_path / "a.npz")


def test_fault10_other_files_named_npz_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_text("<html>")
    with pytest.raises(DataError, match=r"is not an .npz file that can be read safely: File is not a zip file"):
        load(tmp_path / "a.npz")
    os.truncate(save(tmp_path / "b.npz", **SPLITS), 20_000)
    with pytest.raises(DataError, match=r"is not an .npz file that can be read safely"):
        load(tmp_path / "b.npz")


def test_fault10_damaged_npy_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, IMAGES)
    assert np.array_equal(open_npy(path, "remedy"), IMAGES)
    os.truncate(path, 20_000)
    with pytest.raises(DataError, match=r"can be read safely: .*; remedy"):
        open_npy(path, "remedy")
    with pytest.raises(DataError, match=r"no such file: .*; remedy"):
        open_npy(tmp_path, "remedy")
