"""The official CIFAR files: what they are called, what is in them, and whether they can be believed.

It must not unpickle except through `unpickle`, nor choose where to look (`cifar`), nor open files (`archive`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fastcifar.data.safe_pickle import load_pickle
from fastcifar.errors import DataError

PIXELS = 3 * 32 * 32
AGAIN = "get the official file again, or name another place with --data or FASTCIFAR_DATA"


@dataclass(frozen=True)
class Split:
    """`images` uint8 [n, 3, 32, 32], planar RGB, C-contiguous, possibly a read-only memory map; `labels` int64 [n]."""

    images: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Dataset:
    """Both splits, the class names in label order, what was read, whether every file's MD5 is the official one, and
    what kind of thing was read, in words."""

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    source: str
    official: bool
    kind: str = ""


@dataclass(frozen=True)
class Batch:
    """One file of images: its official MD5, and the `batch_label` inside it (Python packing only)."""

    name: str
    split: str
    rows: int
    md5: str = ""
    title: str = ""


@dataclass(frozen=True)
class Packing:
    """One way the set is published: a folder of batches and a file of class names, in a .tar.gz."""

    folder: str
    tar: str
    batches: tuple[Batch, ...]
    meta: str
    meta_md5: str = ""


@dataclass(frozen=True)
class Official:
    """A row of `DATASETS`. `names` is the class order for class folders (empty: by name); `content` and `reordered`
    prove a set whose training images come in another order: `content_digest` of a split, MD5 of a file."""

    classes: int
    url: str
    tar_md5: str
    label_key: str
    names_key: str
    label_bytes: int  # of a binary row; the last one is the label
    python: Packing
    binary: Packing
    names: tuple[str, ...] = ()
    content: dict[str, str] = field(default_factory=dict)
    reordered: dict[str, str] = field(default_factory=dict)


DATASETS: dict[str, Official] = {
    "cifar10": Official(
        classes=10,
        url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        tar_md5="c58f30108f718f92721af3b95e74349a",
        label_key="labels",
        names_key="label_names",
        label_bytes=1,
        python=Packing(
            folder="cifar-10-batches-py",
            tar="cifar-10-python.tar.gz",
            batches=(
                Batch("data_batch_1", "train", 10_000, "c99cafc152244af753f735de768cd75f", "training batch 1 of 5"),
                Batch("data_batch_2", "train", 10_000, "d4bba439e000b95fd0a9bffe97cbabec", "training batch 2 of 5"),
                Batch("data_batch_3", "train", 10_000, "54ebc095f3ab1f0389bbae665268c751", "training batch 3 of 5"),
                Batch("data_batch_4", "train", 10_000, "634d18415352ddfa80567beed471001a", "training batch 4 of 5"),
                Batch("data_batch_5", "train", 10_000, "482c414d41f54cd18b22e5b47cb7c3cb", "training batch 5 of 5"),
                Batch("test_batch", "test", 10_000, "40351d587109b95175f43aff81a1287e", "testing batch 1 of 1"),
            ),
            meta="batches.meta",
            meta_md5="5ff9c542aee3614f3951f8cda6e48888",
        ),
        # Public checks agree on these MD5s; test_batch.bin's was also computed from test_batch.
        binary=Packing(
            folder="cifar-10-batches-bin",
            tar="cifar-10-binary.tar.gz",
            batches=(
                Batch("data_batch_1.bin", "train", 10_000, "5dd7e06a14cb22eb9f671a540d1b7c25"),
                Batch("data_batch_2.bin", "train", 10_000, "5ea93a67294ea407fff1d09f752e9692"),
                Batch("data_batch_3.bin", "train", 10_000, "942cd6a4bcdd0dd3c604fbe906cb4421"),
                Batch("data_batch_4.bin", "train", 10_000, "ae636b3ba5c66a11e91e8cb52e771fcb"),
                Batch("data_batch_5.bin", "train", 10_000, "53f37980c15c3d472c316c40844f3f0d"),
                Batch("test_batch.bin", "test", 10_000, "803d5f7f4d78ea53de84dbe85f74fb6d"),
            ),
            meta="batches.meta.txt",
        ),
        names=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        content={"train": "1dcbc641ae818c058156633b92538974", "test": "762b4e904b441cc19ea5cb6fb8b54f8f"},
        # A packing in circulation with the official images of each class in another order; kept to name a damaged file.
        reordered={
            "data_batch_1": "02c8b8c5218fd5808830be6566332c42",
            "data_batch_2": "c945726bef0587d09167131b57065491",
            "data_batch_3": "8a4bd9b8a2fa4ce2566c71ef9e02ec8d",
            "data_batch_4": "490899ba4772f771d500a50e332d5a0c",
            "data_batch_5": "ab90f073b77483564a43a3efa30e312c",
        },
    ),
    "cifar100": Official(
        classes=100,
        url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        tar_md5="eb9058c3a382ffc7106e4002c42a8d85",
        label_key="fine_labels",
        names_key="fine_label_names",
        label_bytes=2,
        python=Packing(
            folder="cifar-100-python",
            tar="cifar-100-python.tar.gz",
            batches=(
                Batch("train", "train", 50_000, "16019d7e3df5f24257cddd939b257f8d", "training batch 1 of 1"),
                Batch("test", "test", 10_000, "f0ef6b0ae62326f3e7ffdfab6717acfc", "testing batch 1 of 1"),
            ),
            meta="meta",
            meta_md5="7973b15100ade9c7d40fb424638fde48",
        ),
        binary=Packing(
            folder="cifar-100-binary",
            tar="cifar-100-binary.tar.gz",
            batches=(
                Batch("train.bin", "train", 50_000),
                Batch("test.bin", "test", 10_000),
            ),
            meta="fine_label_names.txt",
        ),
    ),
}

# A file of a packing, as it comes from a folder or an archive: the packing, the file's name, its bytes.
Member = tuple[Packing, str, bytes]


def read(row: Official, members: Iterator[Member], source: Path) -> tuple[dict[str, Split], tuple[str, ...], bool, str]:
    """Both splits, the class names, whether every MD5 is official, and one line for the user (empty if all is).

    Raises `DataError` naming the file, what was expected and what was found: structure first, then `_judge`.
    """
    splits = {part: _empty(row, part) for part in ("train", "test")}
    md5s: dict[str, str] = {}
    classes: tuple[str, ...] = ()
    packing = row.python
    for packing, name, blob in members:
        what = str(source / name)
        if name in md5s:
            raise DataError(f"{what} is there twice, expected once", AGAIN)
        md5s[name] = hashlib.md5(blob, usedforsecurity=False).hexdigest()
        if name == packing.meta:
            classes = _class_names(row, packing, blob, what)
            continue
        start, batch = _place(packing, name)
        swapped = next((other.name for other in packing.batches if other.md5 == md5s[name] and other.name != name), "")
        if swapped:
            raise DataError(f"{what} is the official {swapped}, expected {name}: files were swapped", AGAIN)
        rows = splits[batch.split].images.reshape(-1, PIXELS)[start : start + batch.rows]
        labels = splits[batch.split].labels[start : start + batch.rows]
        if packing is row.binary:
            _binary_batch(row, batch, blob, what, rows, labels)
        else:
            _python_batch(row, batch, blob, what, rows, labels, official=md5s[name] == batch.md5)
    missing = [name for name in (*(batch.name for batch in packing.batches), packing.meta) if name not in md5s]
    if missing:
        raise DataError(f"{source} lacks {', '.join(missing)}", AGAIN)
    _refuse_uneven(row, packing, splits, source)
    official, note = _judge(row, packing, md5s, splits, classes, source)
    return splits, classes, official, note


def _empty(row: Official, part: str) -> Split:
    rows = sum(batch.rows for batch in row.python.batches if batch.split == part)
    return Split(np.empty((rows, 3, 32, 32), np.uint8), np.empty(rows, np.int64))


def _place(packing: Packing, name: str) -> tuple[int, Batch]:
    """The first row of file `name` in its split, and the file's description."""
    batch = next(batch for batch in packing.batches if batch.name == name)
    before = packing.batches[: packing.batches.index(batch)]
    return sum(other.rows for other in before if other.split == batch.split), batch


