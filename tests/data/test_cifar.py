"""Finding, reading, judging, caching and splitting CIFAR; faults 9 and 11 of RELIABILITY that belong to this room."""

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
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastcifar.data import cifar, dataset_cache, normalization
from fastcifar.errors import DataError, UsageError


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def quiet(path: Path, cache: Path, dataset: str = "cifar10") -> cifar.Dataset:
    """The set, which must be loaded without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return cifar.load_dataset(str(path), dataset, cache_dir=cache)


def warned(path: Path, cache: Path) -> tuple[cifar.Dataset, str]:
    """The set and the one warning of loading it, which must point here."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        loaded = cifar.load_dataset(str(path), cache_dir=cache)
    assert len(seen) == 1
    assert seen[0].category is UserWarning
    assert seen[0].filename == __file__
    assert "\n" not in str(seen[0].message)
    return loaded, str(seen[0].message)


def same(loaded: cifar.Dataset, images: np.ndarray, labels: np.ndarray) -> bool:
    for part in (loaded.train, loaded.test):
        assert part.images.dtype == np.uint8
        assert part.images.shape[1:] == (3, 32, 32)
        assert part.images.flags.c_contiguous
        assert part.labels.dtype == np.int64
    flat = np.concatenate([loaded.train.images, loaded.test.images]).reshape(-1, 3072)
    return np.array_equal(flat, images) and np.array_equal([*loaded.train.labels, *loaded.test.labels], labels)


def flip(path: Path, at: int) -> None:
    blob = bytearray(path.read_bytes())
    blob[at] ^= 1
    path.write_bytes(blob)


@pytest.mark.parametrize("form", ["python", "binary"])
@pytest.mark.parametrize("as_tar", [False, True])
def test_official_files_load_without_a_word(tiny_cifar, cache: Path, tmp_path: Path, pack, form: str, as_tar: bool):
    folder = getattr(tiny_cifar, form)
    path = pack(folder, tmp_path / "anything.tar.gz") if as_tar else folder
    for _ in range(2):
        loaded = quiet(path, cache)
        assert loaded.is_official
        assert loaded.classes == tiny_cifar.row.class_names
        assert loaded.name == "cifar10"
        assert same(loaded, tiny_cifar.images, tiny_cifar.labels)


@pytest.mark.parametrize("protocol", range(6))
def test_every_pickle_protocol_loads(tiny_cifar, cache: Path, tmp_path: Path, protocol: int):
    tiny_cifar.write(tmp_path / "mine", tiny_cifar.images, tiny_cifar.labels, protocol)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert same(cifar.load_dataset(str(tmp_path / "mine"), cache_dir=cache), tiny_cifar.images, tiny_cifar.labels)


def test_a_folder_that_contains_the_set_prefers_folder_over_tar(tiny_cifar, cache: Path, tmp_path: Path, pack):
    pack(tiny_cifar.python, tiny_cifar.root / "cifar-10-python.tar.gz")
    assert quiet(tiny_cifar.root, cache).source == str(tiny_cifar.python)
    shutil.rmtree(tiny_cifar.python)
    assert quiet(tiny_cifar.root, cache).source == str(tiny_cifar.binary)
    shutil.rmtree(tiny_cifar.binary)
    assert quiet(tiny_cifar.root, cache).source == str(tiny_cifar.root / "cifar-10-python.tar.gz")


def test_without_data_the_variable_then_the_cache(tiny_cifar, cache: Path, monkeypatch, pack):
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
    tiny_cifar.write(tmp_path / "mine", tiny_cifar.images[order], tiny_cifar.labels[order])
    for form in ("cifar-10-batches-py", "cifar-10-batches-bin"):
        for _ in range(2):  # the second from the cache, which remembers
            loaded, text = warned(tmp_path / "mine" / form, cache)
            assert not loaded.is_official
            assert "official images and labels in unofficial files" in text
            assert same(loaded, tiny_cifar.images[order], tiny_cifar.labels[order])


