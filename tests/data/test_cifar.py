"""Tests of locating, reading, verifying, caching and splitting CIFAR, including faults 9 to 11 of RELIABILITY."""

import dataclasses
import errno
import gzip
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastcifar.data import cifar, normalization
from fastcifar.errors import DataError, UsageError


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def load_without_warning(path: Path, cache: Path, dataset: str = "cifar10") -> cifar.Dataset:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return cifar.load_dataset(str(path), dataset, cache_dir=cache)


def load_with_warning(path: Path, cache: Path) -> tuple[cifar.Dataset, str]:
    """Return the data set and the only warning of loading it, whose location must be this file."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = cifar.load_dataset(str(path), cache_dir=cache)
    assert len(caught) == 1
    assert caught[0].category is UserWarning
    assert caught[0].filename == __file__
    assert "\n" not in str(caught[0].message)
    return loaded, str(caught[0].message)


def has_contents(loaded: cifar.Dataset, images: np.ndarray, labels: np.ndarray) -> bool:
    for split in (loaded.train, loaded.test):
        assert split.images.dtype == np.uint8
        assert split.images.shape[1:] == (3, 32, 32)
        assert split.images.flags.c_contiguous
        assert split.labels.dtype == np.int64
    flat = np.concatenate([loaded.train.images, loaded.test.images]).reshape(-1, 3072)
    return np.array_equal(flat, images) and np.array_equal([*loaded.train.labels, *loaded.test.labels], labels)


def flip_bit(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("version", ["python", "binary"])
@pytest.mark.parametrize("as_tar", [False, True])
def test_official_files_load_without_warning(tiny_cifar, cache: Path, tmp_path: Path, pack, version: str, as_tar: bool):
    folder = getattr(tiny_cifar, version)
    path = pack(folder, tmp_path / "anything.tar.gz") if as_tar else folder
    for _ in range(2):
        loaded = load_without_warning(path, cache)
        assert loaded.is_official
        assert loaded.classes == tiny_cifar.spec.class_names
        assert loaded.name == "cifar10"
        assert has_contents(loaded, tiny_cifar.images, tiny_cifar.labels)


def test_a_folder_is_preferred_over_an_archive(tiny_cifar, cache: Path, tmp_path: Path, pack):
    pack(tiny_cifar.python, tiny_cifar.root / "cifar-10-python.tar.gz")
    assert load_without_warning(tiny_cifar.root, cache).source == str(tiny_cifar.python)
    shutil.rmtree(tiny_cifar.python)
    assert load_without_warning(tiny_cifar.root, cache).source == str(tiny_cifar.binary)
    shutil.rmtree(tiny_cifar.binary)
    assert load_without_warning(tiny_cifar.root, cache).source == str(tiny_cifar.root / "cifar-10-python.tar.gz")


def test_without_data_the_environment_variable_then_the_cache_is_used(tiny_cifar, cache: Path, monkeypatch, pack):
    cache.mkdir()
    archive = pack(tiny_cifar.python, cache / "cifar-10-python.tar.gz")
    assert cifar.load_dataset(cache_dir=cache).source == str(archive)
    monkeypatch.setenv("FASTCIFAR_DATA", str(tiny_cifar.python))
    assert cifar.load_dataset(cache_dir=cache).source == str(tiny_cifar.python)
    monkeypatch.setenv("FASTCIFAR_DATA", "synthetic:50")
    assert cifar.load_dataset(cache_dir=cache).source == "synthetic:50"
    monkeypatch.delenv("FASTCIFAR_DATA")
    archive.unlink()
    with pytest.raises(DataError, match=r"FASTCIFAR_DATA.*--data synthetic"):
        cifar.load_dataset(cache_dir=cache, download=False)


def test_reordered_images_are_accepted_with_one_warning_every_time(tiny_cifar, cache: Path, tmp_path: Path):
    order = np.concatenate([np.argsort(tiny_cifar.labels[:100], kind="stable")[::-1], np.arange(100, 120)])
    tiny_cifar.write(tmp_path / "custom", tiny_cifar.images[order], tiny_cifar.labels[order])
    for folder in ("cifar-10-batches-py", "cifar-10-batches-bin"):
        for _ in range(2):  # the second time from the cache, which stores the note
            loaded, text = load_with_warning(tmp_path / "custom" / folder, cache)
            assert not loaded.is_official
            assert "official images and labels in unofficial files" in text
            assert has_contents(loaded, tiny_cifar.images[order], tiny_cifar.labels[order])


@pytest.mark.parametrize("protocol", range(6))
def test_fault11_a_custom_data_set_is_accepted_with_one_warning(
    tiny_cifar, cache: Path, tmp_path: Path, pack, protocol: int
):
    images, labels = tiny_cifar.arrays(1)
    tiny_cifar.write(tmp_path / "custom", images, labels, protocol)
    archive = pack(tmp_path / "custom" / "cifar-10-batches-py", tmp_path / "cifar-10-python.tar.gz")
    for path in (tmp_path / "custom", archive):
        loaded, text = load_with_warning(path, cache)
        assert not loaded.is_official
        assert "is not the official data set" in text
        assert has_contents(loaded, images, labels)


@pytest.mark.parametrize("name", ["data_batch_1", "data_batch_4", "test_batch", "batches.meta"])
@pytest.mark.parametrize("source", ["official", "tar", "reordered"])
def test_fault11_one_changed_byte(tiny_cifar, cache: Path, tmp_path: Path, monkeypatch, pack, name: str, source: str):
    if source == "reordered":  # of the training files only the images are official
        batches = tuple(
            dataclasses.replace(b, md5="0" * 32) if b.split == "train" else b for b in tiny_cifar.spec.python.batches
        )
        python = dataclasses.replace(tiny_cifar.spec.python, batches=batches)
        spec = dataclasses.replace(tiny_cifar.spec, python=python)
        monkeypatch.setitem(cifar.DATASETS, "cifar10", spec)
    path = tiny_cifar.python / name
    flip_bit(path, path.read_bytes().find(b"cat") if name == "batches.meta" else path.stat().st_size // 2)  # a pixel
    data = pack(tiny_cifar.python, tmp_path / "some.tar.gz") if source == "tar" else tiny_cifar.python
    with pytest.raises(DataError, match=rf"{name}\b.*damaged: expected MD5 \w+, found \w+") as caught:
        cifar.load_dataset(str(data), cache_dir=cache)
    assert caught.value.exit_code == 3
    assert not list(cache.glob("*"))


@pytest.mark.parametrize("name", ["data_batch_2.bin", "test_batch.bin", "batches.meta.txt"])
def test_fault11_one_changed_byte_in_the_binary_version(tiny_cifar, cache: Path, name: str):
    flip_bit(tiny_cifar.binary / name, 10)
    with pytest.raises(DataError, match=rf"{name} damaged"):
        cifar.load_dataset(str(tiny_cifar.binary), cache_dir=cache)


def test_fault11_damage_is_detected_in_any_order_of_the_images(tiny_cifar, cache: Path, tmp_path: Path):
    images = np.concatenate([tiny_cifar.images[:100][::-1], tiny_cifar.images[100:]])
    labels = np.concatenate([tiny_cifar.labels[:100][::-1], tiny_cifar.labels[100:]])
    images[17, 5] ^= 1
    tiny_cifar.write(tmp_path / "custom", images, labels)
    with pytest.raises(DataError, match=r"data_batch_1, .*data_batch_5 damaged"):
        cifar.load_dataset(str(tmp_path / "custom"), cache_dir=cache)


@pytest.mark.parametrize("version", ["python", "binary"])
@pytest.mark.parametrize("custom", [False, True])
def test_fault11_swapped_train_and_test(tiny_cifar, cache: Path, tmp_path: Path, version: str, custom: bool):
    folder = getattr(tiny_cifar, version)
    if custom:
        tiny_cifar.write(tmp_path / "custom", *tiny_cifar.arrays(1))
        folder = tmp_path / "custom" / folder.name
    suffix = ".bin" if version == "binary" else ""
    train, test = folder / f"data_batch_3{suffix}", folder / f"test_batch{suffix}"
    train.rename(folder / "temporary")
    test.rename(train)
    (folder / "temporary").rename(test)
    expected = "of each class" if custom and version == "binary" else "swapped"
    with pytest.raises(DataError, match=expected) as caught:
        cifar.load_dataset(str(folder), cache_dir=cache)
    assert "_batch" in str(caught.value)


def pickled_batch(**changes: object) -> bytes:
    """Return a pickled batch of 20 images; a change to None removes the key."""
    content = {"labels": [0] * 20, "data": np.zeros((20, 3072), np.uint8)}
    return pickle.dumps({key: value for key, value in (content | changes).items() if value is not None}, 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty, expected a pickle"),
        (b"hello, this is text\n", "not a pickle"),
        (b"<!DOCTYPE html><html></html>", "an HTML page, expected a pickle"),
        (pickle.dumps({}), r"has the keys \[\], expected 'data'"),
        (pickle.dumps([1]), "contains a list, expected a dict"),
        (pickled_batch(labels=None, fine_labels=[0]), "expected 'data' and 'labels'"),
        (
            pickled_batch(data=np.zeros((20, 32, 32, 3), np.uint8)),
            r"images \(20, 32, 32, 3\) uint8, expected \(20, 3072\)",
        ),
        (pickled_batch(data=np.zeros((20, 3072), np.float32)), "float32, expected"),
        (pickled_batch(data=b"xyz"), "images bytes, expected"),
        (pickled_batch(labels=[0] * (20 - 1)), "has 19 labels, expected 20"),
        (pickled_batch(labels=[0.0] * 20), "expected 20 integers"),
        (pickled_batch(labels=[10] + [0] * (20 - 1)), "the label 10, expected 0 to 9"),
        (pickled_batch(labels=[-1] + [0] * (20 - 1)), "the label -1, expected 0 to 9"),
        (pickled_batch(batch_label="testing batch 1 of 1"), "has the batch_label 'testing batch 1 of 1'"),
        (pickled_batch(), "images of class"),
    ],
)
def test_fault11_invalid_batch_files_are_refused(tiny_cifar, cache: Path, content: bytes, message: str):
    (tiny_cifar.python / "data_batch_1").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        cifar.load_dataset(str(tiny_cifar.python), cache_dir=cache)
    assert "data_batch_1" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_fault11_missing_truncated_and_oversized_files(tiny_cifar, cache: Path):
    path = tiny_cifar.python / "data_batch_2"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"data_batch_2 is not a pickle .* remain"):
        cifar.load_dataset(str(tiny_cifar.python), cache_dir=cache)
    with path.open("wb") as file:
        file.truncate(10**10)  # a sparse file of ten gigabytes, which must not be read
    with pytest.raises(DataError, match=r"data_batch_2 has 10,000,000,000 bytes, expected at most"):
        cifar.load_dataset(str(tiny_cifar.python), cache_dir=cache)
    path.unlink()
    with pytest.raises(DataError, match=r"missing in .*: data_batch_2; expected data_batch_1, .*batches.meta"):
        cifar.load_dataset(str(tiny_cifar.python), cache_dir=cache)
    (tiny_cifar.binary / "test_batch.bin").write_bytes(b"short")
    with pytest.raises(DataError, match=r"test_batch.bin has 5 bytes, expected 61,460"):
        cifar.load_dataset(str(tiny_cifar.binary), cache_dir=cache)


def test_fault11_invalid_archives_are_refused(tiny_cifar, cache: Path, tmp_path: Path, pack):
    valid = pack(tiny_cifar.python, tmp_path / "valid.tar.gz").read_bytes()
    path = tmp_path / "cifar-10-python.tar.gz"
    cases = {
        b"": "an empty file",
        b"<html>not found</html>": "an HTML page",
        b"PK\x03\x04": "is a .zip archive, .*; unpack class folders",
        valid[: len(valid) // 2]: "truncated or damaged",
        valid[:-4]: "truncated or damaged",
        valid[:-8] + b"\0\0\0\0" + valid[-4:]: "truncated or damaged",
        gzip.compress(b"not a tar file"): "truncated or damaged|contains no files",
    }
    for content, message in cases.items():
        path.write_bytes(content)
        with pytest.raises(DataError, match=message) as caught:
            cifar.load_dataset(str(path), cache_dir=cache)
        assert str(path) in str(caught.value)
        assert "expected" in str(caught.value)


def write_tar(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for info, content in members:
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def test_fault09_an_archive_with_malicious_paths_writes_nothing(tiny_cifar, cache: Path, tmp_path: Path):
    link = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
    link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret")
    (tmp_path / "secret").write_bytes(b"secret")
    outside = tarfile.TarInfo("../outside"), b"x"
    absolute = tarfile.TarInfo(str(tmp_path / "absolute")), b"x"
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DataError, match="not a regular file"):
        cifar.load_dataset(str(write_tar(tmp_path / "tricks.tar.gz", outside, absolute, (link, b""))), cache_dir=cache)
    with pytest.raises(DataError, match=r"contains ../outside, .*expected cifar-10-batches-py/"):
        cifar.load_dataset(str(write_tar(tmp_path / "tricks.tar.gz", outside, absolute)), cache_dir=cache)
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "tricks.tar.gz"])


def test_fault10_an_archive_of_zeros(tiny_cifar, cache: Path, tmp_path: Path):
    bomb = write_tar(tmp_path / "bomb.tar.gz", (tarfile.TarInfo("zeros"), bytes(2**26)))
    assert bomb.stat().st_size < 2**17
    with pytest.raises(DataError, match="unpacks to more than"):
        cifar.load_dataset(str(bomb), cache_dir=cache)
    huge = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
    with pytest.raises(DataError, match="not a regular file of the expected size"):
        cifar.load_dataset(str(write_tar(tmp_path / "bomb.tar.gz", (huge, bytes(2**23)))), cache_dir=cache)


def test_errors_for_wrong_paths_give_a_remedy(tiny_cifar, cache: Path, tmp_path: Path):
    with pytest.raises(DataError, match=r"no such file or folder: .*nowhere; .*FASTCIFAR_DATA.*--data synthetic"):
        cifar.load_dataset(str(tmp_path / "nowhere"), cache_dir=cache)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"contains no cifar10; expected one of cifar-10-batches-py/.*train/<class>"):
        cifar.load_dataset(str(tmp_path / "empty"), cache_dir=cache)
    with pytest.raises(DataError, match=r"contains cifar10, expected cifar100; give --dataset cifar10"):
        cifar.load_dataset(str(tiny_cifar.root), "cifar100", cache_dir=cache)
    with pytest.raises(UsageError, match="did you mean 'cifar10'"):
        cifar.load_dataset(str(tiny_cifar.root), "cifar-10", cache_dir=cache)


@pytest.mark.parametrize(
    ("dataset", "kind", "num_classes"), [("cifar100", "fine", 100), ("cifar100-coarse", "coarse", 20)]
)
def test_cifar100_has_fine_and_coarse_labels(
    monkeypatch, cache: Path, tmp_path: Path, dataset: str, kind: str, num_classes: int
):
    spec = cifar.DATASETS[dataset]
    sizes = {"train": 200, "test": 100}
    layouts = {
        version: dataclasses.replace(
            getattr(spec, version),
            batches=tuple(dataclasses.replace(b, num_images=sizes[b.split]) for b in getattr(spec, version).batches),
        )
        for version in ("python", "binary")
    }
    monkeypatch.setitem(cifar.DATASETS, dataset, dataclasses.replace(spec, **layouts))
    names = {"fine": [f"fine_{k:02d}" for k in range(100)], "coarse": [f"coarse_{k:02d}" for k in range(20)]}
    rng = np.random.default_rng(0)
    for version, layout in layouts.items():
        folder = tmp_path / layout.folder
        folder.mkdir()
        for batch in layout.batches:
            fine, coarse = np.arange(batch.num_images) % 100, (np.arange(batch.num_images) + 3) % 20
            data = rng.integers(0, 256, (batch.num_images, 3072), dtype=np.uint8)
            if version == "python":
                content = {b"data": data, b"fine_labels": fine.tolist(), b"coarse_labels": coarse.tolist()}
                (folder / batch.name).write_bytes(pickle.dumps(content, 2))
            else:
                (folder / batch.name).write_bytes(np.column_stack([coarse, fine, data]).astype(np.uint8).tobytes())
        if version == "python":
            meta = {f"{name}_label_names".encode(): values for name, values in names.items()}
            (folder / "meta").write_bytes(pickle.dumps(meta, 2))
        else:
            for name, values in names.items():
                (folder / f"{name}_label_names.txt").write_text("\n".join(values))
        with pytest.warns(UserWarning, match="not the official data set"):
            loaded = cifar.load_dataset(str(folder), dataset, cache_dir=cache)
        assert loaded.classes == tuple(names[kind])
        assert loaded.train.labels.tolist() == [(k + 3 * (kind == "coarse")) % num_classes for k in range(200)]


def write_pngs(root: Path, names: tuple[str, ...], splits: tuple[str, ...] = ("train", "test")) -> np.ndarray:
    """Write one image per split and class; returns them as uint8 [splits, classes, 32, 32, 3]."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (len(splits), len(names), 32, 32, 3), dtype=np.uint8)
    for s, split in enumerate(splits):
        for k, name in enumerate(names):
            (root / split / name).mkdir(parents=True)
            Image.fromarray(images[s, k]).save(root / split / name / "a.png")
    return images


