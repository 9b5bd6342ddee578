"""Tests of class folders of images: layouts, class order, what is left out, and the cache (faults 29, 30, 32, 47)."""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastcifar.data import cifar
from fastcifar.data.cifar import DATASETS, Dataset
from fastcifar.data.class_folders import natural_order
from fastcifar.errors import DataError, UsageError
from fastcifar.training.build import split_validation
from tests.data.image_folders import write_class_folders, write_flat, write_noise

CAT_DOG = {"cat": 10, "dog": 200}


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Dataset]:
    """Return a function that loads class folders, where a warning is an error."""

    def load_dataset(root: Path, **options: int) -> Dataset:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return cifar.load_dataset(str(root), cache_dir=tmp_path / "cache", **options)  # type: ignore[arg-type]

    return load_dataset


def class_means(data: Dataset, split: str = "train") -> dict[str, set[int]]:
    """Return the mean pixel of the images of each class."""
    images, labels = data.all_splits[split].images, data.all_splits[split].labels
    return {
        name: {int(image.mean().round()) for image in images[labels == label]}
        for label, name in enumerate(data.classes)
    }


LAYOUTS = {
    "train, test": ({"train": 3, "test": 2}, None, 4),
    "train, val, test": ({"train": 3, "val": 1, "test": 2}, 2, 4),
    "train, val": ({"train": 3, "val": 1}, 2, 0),
    "train": ({"train": 3}, None, 0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fault29_val_is_the_validation_split_and_never_the_test_set(
    load: Callable[..., Dataset], tmp_path: Path, layout: str
) -> None:
    counts, num_val, num_test = LAYOUTS[layout]
    write_class_folders(tmp_path / "a", CAT_DOG, counts)
    for split, offset in (("val", 1), ("test", 2)):
        if split in counts:
            write_class_folders(
                tmp_path / "a", {name: CAT_DOG[name] + offset for name in CAT_DOG}, {split: counts[split]}
            )
    for _ in range(2):  # read, then from the cache
        data = load(tmp_path / "a")
        assert class_means(data) == {"cat": {10}, "dog": {200}}
        assert (None if data.val is None else len(data.val.labels)) == num_val
        assert len(data.test.labels) == num_test
        if num_val is not None:
            assert class_means(data, "val") == {"cat": {11}, "dog": {201}}
            assert split_validation(data, None, 0)[1] is data.val
            for val_size in (0, 1, 2):
                with pytest.raises(UsageError, match="has its own validation split of 2 images; leave --val-size out"):
                    split_validation(data, val_size, 0)
        if num_test:
            assert class_means(data, "test") == {"cat": {12}, "dog": {202}}
            assert data.require_test_set() is data.test
        else:
            with pytest.raises(DataError, match="has no test set; add a folder test/"):
                data.require_test_set()


def test_fault29_class_folders_alone_are_split_80_10_10_by_the_seed(
    load: Callable[..., Dataset], tmp_path: Path
) -> None:
    write_noise(tmp_path, ("flat/b", "flat/a", "flat/c"), {"": 20})
    first, again, other = (load(tmp_path / "flat", val_seed=seed) for seed in (0, 0, 1))
    assert first.classes == ("a", "b", "c")
    assert first.source_type == "class folders of images, split 80/10/10 by --val-seed 0"
    assert first.val
    assert [np.bincount(split.labels).tolist() for split in (first.train, first.val, first.test)] == [
        [16, 16, 16], [2, 2, 2], [2, 2, 2],
    ]  # fmt: skip
    all_images = np.concatenate([first.train.images, first.val.images, first.test.images]).reshape(60, -1)
    assert len(np.unique(all_images, axis=0)) == 60, "no image is in two splits"
    assert (first.digest, first.test.images.tobytes()) == (again.digest, again.test.images.tobytes())
    assert first.digest != other.digest
    assert first.test.images.tobytes() != other.test.images.tobytes()


def test_fault29_small_class_folders_alone_keep_every_class_in_training(
    load: Callable[..., Dataset], tmp_path: Path
) -> None:
    for name, count in (("a", 30), ("b", 1), ("c", 2)):
        write_noise(tmp_path / "flat", (name,), {"": count})
    data = load(tmp_path / "flat")
    assert set(data.train.labels.tolist()) == {0, 1, 2}
    assert data.val
    assert (len(data.train.labels), len(data.val.labels), len(data.test.labels)) == (27, 3, 3)
    write_noise(tmp_path / "tiny", ("a", "b"), {"": 1})
    assert len(load(tmp_path / "tiny").test.labels) == 0


NOT_FLAT: dict[str, tuple[str, ...]] = {
    "one class": ("a/0.png",),
    "a test folder without train": ("test/0.png", "dog/0.png"),
    "a val folder without train": ("val/0.png", "cat/0.png", "dog/0.png"),
    "images without class folders": ("0.png", "1.png"),
    "hidden folders": (".a/0.png", "__MACOSX/0.png", "cat/0.png"),
    "other files": ("cat/0.gif", "dog/0.gif"),
}


@pytest.mark.parametrize("kind", NOT_FLAT)
def test_fault29_other_folders_are_not_taken_for_classes(
    load: Callable[..., Dataset], tmp_path: Path, kind: str
) -> None:
    for name in NOT_FLAT[kind]:
        write_flat(tmp_path / "a" / name, 9)
    is_one_class = kind in ("one class", "hidden folders")
    message = (
        "images of one class, (a|cat), " if is_one_class else r"contains no cifar10; expected one of .*<class>/\*.png"
    )
    with pytest.raises(DataError, match=message):
        load(tmp_path / "a")


def test_fault29_everything_that_is_left_out_is_counted_in_one_line(tmp_path: Path) -> None:
    root = write_class_folders(tmp_path / "a", CAT_DOG, {"train": 2, "test": 1})
    for name in ("train/cat/x.gif", "train/loose.png", "train/cat/.ipynb_checkpoints/h.png", "validation/cat/v.png"):
        write_flat(root / name, 77)
    write_flat(root / "train" / ".ipynb_checkpoints" / "cat" / "h.png", 77)
    write_flat(root / "__MACOSX" / "train" / "cat" / "h.png", 77)
    write_flat(root / "train" / "dog" / "deeper" / "n.png", 200)
    (root / "labels.csv").write_text("a,b")
    for _ in range(2):  # the second time from the cache
        with pytest.warns(UserWarning, match="left out") as caught:
            data = cifar.load_dataset(str(root), cache_dir=tmp_path / "cache")
        assert [str(warning.message) for warning in caught] == [
            f"{root}: left out 1 .gif (format not supported); 3 folders (hidden); 1 .png (not in a class folder); "
            "1 .csv, 1 folder (not in train/, test/)"
        ]
        assert class_means(data) == {"cat": {10}, "dog": {200}}
        assert np.bincount(data.train.labels).tolist() == [2, 3], "images in nested folders are read"
    (root / "train" / "cat" / "y.webm").write_bytes(b"x")  # not an image, so the cache entry stays valid
    with pytest.warns(UserWarning, match=r"1 \.gif, 1 \.webm \(format not supported\)"):
        cifar.load_dataset(str(root), cache_dir=tmp_path / "cache")


def test_fault29_classes_must_be_the_same_in_all_splits(load: Callable[..., Dataset], tmp_path: Path) -> None:
    root = write_class_folders(tmp_path / "a", CAT_DOG, {"train": 2, "val": 1, "test": 1})
    shutil.rmtree(root / "val" / "dog")
    with pytest.raises(DataError, match=r"2 training classes and 1 val classes \(only in one of them: dog\)"):
        load(root)


def swap_classes(root: Path) -> None:
    for split in ("train", "test"):
        (root / split / "cat").rename(root / split / "x")
        (root / split / "dog").rename(root / split / "cat")
        (root / split / "x").rename(root / split / "dog")


def replace_by_rename(root: Path) -> None:
    for file in (root / "train" / "cat").iterdir():
        stat = file.stat()
        write_flat(file.with_name("new.bmp"), 200)
        file.with_name("new.bmp").rename(file)
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def overwrite_in_place(root: Path) -> None:
    for file in (root / "train" / "cat").iterdir():
        stat, size = file.stat(), file.stat().st_size
        write_flat(file, 200)
        assert file.stat().st_size == size
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def swap_splits(root: Path) -> None:
    (root / "train").rename(root / "x")
    (root / "test").rename(root / "train")
    (root / "x").rename(root / "test")


def replace_folder(root: Path) -> None:
    other = write_class_folders(root.with_name("other"), {"cat": 200, "dog": 10}, {"train": 3, "test": 3}, "bmp")
    for path in other.rglob("*.bmp"):
        os.utime(path, (1.6e9, 1.6e9))
    root.rename(root.with_name("old"))
    other.rename(root)


# function -> the value of the training images of class cat afterwards
REPLACEMENTS: dict[Callable[[Path], None], int] = {
    swap_classes: 200,
    replace_by_rename: 200,
    overwrite_in_place: 200,
    swap_splits: 12,
    replace_folder: 200,
}


@pytest.mark.parametrize("replace", REPLACEMENTS, ids=lambda function: function.__name__)
def test_fault30_the_cache_notices_files_of_equal_size_and_time(
    load: Callable[..., Dataset], tmp_path: Path, replace: Callable[[Path], None]
) -> None:
    root = write_class_folders(tmp_path / "a", CAT_DOG, {"train": 3}, "bmp")
    write_class_folders(root, {"cat": 12, "dog": 202}, {"test": 3}, "bmp")
    for path in root.rglob("*.bmp"):
        os.utime(path, (1.6e9, 1.6e9))
    assert class_means(load(root))["cat"] == {10}
    replace(root)
    assert {(path.stat().st_mtime, path.stat().st_size) for path in root.rglob("*.bmp")} == {(1.6e9, 3126)}
    assert class_means(load(root))["cat"] == {REPLACEMENTS[replace]}


def test_fault30_the_cache_notices_a_nested_folder_that_moves_to_another_class(
    load: Callable[..., Dataset], tmp_path: Path
) -> None:
    root = write_class_folders(tmp_path / "a", CAT_DOG, {"train": 3}, "bmp")
    (nested := root / "train" / "dog" / "camera" / "day").mkdir(parents=True)
    for path in (root / "train" / "dog").glob("*.bmp"):
        shutil.copy(path, nested)
    assert class_means(load(root)) == {"cat": {10}, "dog": {200}}
    (root / "train" / "dog" / "camera").rename(root / "train" / "cat" / "camera")
    assert class_means(load(root)) == {"cat": {10, 200}, "dog": {200}}


def test_an_unchanged_folder_is_read_from_the_cache(
    load: Callable[..., Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_class_folders(tmp_path / "a", CAT_DOG, {"train": 2, "val": 2})
    expected = load(root)
    (tmp_path / "link").symlink_to(root)
    monkeypatch.setattr("fastcifar.data.class_folders.decode_image", lambda _: pytest.fail("decoded again"))
    for spelling in (root, tmp_path / "link", root / ".." / "a"):
        data = load(spelling)
        assert isinstance(data.train.images, np.memmap)
        assert data.digest == expected.digest


NAME_ORDERS = {
    "numbers": [str(number) for number in range(12)],
    "words with numbers": ["class1", "class2", "class10", "class100"],
    "leading zeros": ["00", "01", "2", "10"],
    "numbers before words": ["3", "20", "ant", "bee"],
    "WordNet identifiers": ["n01440764", "n01443537", "n02102040"],
    "versions": ["v1-2", "v1-10", "v2-1"],
}


@pytest.mark.parametrize("kind", NAME_ORDERS)
def test_fault32_class_names_are_in_natural_order(load: Callable[..., Dataset], tmp_path: Path, kind: str) -> None:
    names = NAME_ORDERS[kind]
    assert sorted(set(names), key=natural_order) == names
    values = {name: 20 * index for index, name in enumerate(names)}
    data = load(write_class_folders(tmp_path / "a", values, {"train": 2, "test": 1}))
    assert list(data.classes) == names
    assert class_means(data) == {name: {value} for name, value in values.items()}


def test_fault32_names_of_the_data_set_keep_their_order(load: Callable[..., Dataset], tmp_path: Path) -> None:
    names = DATASETS["cifar10"].class_names
    for root in (write_noise(tmp_path / "a", names[::-1], {"train": 1}), write_noise(tmp_path / "b", names, {"": 2})):
        assert load(root).classes == names


def test_fault47_a_class_with_one_image_stays_in_training(load: Callable[..., Dataset], tmp_path: Path) -> None:
    root = write_class_folders(tmp_path / "a", {"a": 10, "b": 200}, {"train": 10, "test": 2})
    for split in ("train", "test"):
        write_flat(root / split / "c" / "0.png", 120)
    data = load(root)
    for val_size in (None, 1, 2, 5, 18):
        train, val = split_validation(data, val_size, 0)
        assert 2 in train.labels
        assert 2 not in val.labels
    with pytest.raises(UsageError, match=r"--val-size 19 is out of range .*choose 0 to 18"):
        split_validation(data, 19, 0)


def test_names_that_are_not_utf8_and_links(load: Callable[..., Dataset], tmp_path: Path) -> None:
    root = write_class_folders(tmp_path / "a", CAT_DOG, {"train": 1, "test": 1})
    for split in (b"train", b"test"):
        folder = os.fsencode(root) + b"/" + split + b"/caf\xe9"
        os.mkdir(folder)
        with open(folder + b"/\xff.png", "wb") as file:
            Image.new("RGB", (32, 32), (50, 50, 50)).save(file, "PNG")
    elsewhere = write_class_folders(tmp_path / "b", {"fox": 90}, {"train": 1, "test": 1})
    for split in ("train", "test"):
        (root / split / "fox").symlink_to(elsewhere / split / "fox")
    for _ in range(2):
        data = load(root)
        assert [os.fsencode(name) for name in data.classes] == [b"caf\xe9", b"cat", b"dog", b"fox"]
        assert list(class_means(data).values()) == [{50}, {10}, {200}, {90}]


def test_errors_name_the_file_and_give_a_remedy(load: Callable[..., Dataset], tmp_path: Path) -> None:
    root = write_class_folders(tmp_path / "a", CAT_DOG, {"train": 2, "test": 1})
    Image.new("RGB", (64, 64)).save(root / "train" / "cat" / "0.png")
    with pytest.raises(DataError, match=re.escape("train/cat/0.png is 64x64, expected 32x32; give --resize 32")):
        load(root)