def test_fault11_somebodys_own_set_is_accepted_with_one_warning(tiny_cifar, cache: Path, tmp_path: Path, pack):
    images, labels = tiny_cifar.arrays(1)
    tiny_cifar.write(tmp_path / "mine", images, labels)
    archive = pack(tmp_path / "mine" / "cifar-10-batches-py", tmp_path / "cifar-10-python.tar.gz")
    for path in (tmp_path / "mine", archive):
        loaded, text = warned(path, cache)
        assert not loaded.is_official
        assert "is not the official data set" in text
        assert same(loaded, images, labels)


@pytest.mark.parametrize("name", ["data_batch_1", "data_batch_4", "test_batch", "batches.meta"])
@pytest.mark.parametrize("where", ["official", "tar", "reordered"])
def test_fault11_one_changed_byte(tiny_cifar, cache: Path, tmp_path: Path, monkeypatch, pack, name: str, where: str):
    if where == "reordered":  # a packing whose MD5s are known beside the official ones
        known = {batch.name: batch.md5 for batch in tiny_cifar.row.python.batches if batch.split == "train"}
        batches = tuple(
            dataclasses.replace(b, md5="0" * 32) if b.name in known else b for b in tiny_cifar.row.python.batches
        )
        row = dataclasses.replace(
            tiny_cifar.row, python=dataclasses.replace(tiny_cifar.row.python, batches=batches), reordered_md5s=known
        )
        monkeypatch.setitem(cifar.DATASETS, "cifar10", row)
    path = tiny_cifar.python / name
    flip(path, path.read_bytes().find(b"cat") if name == "batches.meta" else path.stat().st_size // 2)  # a pixel
    given = pack(tiny_cifar.python, tmp_path / "some.tar.gz") if where == "tar" else tiny_cifar.python
    with pytest.raises(DataError, match=rf"{name}\b.*damaged: expected MD5 \w+, found \w+") as caught:
        cifar.load_dataset(str(given), cache_dir=cache)
    assert caught.value.exit_code == 3
    assert not list(cache.glob("*"))


@pytest.mark.parametrize("name", ["data_batch_2.bin", "test_batch.bin", "batches.meta.txt"])
def test_fault11_one_changed_byte_in_the_binary_packing(tiny_cifar, cache: Path, name: str):
    flip(tiny_cifar.binary / name, 10)
    with pytest.raises(DataError, match=rf"{name} damaged"):
        cifar.load_dataset(str(tiny_cifar.binary), cache_dir=cache)


def test_fault11_damage_in_an_unknown_order_is_found_by_content(tiny_cifar, cache: Path, tmp_path: Path):
    images = np.concatenate([tiny_cifar.images[:100][::-1], tiny_cifar.images[100:]])
    labels = np.concatenate([tiny_cifar.labels[:100][::-1], tiny_cifar.labels[100:]])
    images[17, 5] ^= 1
    tiny_cifar.write(tmp_path / "mine", images, labels)
    with pytest.raises(DataError, match=r"data_batch_1, .*data_batch_5 damaged"):
        cifar.load_dataset(str(tmp_path / "mine"), cache_dir=cache)


@pytest.mark.parametrize("form", ["python", "binary"])
@pytest.mark.parametrize("mine", [False, True])
def test_fault11_swapped_train_and_test(tiny_cifar, cache: Path, tmp_path: Path, form: str, mine: bool):
    folder = getattr(tiny_cifar, form)
    if mine:
        tiny_cifar.write(tmp_path / "mine", *tiny_cifar.arrays(1))
        folder = tmp_path / "mine" / folder.name
    suffix = ".bin" if form == "binary" else ""
    one, two = folder / f"data_batch_3{suffix}", folder / f"test_batch{suffix}"
    one.rename(folder / "aside")
    two.rename(one)
    (folder / "aside").rename(two)
    expected = "of each class" if mine and form == "binary" else "swapped"
    with pytest.raises(DataError, match=expected) as caught:
        cifar.load_dataset(str(folder), cache_dir=cache)
    assert "_batch" in str(caught.value)


def batch_of(**changes: object) -> bytes:
    whole = {"labels": [0] * 20, "data": np.zeros((20, 3072), np.uint8)}
    return pickle.dumps({key: value for key, value in (whole | changes).items() if value is not None}, 2)


@pytest.mark.parametrize(
    ("blob", "text"),
    [
        (b"", "is empty, expected a pickle"),
        (b"hello, this is text\n", "not a pickle"),
        (b"<!DOCTYPE html><html></html>", "an HTML page, expected a pickle"),
        (pickle.dumps({}), r"has the keys \[\], expected 'data'"),
        (pickle.dumps([1]), "holds a list, expected a dict"),
        (batch_of(labels=None, fine_labels=[0]), "expected 'data' and 'labels'"),
        (
            batch_of(data=np.zeros((20, 32, 32, 3), np.uint8)),
            r"images \(20, 32, 32, 3\) uint8, expected \(20, 3072\)",
        ),
        (batch_of(data=np.zeros((20, 3072), np.float32)), "float32, expected"),
        (batch_of(data=b"xyz"), "images bytes, expected"),
        (batch_of(labels=[0] * (20 - 1)), "has 19 labels, expected 20"),
        (batch_of(labels=[0.0] * 20), "expected 20 integers"),
        (batch_of(labels=[10] + [0] * (20 - 1)), "the label 10, expected 0 to 9"),
        (batch_of(labels=[-1] + [0] * (20 - 1)), "the label -1, expected 0 to 9"),
        (batch_of(batch_label="testing batch 1 of 1"), "calls itself 'testing batch 1 of 1'"),
        (batch_of(), "images of class"),
    ],
)
def test_fault11_a_batch_that_is_none(tiny_cifar, cache: Path, blob: bytes, text: str):
    (tiny_cifar.python / "data_batch_1").write_bytes(blob)
    with pytest.raises(DataError, match=text) as caught:
        cifar.load_dataset(str(tiny_cifar.python), cache_dir=cache)
    assert "data_batch_1" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_fault11_missing_truncated_and_oversized_files(tiny_cifar, cache: Path):
    path = tiny_cifar.python / "data_batch_2"
    blob = path.read_bytes()
    path.write_bytes(blob[: len(blob) // 2])
    with pytest.raises(DataError, match=r"data_batch_2 is not a pickle .* remain"):
        cifar.load_dataset(str(tiny_cifar.python), cache_dir=cache)
    with path.open("wb") as file:
        file.truncate(10**10)  # sparse: ten gigabytes that must not be read
    with pytest.raises(DataError, match=r"data_batch_2 has 10,000,000,000 bytes, expected at most"):
        cifar.load_dataset(str(tiny_cifar.python), cache_dir=cache)
    path.unlink()
    with pytest.raises(DataError, match=r"lacks data_batch_2; expected data_batch_1, .*batches.meta"):
        cifar.load_dataset(str(tiny_cifar.python), cache_dir=cache)
    (tiny_cifar.binary / "test_batch.bin").write_bytes(b"short")
    with pytest.raises(DataError, match=r"test_batch.bin has 5 bytes, expected 61,460"):
        cifar.load_dataset(str(tiny_cifar.binary), cache_dir=cache)


def test_fault11_archives_that_are_none(tiny_cifar, cache: Path, tmp_path: Path, pack):
    whole = pack(tiny_cifar.python, tmp_path / "whole.tar.gz").read_bytes()
    given = tmp_path / "cifar-10-python.tar.gz"
    cases = {
        b"": "an empty file",
        b"<html>not found</html>": "an HTML page",
        b"PK\x03\x04": "another kind of file",
        whole[: len(whole) // 2]: "cut short or damaged",
        whole[:-4]: "cut short or damaged",
        whole[:-8] + b"\0\0\0\0" + whole[-4:]: "cut short or damaged",
        gzip.compress(b"no tar in here"): "cut short or damaged|holds nothing",
    }
    for blob, text in cases.items():
        given.write_bytes(blob)
        with pytest.raises(DataError, match=text) as caught:
            cifar.load_dataset(str(given), cache_dir=cache)
        assert str(given) in str(caught.value)
        assert "expected" in str(caught.value)


def tar_of(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for info, body in members:
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))
    return path


def test_fault09_an_archive_with_path_tricks_writes_nothing(tiny_cifar, cache: Path, tmp_path: Path):
    link = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
    link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret")
    (tmp_path / "secret").write_bytes(b"secret")
    outside = tarfile.TarInfo("../outside"), b"x"
    absolute = tarfile.TarInfo(str(tmp_path / "absolute")), b"x"
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DataError, match="not a plain file"):
        cifar.load_dataset(str(tar_of(tmp_path / "tricks.tar.gz", outside, absolute, (link, b""))), cache_dir=cache)
    with pytest.raises(DataError, match=r"holds ../outside, .*expected cifar-10-batches-py/"):
        cifar.load_dataset(str(tar_of(tmp_path / "tricks.tar.gz", outside, absolute)), cache_dir=cache)
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "tricks.tar.gz"])