def test_class_folders(tiny_cifar, cache: Path, tmp_path: Path):
    images = write_pngs(tmp_path / "sorted", ("zebra", "ant"))
    for _ in range(2):
        loaded = load_without_warning(tmp_path / "sorted", cache)
        assert loaded.classes == ("ant", "zebra")
        assert not loaded.is_official
        assert loaded.train.labels.tolist() == [0, 1]
        assert np.array_equal(loaded.train.images[0].transpose(1, 2, 0), images[0, 1])
    shuffled = tuple(reversed(tiny_cifar.spec.class_names))
    write_pngs(tmp_path / "official_names", shuffled)
    loaded = load_without_warning(tmp_path / "official_names", cache)
    assert loaded.classes == tiny_cifar.spec.class_names
    assert len(loaded.test.labels) == 10


def test_fault11_invalid_class_folders_are_refused(tiny_cifar, cache: Path, tmp_path: Path):
    write_pngs(tmp_path / "a", ("ant", "zebra"))
    image = tmp_path / "a" / "test" / "zebra" / "a.png"
    valid = image.read_bytes()
    Image.new("RGB", (28, 28)).save(image)
    with pytest.raises(DataError, match=r"zebra/a.png is 28x28, expected 32x32"):
        cifar.load_dataset(str(tmp_path / "a"), cache_dir=cache)
    tiff = io.BytesIO()
    Image.new("RGB", (32, 32)).save(tiff, "TIFF")
    float_offset = tiff.getvalue().replace(b"\x11\x01\x04\x00", b"\x11\x01\x0b\x00")  # the type of StripOffsets
    assert float_offset != tiff.getvalue()
    for content in (b"", b"text", valid[:-800], float_offset):
        image.write_bytes(content)
        with pytest.raises(DataError, match=r"zebra/a.png is not a readable image"):
            cifar.load_dataset(str(tmp_path / "a"), cache_dir=cache)
    image.unlink()
    with pytest.raises(DataError, match=r"test/zebra contains no images"):
        cifar.load_dataset(str(tmp_path / "a"), cache_dir=cache)
    image.parent.rmdir()
    with pytest.raises(DataError, match=r"2 training classes and 1 test classes \(only in one of them: zebra\)"):
        cifar.load_dataset(str(tmp_path / "a"), cache_dir=cache)