def _binary_batch(row: Official, batch: Batch, blob: bytes, what: str, images: np.ndarray, labels: np.ndarray) -> None:
    """Rows of `label_bytes` labels (coarse before fine) and 3,072 planar pixels into `images` and `labels`."""
    width = row.label_bytes + PIXELS
    if len(blob) != batch.rows * width:
        expected = f"{batch.rows * width:,} ({batch.rows:,} rows of {width:,})"
        raise DataError(f"{what} has {len(blob):,} bytes, expected {expected}", AGAIN)
    table = np.frombuffer(blob, np.uint8).reshape(batch.rows, width)
    images[:] = table[:, row.label_bytes :]
    labels[:] = table[:, row.label_bytes - 1]
    _refuse_labels(row, int(labels.max()), what)


def _python_batch(
    row: Official, batch: Batch, blob: bytes, what: str, images: np.ndarray, labels: np.ndarray, *, official: bool
) -> None:
    """The pickled dict of one batch into `images` uint8 [rows, 3072] and `labels` int64 [rows], every part checked."""
    found = {_string(key): value for key, value in load_pickle(blob, what).items()}
    for key in ("data", row.label_key):
        if key not in found:
            raise DataError(f"{what} has the keys {sorted(found)[:8]}, expected 'data' and {row.label_key!r}", AGAIN)
    title = _string(found.get("batch_label", batch.title))
    if title != batch.title and not official:
        raise DataError(f"{what} calls itself {title[:60]!r}, expected {batch.title!r}: files were swapped", AGAIN)
    data, given = found["data"], found[row.label_key]
    shape = f"{data.shape} {data.dtype}" if isinstance(data, np.ndarray) else type(data).__name__
    if shape != f"({batch.rows}, {PIXELS}) uint8":
        raise DataError(f"{what} has images {shape}, expected ({batch.rows}, {PIXELS}) uint8", AGAIN)
    values = given.tolist() if isinstance(given, np.ndarray) else given
    if not isinstance(values, list) or len(values) != batch.rows or {type(value) for value in values} != {int}:
        count = f"{len(values):,}" if isinstance(values, list) else "no list of"
        raise DataError(f"{what} has {count} labels, expected {batch.rows:,} integers", AGAIN)
    for value in (min(values), max(values)):
        _refuse_labels(row, value, what)
    images[:] = data
    labels[:] = values