def test_fault10_an_archive_of_zeros(tiny_cifar, cache: Path, tmp_path: Path):
    bomb = tar_of(tmp_path / "bomb.tar.gz", (tarfile.TarInfo("zeros"), bytes(2**26)))
    assert bomb.stat().st_size < 2**17
    with pytest.raises(DataError, match="unpacks to more than"):
        cifar.load_dataset(str(bomb), cache_dir=cache)
    huge = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
    with pytest.raises(DataError, match="not a plain file of a sensible size"):
        cifar.load_dataset(str(tar_of(tmp_path / "bomb.tar.gz", (huge, bytes(2**23)))), cache_dir=cache)


def test_a_wrong_path_says_what_to_do(tiny_cifar, cache: Path, tmp_path: Path):
    with pytest.raises(DataError, match=r"no such file or folder: .*nowhere; .*FASTCIFAR_DATA.*--data synthetic"):
        cifar.load_dataset(str(tmp_path / "nowhere"), cache_dir=cache)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no cifar10; looked for cifar-10-batches-py/.*train/<class>"):
        cifar.load_dataset(str(tmp_path / "empty"), cache_dir=cache)
    with pytest.raises(DataError, match=r"holds cifar10, expected cifar100; say --dataset cifar10"):
        cifar.load_dataset(str(tiny_cifar.root), "cifar100", cache_dir=cache)
    with pytest.raises(UsageError, match="did you mean 'cifar10'"):
        cifar.load_dataset(str(tiny_cifar.root), "cifar-10", cache_dir=cache)