def test_synthetic_is_deterministic_learnable_and_never_cached(cache: Path):
    first, second = (cifar.load_dataset("synthetic:500", cache_dir=cache) for _ in range(2))
    assert np.array_equal(first.train.images, second.train.images)
    assert not np.array_equal(first.train.images[:100], first.test.images)
    assert len(first.train.labels) == 500
    assert len(first.test.labels) == 100
    assert np.bincount(first.train.labels).tolist() == [50] * 10
    means = np.stack([first.train.images[first.train.labels == k].mean(0) for k in range(10)])
    nearest = ((first.test.images[:, None] - means) ** 2).sum((2, 3, 4)).argmin(1)
    assert (nearest == first.test.labels).mean() > 0.9
    assert not cache.exists()
    assert len(cifar.load_dataset("synthetic:3").train.labels) == 10
    assert len(cifar.load_dataset("synthetic:3").test.labels) == 10
    cifar100 = cifar.load_dataset("synthetic:300", "cifar100")
    assert len(cifar100.classes) == 100
    assert set(cifar100.train.labels.tolist()) == set(range(100))
    with pytest.raises(UsageError, match="synthetic:N"):
        cifar.load_dataset("synthetic:many")


def list_entries(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir())


@pytest.mark.parametrize("damage", ["truncated", "json", "missing", "swapped", "older"])
def test_a_damaged_cache_is_rebuilt_silently(tiny_cifar, cache: Path, damage: str):
    load_without_warning(tiny_cifar.python, cache)
    [name] = list_entries(cache)
    entry = cache / name
    images = entry / "train_images.npy"
    if damage == "truncated":
        os.truncate(images, images.stat().st_size - 1000)
    elif damage == "json":
        (entry / "meta.json").write_text("{")
    elif damage == "missing":
        images.unlink()
    elif damage == "swapped":
        shutil.copy(entry / "test_images.npy", images)
    else:
        meta = json.loads((entry / "meta.json").read_text())
        del meta["note"]
        (entry / "meta.json").write_text(json.dumps(meta))
    assert has_contents(load_without_warning(tiny_cifar.python, cache), tiny_cifar.images, tiny_cifar.labels)
    assert list_entries(cache) == [name]
    loaded = load_without_warning(tiny_cifar.python, cache)
    assert isinstance(loaded.train.images, np.memmap)
    assert not loaded.train.images.flags.writeable