def _string(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _refuse_labels(row: Official, value: int, what: str) -> None:
    if not 0 <= value < row.classes:
        raise DataError(f"{what} has the label {value}, expected 0 to {row.classes - 1}", AGAIN)


def _class_names(row: Official, packing: Packing, blob: bytes, what: str) -> tuple[str, ...]:
    """The names in label order: a list in the Python packing's dict, one a line in the binary packing's text."""
    if packing is row.binary:
        names = [line.strip() for line in blob.decode("utf-8", "replace").splitlines() if line.strip()]
    else:
        found = {_string(key): value for key, value in load_pickle(blob, what).items()}
        value = found.get(row.names_key)
        if not isinstance(value, list) or not all(isinstance(name, bytes | str) for name in value):
            raise DataError(f"{what} has the keys {sorted(found)[:8]}, expected a list {row.names_key!r}", AGAIN)
        names = [_string(name) for name in value]
    if len(names) != row.classes or len(set(names)) != row.classes:
        raise DataError(f"{what} has {len(set(names))} class names, expected {row.classes}", AGAIN)
    return tuple(names)


def _refuse_uneven(row: Official, packing: Packing, splits: dict[str, Split], source: Path) -> None:
    """CIFAR has as many images of each class; no training batch alone has, which finds it in the test set's place."""
    for part, split in splits.items():
        counts = np.bincount(split.labels, minlength=row.classes)
        expected = len(split.labels) // row.classes
        if (counts != expected).any():
            worst = int(np.abs(counts - expected).argmax())
            files = ", ".join(batch.name for batch in packing.batches if batch.split == part)
            found = f"{counts[worst]:,} images of class {worst} in {files}"
            raise DataError(f"{source} has {found}, expected {expected:,} of each class", AGAIN)


def content_digest(split: Split) -> str:
    """A 128-bit sum over the records (label byte and pixels) in any order. It finds damage, not malice."""
    total = 0
    for label, image in zip(split.labels.tolist(), split.images, strict=True):
        total += int.from_bytes(hashlib.blake2b(image.data, digest_size=16, key=b"%d" % label).digest(), "little")
    return f"{total % 2**128:032x}"


def _judge(
    row: Official,
    packing: Packing,
    md5s: dict[str, str],
    splits: dict[str, Split],
    classes: tuple[str, ...],
    source: Path,
) -> tuple[bool, str]:
    """Whether every file is official, and the note for the user; `DataError` for damage.

    Three kinds of set are accepted. Official: each file's MD5 is. Reordered: the official images and labels, each
    split proven by its files' MD5s or by `content_digest`. Unknown: not one file and neither split is the official
    one, so it is somebody's own, held by structure alone (a flipped pixel there cannot be told from their pixel).
    Once anything is proven to be CIFAR's, all must be: what is not is damage.
    """
    published = {batch.name: batch.md5 for batch in packing.batches}
    packings = [published, published | (row.reordered if packing is row.python else {})]
    matching = {name for known in packings for name, md5 in known.items() if md5 and md5 == md5s[name]}
    parts = {part: [batch.name for batch in packing.batches if batch.split == part] for part in splits}
    by_md5 = {part: any(all(known[n] == md5s[n] for n in names) for known in packings) for part, names in parts.items()}
    proven = dict(by_md5)
    for part, names in parts.items():
        # A file that fails beside intact ones of the same packing is damaged even where its pixels survived.
        alone = matching.isdisjoint(names) and not (part == "test" and by_md5["train"])
        if not by_md5[part] and alone and part in row.content:
            proven[part] = content_digest(splits[part]) == row.content[part]
    if not matching and not any(proven.values()):
        return False, f"{source} is not the official data set (no file has its MD5): its structure was checked, no more"
    for part, names in parts.items():
        bad = [name for name in names if name not in matching] or names
        if not proven[part]:
            which = f"{source / bad[0]}" if len(bad) == 1 or len(bad) < len(names) else f"{source}: {', '.join(names)}"
            md5 = f"expected MD5 {published[bad[0]] or 'unknown'}, found {md5s[bad[0]]}"
            raise DataError(f"{which} damaged: {md5}, while other files are the official ones", AGAIN)
    meta = packing.meta
    intact = md5s[meta] == packing.meta_md5 if packing.meta_md5 and matching else row.names in ((), classes)
    if not intact:
        found = f"expected MD5 {packing.meta_md5 or 'unknown'}, found {md5s[meta]}"
        raise DataError(f"{source / meta} damaged: {found}, while the images are the official ones", AGAIN)
    changed = [name for name, md5 in published.items() if md5 != md5s[name]]
    if not changed:
        return True, ""
    return False, f"{source} holds the official images and labels in unofficial files (other MD5: {', '.join(changed)})"