def test_cifar100_takes_the_fine_labels(monkeypatch, cache: Path, tmp_path: Path):
    row = cifar.DATASETS["cifar100"]
    sizes = {"train": 200, "test": 100}
    small = {
        form: dataclasses.replace(
            getattr(row, form),
            batches=tuple(dataclasses.replace(b, num_images=sizes[b.split]) for b in getattr(row, form).batches),
        )
        for form in ("python", "binary")
    }
    monkeypatch.setitem(cifar.DATASETS, "cifar100", dataclasses.replace(row, **small))
    names = [f"fine_{k:02d}" for k in range(100)]
    random = np.random.default_rng(0)
    for form, packing in small.items():
        folder = tmp_path / packing.folder
        folder.mkdir()
        for batch in packing.batches:
            fine, coarse = np.arange(batch.rows) % 100, np.arange(batch.rows) % 20
            data = random.integers(0, 256, (batch.rows, 3072), dtype=np.uint8)
            if form == "python":
                content = {b"data": data, b"fine_labels": fine.tolist(), b"coarse_labels": coarse.tolist()}
                (folder / batch.name).write_bytes(pickle.dumps(content, 2))
            else:
                (folder / batch.name).write_bytes(np.column_stack([coarse, fine, data]).astype(np.uint8).tobytes())
        if form == "python":
            (folder / packing.meta_file).write_bytes(pickle.dumps({b"fine_label_names": names}, 2))
        else:
            (folder / packing.meta_file).write_text("\n".join(names))
        with pytest.warns(UserWarning, match="not the official data set"):
            loaded = cifar.load_dataset(str(folder), "cifar100", cache_dir=cache)
        assert loaded.classes == tuple(names)
        assert loaded.train.labels.tolist() == [k % 100 for k in range(200)]