def test_changed_source_files_invalidate_the_cache(tiny_cifar, cache: Path, tmp_path: Path):
    load_without_warning(tiny_cifar.python, cache)
    images, labels = tiny_cifar.arrays(1)
    tiny_cifar.write(tmp_path / "custom", images, labels)
    for path in (tmp_path / "custom" / "cifar-10-batches-py").iterdir():
        shutil.copy(path, tiny_cifar.python)
    loaded, _ = load_with_warning(tiny_cifar.python, cache)
    assert has_contents(loaded, images, labels)


def test_a_cache_that_cannot_be_written_causes_one_warning(tiny_cifar, cache: Path, monkeypatch):
    cache.write_text("a file where the folder should be")
    loaded, text = load_with_warning(tiny_cifar.python, cache)
    assert has_contents(loaded, tiny_cifar.images, tiny_cifar.labels)
    assert "cannot cache the data set" in text
    cache.unlink()
    save, calls = np.save, []

    def fail_at_third_call(path: Path, array: np.ndarray, **options: bool) -> None:
        calls.append(path)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(path, array, **options)

    monkeypatch.setattr(np, "save", fail_at_third_call)
    loaded, text = load_with_warning(tiny_cifar.python, cache)
    assert has_contents(loaded, tiny_cifar.images, tiny_cifar.labels)
    assert "No space left" in text
    assert list_entries(cache) == []