def write_pngs(root: Path, names: tuple[str, ...], parts: tuple[str, ...] = ("train", "test")) -> np.ndarray:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (len(parts), len(names), 32, 32, 3), dtype=np.uint8)
    for p, part in enumerate(parts):
        for k, name in enumerate(names):
            (root / part / name).mkdir(parents=True)
            Image.fromarray(images[p, k]).save(root / part / name / "a.png")
    return images


def test_class_folders(tiny_cifar, cache: Path, tmp_path: Path):
    images = write_pngs(tmp_path / "sorted", ("zebra", "ant"))
    (tmp_path / "sorted" / "train" / "ant" / "notes.txt").write_text("not an image")
    for _ in range(2):
        loaded = quiet(tmp_path / "sorted", cache)
        assert loaded.classes == ("ant", "zebra")
        assert not loaded.is_official
        assert loaded.train.labels.tolist() == [0, 1]
        assert np.array_equal(loaded.train.images[0].transpose(1, 2, 0), images[0, 1])
    shuffled = tuple(reversed(tiny_cifar.row.class_names))
    write_pngs(tmp_path / "official_names", shuffled, ("train", "val"))
    loaded = quiet(tmp_path / "official_names", cache)
    assert loaded.classes == tiny_cifar.row.class_names
    assert len(loaded.test.labels) == 10


def test_fault11_class_folders_that_cannot_be_read(tiny_cifar, cache: Path, tmp_path: Path):
    write_pngs(tmp_path / "a", ("ant", "zebra"))
    image = tmp_path / "a" / "test" / "zebra" / "a.png"
    whole = image.read_bytes()
    Image.new("RGB", (28, 28)).save(image)
    with pytest.raises(DataError, match=r"zebra/a.png is 28x28, expected 32x32"):
        cifar.load_dataset(str(tmp_path / "a"), cache_dir=cache)
    for blob in (b"", b"text", whole[:-800]):
        image.write_bytes(blob)
        with pytest.raises(DataError, match=r"zebra/a.png is not an image that can be read"):
            cifar.load_dataset(str(tmp_path / "a"), cache_dir=cache)
    image.unlink()
    with pytest.raises(DataError, match=r"test/zebra holds no images"):
        cifar.load_dataset(str(tmp_path / "a"), cache_dir=cache)
    image.parent.rmdir()
    with pytest.raises(DataError, match=r"2 classes to train on and 1 to test \(only in one of them: zebra\)"):
        cifar.load_dataset(str(tmp_path / "a"), cache_dir=cache)


def test_synthetic_is_deterministic_learnable_and_never_cached(cache: Path):
    one, two = (cifar.load_dataset("synthetic:500", cache_dir=cache) for _ in range(2))
    assert np.array_equal(one.train.images, two.train.images)
    assert not np.array_equal(one.train.images[:100], one.test.images)
    assert len(one.train.labels) == 500
    assert len(one.test.labels) == 100
    assert np.bincount(one.train.labels).tolist() == [50] * 10
    means = np.stack([one.train.images[one.train.labels == k].mean(0) for k in range(10)])
    nearest = ((one.test.images[:, None] - means) ** 2).sum((2, 3, 4)).argmin(1)
    assert (nearest == one.test.labels).mean() > 0.9
    assert not cache.exists()
    assert len(cifar.load_dataset("synthetic:3").train.labels) == 10
    assert len(cifar.load_dataset("synthetic:3").test.labels) == 10
    hundred = cifar.load_dataset("synthetic:300", "cifar100")
    assert len(hundred.classes) == 100
    assert set(hundred.train.labels.tolist()) == set(range(100))
    with pytest.raises(UsageError, match="synthetic:N"):
        cifar.load_dataset("synthetic:many")