def test_old_temporary_folders_are_removed(tiny_cifar, cache: Path):
    load_without_warning(tiny_cifar.python, cache)
    [name] = list_entries(cache)
    (cache / name / "meta.json").unlink()
    old, recent = cache / f"{name}.1-old.tmp", cache / f"{name}.2-recent.tmp"
    old.mkdir()
    recent.mkdir()
    os.utime(old, (0, 0))
    load_without_warning(tiny_cifar.python, cache)
    assert list_entries(cache) == sorted([name, recent.name])


@pytest.mark.medium
def test_concurrent_processes_share_one_entry(tmp_path: Path, cache: Path):
    write_pngs(tmp_path / "a", ("ant", "zebra"))
    code = "import sys; from fastcifar.data import cifar; from pathlib import Path;"
    code += (
        "print(cifar.load_dataset(sys.argv[1], cache_dir=Path(sys.argv[2])).train.images.sum(), 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a"), str(cache)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    results = [process.communicate(timeout=60) for process in processes]
    assert len(set(results)) == 1
    assert results[0][0].endswith("False\n")  # torch was not imported
    assert results[0][1] == ""
    assert len(list_entries(cache)) == 1


def test_an_entry_written_by_another_process_meanwhile_is_used(tiny_cifar, cache: Path, monkeypatch):
    rename, targets = Path.rename, []

    def rename_after_another_process(path: Path, target: Path) -> Path:
        if not targets:  # just before the rename, another process writes the same entry
            targets.append(target)
            shutil.copytree(path, target)
        return rename(path, target)

    monkeypatch.setattr(cifar.Path, "rename", rename_after_another_process)
    assert has_contents(load_without_warning(tiny_cifar.python, cache), tiny_cifar.images, tiny_cifar.labels)
    assert list_entries(cache) == [targets[0].name]


# mean and standard deviation of the training pixels, as printed to four digits in many projects, and the values of
# github.com/kuangliu/pytorch-cifar, whose standard deviations are means over the images
ROUNDED_NORMALIZATIONS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "kuangliu": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
}


def test_normalization_by_name_and_by_numbers():
    assert normalization.NORMALIZATIONS.keys() == ROUNDED_NORMALIZATIONS.keys()
    for name, expected in ROUNDED_NORMALIZATIONS.items():
        assert np.round(normalization.parse_normalization(name), 4).tolist() == np.array(expected).tolist()
    assert normalization.parse_normalization("0.5,0.4,0.3:0.25,0.2,0.1") == ((0.5, 0.4, 0.3), (0.25, 0.2, 0.1))
    assert normalization.parse_normalization("0.5:0.25") == ((0.5,) * 3, (0.25,) * 3)
    with pytest.raises(UsageError, match="did you mean 'cifar10'"):
        normalization.parse_normalization("cifar-10")


@pytest.mark.parametrize(
    "spec", ["", ":", "0.5:0", "0.5:-1", "1,2:1,2", "a:b", "0.5:nan", "inf:1", "1:1:1", "1,2,3,4:1"]
)
def test_invalid_normalizations_are_refused(spec: str):
    with pytest.raises(UsageError, match="normaliz"):
        normalization.parse_normalization(spec)


needs_data = pytest.mark.skipif(not os.environ.get("FASTCIFAR_DATA"), reason="needs CIFAR-10: set FASTCIFAR_DATA")


@needs_data
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_real_data_set_and_its_normalization(cache: Path):
    loaded = cifar.load_dataset(cache_dir=cache)
    assert loaded.train.images.shape == (50_000, 3, 32, 32)
    assert loaded.test.images.shape == (10_000, 3, 32, 32)
    assert loaded.classes == cifar.DATASETS["cifar10"].class_names
    expected = tuple(pytest.approx(values, abs=1e-7) for values in normalization.NORMALIZATIONS["cifar10"])
    assert normalization.channel_mean_std(loaded.train.images) == expected