def entries(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir())


@pytest.mark.parametrize("damage", ["truncated", "json", "missing", "swapped", "older"])
def test_a_damaged_cache_is_rebuilt_silently(tiny_cifar, cache: Path, damage: str):
    quiet(tiny_cifar.python, cache)
    [name] = entries(cache)
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
    assert same(quiet(tiny_cifar.python, cache), tiny_cifar.images, tiny_cifar.labels)
    assert entries(cache) == [name]
    loaded = quiet(tiny_cifar.python, cache)
    assert isinstance(loaded.train.images, np.memmap)
    assert not loaded.train.images.flags.writeable


def test_the_cache_follows_the_files(tiny_cifar, cache: Path, tmp_path: Path):
    quiet(tiny_cifar.python, cache)
    images, labels = tiny_cifar.arrays(1)
    tiny_cifar.write(tmp_path / "mine", images, labels)
    for path in (tmp_path / "mine" / "cifar-10-batches-py").iterdir():
        shutil.copy(path, tiny_cifar.python)
    loaded, _ = warned(tiny_cifar.python, cache)
    assert same(loaded, images, labels)


def test_a_cache_that_cannot_be_written_costs_one_warning(tiny_cifar, cache: Path, monkeypatch):
    cache.write_text("a file where the folder should be")
    loaded, text = warned(tiny_cifar.python, cache)
    assert same(loaded, tiny_cifar.images, tiny_cifar.labels)
    assert "cannot cache the data set" in text
    cache.unlink()
    save, calls = np.save, []

    def full(path: Path, array: np.ndarray, **options: bool) -> None:
        calls.append(path)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(path, array, **options)

    monkeypatch.setattr(np, "save", full)
    loaded, text = warned(tiny_cifar.python, cache)
    assert same(loaded, tiny_cifar.images, tiny_cifar.labels)
    assert "No space left" in text
    assert entries(cache) == []


def test_what_a_killed_writer_left_is_swept(tiny_cifar, cache: Path):
    quiet(tiny_cifar.python, cache)
    [name] = entries(cache)
    (cache / name / "meta.json").unlink()
    old, fresh = cache / f"{name}.1-old.tmp", cache / f"{name}.2-fresh.tmp"
    old.mkdir()
    fresh.mkdir()
    os.utime(old, (0, 0))
    quiet(tiny_cifar.python, cache)
    assert entries(cache) == sorted([name, fresh.name])


def test_two_processes_at_once(tmp_path: Path, cache: Path):
    write_pngs(tmp_path / "a", ("ant", "zebra"))
    code = "import sys; from fastcifar.data import cifar; from pathlib import Path;"
    code += (
        "print(cifar.load_dataset(sys.argv[1], cache_dir=Path(sys.argv[2])).train.images.sum(), 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a"), str(cache)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    results = [process.communicate(timeout=60) for process in running]
    assert len(set(results)) == 1
    assert results[0][0].endswith("False\n")  # and no torch was imported
    assert results[0][1] == ""
    assert len(entries(cache)) == 1


def test_losing_the_race_for_an_entry_is_no_failure(tiny_cifar, cache: Path, monkeypatch):
    rename, raced = Path.rename, []

    def late(path: Path, target: Path) -> Path:
        if not raced:  # just before our rename, another process makes the same entry
            raced.append(target)
            shutil.copytree(path, target)
        return rename(path, target)

    monkeypatch.setattr(dataset_cache.Path, "rename", late)
    assert same(quiet(tiny_cifar.python, cache), tiny_cifar.images, tiny_cifar.labels)
    assert entries(cache) == [raced[0].name]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=80), st.data(), st.integers(0, 2**63))
def test_split_is_exact_stratified_and_fixed(labels: list[int], data: st.DataObject, seed: int):
    array = np.array(labels, np.int64)
    size = data.draw(st.integers(0, len(labels) - 1))
    train, val = cifar.stratified_split(array, size, seed)
    assert train.dtype == val.dtype == np.int64
    assert len(val) == size
    assert sorted([*train, *val]) == list(range(len(labels)))
    assert (np.diff(train) > 0).all()
    assert (np.diff(val) > 0).all()
    for label in set(labels):
        share = size * labels.count(label) / len(labels)
        assert abs((array[val] == label).sum() - share) < 1
    assert np.array_equal(cifar.stratified_split(array, size, seed)[1], val)


def test_split_of_cifar_and_its_errors():
    labels = np.arange(50_000, dtype=np.int64) % 10
    _, val = cifar.stratified_split(labels, 5_000, 0)
    assert np.bincount(labels[val]).tolist() == [500] * 10
    # Golden: this choice is part of every published figure, so no numpy may change it.
    assert val[:5].tolist() == [0, 21, 38, 43, 54]
    assert not np.array_equal(val, cifar.stratified_split(labels, 5_000, 1)[1])
    for size in (-1, 50_000, 60_000):
        with pytest.raises(UsageError, match=r"--val-size .*choose 0 to 49,999"):
            cifar.stratified_split(labels, size, 0)
    with pytest.raises(UsageError, match="--val-seed"):
        cifar.stratified_split(labels, 10, -1)


def test_normalisation_by_name_and_by_numbers():
    for name, row in normalization.NORMALIZATIONS.items():
        assert normalization.parse_normalization(name) == row
    assert normalization.parse_normalization("0.5,0.4,0.3:0.25,0.2,0.1") == ((0.5, 0.4, 0.3), (0.25, 0.2, 0.1))
    assert normalization.parse_normalization("0.5:0.25") == ((0.5,) * 3, (0.25,) * 3)
    with pytest.raises(UsageError, match="did you mean 'cifar10'"):
        normalization.parse_normalization("cifar-10")


@pytest.mark.parametrize(
    "spec", ["", ":", "0.5:0", "0.5:-1", "1,2:1,2", "a:b", "0.5:nan", "inf:1", "1:1:1", "1,2,3,4:1"]
)
def test_normalisation_refuses(spec: str):
    with pytest.raises(UsageError, match="normalis"):
        normalization.parse_normalization(spec)


needs_data = pytest.mark.skipif(not os.environ.get("FASTCIFAR_DATA"), reason="needs CIFAR-10: set FASTCIFAR_DATA")


@needs_data
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_real_set_and_its_normalisation(cache: Path):
    loaded = cifar.load_dataset(cache_dir=cache)
    assert loaded.train.images.shape == (50_000, 3, 32, 32)
    assert loaded.test.images.shape == (10_000, 3, 32, 32)
    assert loaded.classes == cifar.DATASETS["cifar10"].class_names
    mean, std = normalization.NORMALIZATIONS["cifar10"]
    values = np.arange(256) / 255
    for channel in range(3):
        parts = np.split(loaded.train.images[:, channel], 50)
        counts = sum(np.bincount(part.ravel(), minlength=256) for part in parts) / (50_000 * 1024)
        assert counts @ values == pytest.approx(mean[channel], abs=1e-6)
        assert (counts @ values**2 - (counts @ values) ** 2) ** 0.5 == pytest.approx(std[channel], abs=1e-6)


@needs_data
@pytest.mark.parametrize("name", ["data_batch_3", "test_batch"])
def test_fault11_one_changed_byte_of_the_real_set(tmp_path: Path, cache: Path, name: str):
    source = Path(os.environ["FASTCIFAR_DATA"])
    source = source if (source / name).is_file() else source / "cifar-10-batches-py"
    if not (source / name).is_file():
        pytest.skip("FASTCIFAR_DATA holds no Python folder")
    for path in source.iterdir():
        (tmp_path / path.name).symlink_to(path.resolve())
    (tmp_path / name).unlink()
    shutil.copy(source / name, tmp_path / name)
    flip(tmp_path / name, 12_345_678)
    with pytest.raises(DataError, match=rf"{name} damaged: expected MD5 \w+, found \w+"):
        cifar.load_dataset(str(tmp_path), cache_dir=cache)
