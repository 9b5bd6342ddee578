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

IMAGE_BYTES = 3 * 32 * 32
REDOWNLOAD_REMEDY = "get the official file again, or name another place with --data or FASTCIFAR_DATA"


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
    is_official: bool
    source_type: str = ""


@dataclass(frozen=True)
class BatchFile:
    """One file of images: its official MD5, and the `batch_label` inside it (Python packing only)."""

    name: str
    split: str
    num_images: int
    md5: str = ""
    batch_label: str = ""


@dataclass(frozen=True)
class FileLayout:
    """One way the set is published: a folder of batches and a file of class names, in a .tar.gz."""

    folder: str
    archive_name: str
    batches: tuple[BatchFile, ...]
    meta_file: str
    meta_md5: str = ""


@dataclass(frozen=True)
class DatasetSpec:
    """A row of `DATASETS`. `names` is the class order for class folders (empty: by name); `content` and `reordered`
    prove a set whose training images come in another order: `content_digest` of a split, MD5 of a file."""

    num_classes: int
    url: str
    archive_md5: str
    label_key: str
    class_names_key: str
    label_bytes: int  # of a binary row; the last one is the label
    python: FileLayout
    binary: FileLayout
    class_names: tuple[str, ...] = ()
    split_digests: dict[str, str] = field(default_factory=dict)
    reordered_md5s: dict[str, str] = field(default_factory=dict)


DATASETS: dict[str, DatasetSpec] = {
    "cifar10": DatasetSpec(
        num_classes=10,
        url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        archive_md5="c58f30108f718f92721af3b95e74349a",
        label_key="labels",
        class_names_key="label_names",
        label_bytes=1,
        python=FileLayout(
            folder="cifar-10-batches-py",
            archive_name="cifar-10-python.tar.gz",
            batches=(
                BatchFile("data_batch_1", "train", 10_000, "c99cafc152244af753f735de768cd75f", "training batch 1 of 5"),
                BatchFile("data_batch_2", "train", 10_000, "d4bba439e000b95fd0a9bffe97cbabec", "training batch 2 of 5"),
                BatchFile("data_batch_3", "train", 10_000, "54ebc095f3ab1f0389bbae665268c751", "training batch 3 of 5"),
                BatchFile("data_batch_4", "train", 10_000, "634d18415352ddfa80567beed471001a", "training batch 4 of 5"),
                BatchFile("data_batch_5", "train", 10_000, "482c414d41f54cd18b22e5b47cb7c3cb", "training batch 5 of 5"),
                BatchFile("test_batch", "test", 10_000, "40351d587109b95175f43aff81a1287e", "testing batch 1 of 1"),
            ),
            meta_file="batches.meta",
            meta_md5="5ff9c542aee3614f3951f8cda6e48888",
        ),
        # Public checks agree on these MD5s; test_batch.bin's was also computed from test_batch.
        binary=FileLayout(
            folder="cifar-10-batches-bin",
            archive_name="cifar-10-binary.tar.gz",
            batches=(
                BatchFile("data_batch_1.bin", "train", 10_000, "5dd7e06a14cb22eb9f671a540d1b7c25"),
                BatchFile("data_batch_2.bin", "train", 10_000, "5ea93a67294ea407fff1d09f752e9692"),
                BatchFile("data_batch_3.bin", "train", 10_000, "942cd6a4bcdd0dd3c604fbe906cb4421"),
                BatchFile("data_batch_4.bin", "train", 10_000, "ae636b3ba5c66a11e91e8cb52e771fcb"),
                BatchFile("data_batch_5.bin", "train", 10_000, "53f37980c15c3d472c316c40844f3f0d"),
                BatchFile("test_batch.bin", "test", 10_000, "803d5f7f4d78ea53de84dbe85f74fb6d"),
            ),
            meta_file="batches.meta.txt",
        ),
        class_names=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        split_digests={"train": "1dcbc641ae818c058156633b92538974", "test": "762b4e904b441cc19ea5cb6fb8b54f8f"},
        # A packing in circulation with the official images of each class in another order; kept to name a damaged file.
        reordered_md5s={
            "data_batch_1": "02c8b8c5218fd5808830be6566332c42",
            "data_batch_2": "c945726bef0587d09167131b57065491",
            "data_batch_3": "8a4bd9b8a2fa4ce2566c71ef9e02ec8d",
            "data_batch_4": "490899ba4772f771d500a50e332d5a0c",
            "data_batch_5": "ab90f073b77483564a43a3efa30e312c",
        },
    ),
    "cifar100": DatasetSpec(
        num_classes=100,
        url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        archive_md5="eb9058c3a382ffc7106e4002c42a8d85",
        label_key="fine_labels",
        class_names_key="fine_label_names",
        label_bytes=2,
        python=FileLayout(
            folder="cifar-100-python",
            archive_name="cifar-100-python.tar.gz",
            batches=(
                BatchFile("train", "train", 50_000, "16019d7e3df5f24257cddd939b257f8d", "training batch 1 of 1"),
                BatchFile("test", "test", 10_000, "f0ef6b0ae62326f3e7ffdfab6717acfc", "testing batch 1 of 1"),
            ),
            meta_file="meta",
            meta_md5="7973b15100ade9c7d40fb424638fde48",
        ),
        binary=FileLayout(
            folder="cifar-100-binary",
            archive_name="cifar-100-binary.tar.gz",
            batches=(
                BatchFile("train.bin", "train", 50_000),
                BatchFile("test.bin", "test", 10_000),
            ),
            meta_file="fine_label_names.txt",
        ),
    ),
}

# A file of a packing, as it comes from a folder or an archive: the packing, the file's name, its bytes.
MemberFile = tuple[FileLayout, str, bytes]


def read_official_files(
    spec: DatasetSpec, members: Iterator[MemberFile], source: Path
) -> tuple[dict[str, Split], tuple[str, ...], bool, str]:
    """Both splits, the class names, whether every MD5 is official, and one line for the user (empty if all is).

    Raises `DataError` naming the file, what was expected and what was found: structure first, then `_judge`.
    """
    splits = {part: _allocate_split(spec, part) for part in ("train", "test")}
    md5s: dict[str, str] = {}
    classes: tuple[str, ...] = ()
    packing = spec.python
    for packing, name, blob in members:
        what = str(source / name)
        if name in md5s:
            raise DataError(f"{what} is there twice, expected once", REDOWNLOAD_REMEDY)
        md5s[name] = hashlib.md5(blob, usedforsecurity=False).hexdigest()
        if name == packing.meta_file:
            classes = _parse_class_names(spec, packing, blob, what)
            continue
        start, batch = _locate_batch(packing, name)
        swapped = next((other.name for other in packing.batches if other.md5 == md5s[name] and other.name != name), "")
        if swapped:
            raise DataError(f"{what} is the official {swapped}, expected {name}: files were swapped", REDOWNLOAD_REMEDY)
        rows = splits[batch.split].images.reshape(-1, IMAGE_BYTES)[start : start + batch.num_images]
        labels = splits[batch.split].labels[start : start + batch.num_images]
        if packing is spec.binary:
            _read_binary_batch(spec, batch, blob, what, rows, labels)
        else:
            _read_python_batch(spec, batch, blob, what, rows, labels, is_official=md5s[name] == batch.md5)
    missing = [name for name in (*(batch.name for batch in packing.batches), packing.meta_file) if name not in md5s]
    if missing:
        raise DataError(f"{source} lacks {', '.join(missing)}", REDOWNLOAD_REMEDY)
    _check_class_balance(spec, packing, splits, source)
    official, note = _verify_official(spec, packing, md5s, splits, classes, source)
    return splits, classes, official, note


def _allocate_split(spec: DatasetSpec, split_name: str) -> Split:
    rows = sum(batch.num_images for batch in spec.python.batches if batch.split == split_name)
    return Split(np.empty((rows, 3, 32, 32), np.uint8), np.empty(rows, np.int64))


def _locate_batch(layout: FileLayout, name: str) -> tuple[int, BatchFile]:
    """The first row of file `name` in its split, and the file's description."""
    batch = next(batch for batch in layout.batches if batch.name == name)
    before = layout.batches[: layout.batches.index(batch)]
    return sum(other.num_images for other in before if other.split == batch.split), batch


def _read_binary_batch(
    spec: DatasetSpec, batch: BatchFile, blob: bytes, source_name: str, images: np.ndarray, labels: np.ndarray
) -> None:
    """Rows of `label_bytes` labels (coarse before fine) and 3,072 planar pixels into `images` and `labels`."""
    width = spec.label_bytes + IMAGE_BYTES
    if len(blob) != batch.num_images * width:
        expected = f"{batch.num_images * width:,} ({batch.num_images:,} rows of {width:,})"
        raise DataError(f"{source_name} has {len(blob):,} bytes, expected {expected}", REDOWNLOAD_REMEDY)
    table = np.frombuffer(blob, np.uint8).reshape(batch.num_images, width)
    images[:] = table[:, spec.label_bytes :]
    labels[:] = table[:, spec.label_bytes - 1]
    _check_label(spec, int(labels.max()), source_name)


def _read_python_batch(
    spec: DatasetSpec,
    batch: BatchFile,
    blob: bytes,
    source_name: str,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    is_official: bool,
) -> None:
    """The pickled dict of one batch into `images` uint8 [rows, 3072] and `labels` int64 [rows], every part checked."""
    found = {_to_str(key): value for key, value in load_pickle(blob, source_name).items()}
    for key in ("data", spec.label_key):
        if key not in found:
            raise DataError(
                f"{source_name} has the keys {sorted(found)[:8]}, expected 'data' and {spec.label_key!r}",
                REDOWNLOAD_REMEDY,
            )
    title = _to_str(found.get("batch_label", batch.batch_label))
    if title != batch.batch_label and not is_official:
        raise DataError(
            f"{source_name} calls itself {title[:60]!r}, expected {batch.batch_label!r}: files were swapped",
            REDOWNLOAD_REMEDY,
        )
    data, given = found["data"], found[spec.label_key]
    shape = f"{data.shape} {data.dtype}" if isinstance(data, np.ndarray) else type(data).__name__
    if shape != f"({batch.num_images}, {IMAGE_BYTES}) uint8":
        raise DataError(
            f"{source_name} has images {shape}, expected ({batch.num_images}, {IMAGE_BYTES}) uint8", REDOWNLOAD_REMEDY
        )
    values = given.tolist() if isinstance(given, np.ndarray) else given
    if not isinstance(values, list) or len(values) != batch.num_images or {type(value) for value in values} != {int}:
        count = f"{len(values):,}" if isinstance(values, list) else "no list of"
        raise DataError(f"{source_name} has {count} labels, expected {batch.num_images:,} integers", REDOWNLOAD_REMEDY)
    for value in (min(values), max(values)):
        _check_label(spec, value, source_name)
    images[:] = data
    labels[:] = values


def _to_str(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _check_label(spec: DatasetSpec, value: int, source_name: str) -> None:
    if not 0 <= value < spec.num_classes:
        raise DataError(f"{source_name} has the label {value}, expected 0 to {spec.num_classes - 1}", REDOWNLOAD_REMEDY)


def _parse_class_names(spec: DatasetSpec, layout: FileLayout, blob: bytes, source_name: str) -> tuple[str, ...]:
    """The names in label order: a list in the Python packing's dict, one a line in the binary packing's text."""
    if layout is spec.binary:
        names = [line.strip() for line in blob.decode("utf-8", "replace").splitlines() if line.strip()]
    else:
        found = {_to_str(key): value for key, value in load_pickle(blob, source_name).items()}
        value = found.get(spec.class_names_key)
        if not isinstance(value, list) or not all(isinstance(name, bytes | str) for name in value):
            raise DataError(
                f"{source_name} has the keys {sorted(found)[:8]}, expected a list {spec.class_names_key!r}",
                REDOWNLOAD_REMEDY,
            )
        names = [_to_str(name) for name in value]
    if len(names) != spec.num_classes or len(set(names)) != spec.num_classes:
        raise DataError(
            f"{source_name} has {len(set(names))} class names, expected {spec.num_classes}", REDOWNLOAD_REMEDY
        )
    return tuple(names)


def _check_class_balance(spec: DatasetSpec, layout: FileLayout, splits: dict[str, Split], source: Path) -> None:
    """CIFAR has as many images of each class; no training batch alone has, which finds it in the test set's place."""
    for part, split in splits.items():
        counts = np.bincount(split.labels, minlength=spec.num_classes)
        expected = len(split.labels) // spec.num_classes
        if (counts != expected).any():
            worst = int(np.abs(counts - expected).argmax())
            files = ", ".join(batch.name for batch in layout.batches if batch.split == part)
            found = f"{counts[worst]:,} images of class {worst} in {files}"
            raise DataError(f"{source} has {found}, expected {expected:,} of each class", REDOWNLOAD_REMEDY)


def split_digest(split: Split) -> str:
    """A 128-bit sum over the records (label byte and pixels) in any order. It finds damage, not malice."""
    total = 0
    for label, image in zip(split.labels.tolist(), split.images, strict=True):
        total += int.from_bytes(hashlib.blake2b(image.data, digest_size=16, key=b"%d" % label).digest(), "little")
    return f"{total % 2**128:032x}"


def _verify_official(
    spec: DatasetSpec,
    layout: FileLayout,
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
    published = {batch.name: batch.md5 for batch in layout.batches}
    packings = [published, published | (spec.reordered_md5s if layout is spec.python else {})]
    matching = {name for known in packings for name, md5 in known.items() if md5 and md5 == md5s[name]}
    parts = {part: [batch.name for batch in layout.batches if batch.split == part] for part in splits}
    by_md5 = {part: any(all(known[n] == md5s[n] for n in names) for known in packings) for part, names in parts.items()}
    proven = dict(by_md5)
    for part, names in parts.items():
        # A file that fails beside intact ones of the same packing is damaged even where its pixels survived.
        alone = matching.isdisjoint(names) and not (part == "test" and by_md5["train"])
        if not by_md5[part] and alone and part in spec.split_digests:
            proven[part] = split_digest(splits[part]) == spec.split_digests[part]
    if not matching and not any(proven.values()):
        return False, f"{source} is not the official data set (no file has its MD5): its structure was checked, no more"
    for part, names in parts.items():
        bad = [name for name in names if name not in matching] or names
        if not proven[part]:
            which = f"{source / bad[0]}" if len(bad) == 1 or len(bad) < len(names) else f"{source}: {', '.join(names)}"
            md5 = f"expected MD5 {published[bad[0]] or 'unknown'}, found {md5s[bad[0]]}"
            raise DataError(f"{which} damaged: {md5}, while other files are the official ones", REDOWNLOAD_REMEDY)
    meta = layout.meta_file
    intact = md5s[meta] == layout.meta_md5 if layout.meta_md5 and matching else spec.class_names in ((), classes)
    if not intact:
        found = f"expected MD5 {layout.meta_md5 or 'unknown'}, found {md5s[meta]}"
        raise DataError(f"{source / meta} damaged: {found}, while the images are the official ones", REDOWNLOAD_REMEDY)
    changed = [name for name, md5 in published.items() if md5 != md5s[name]]
    if not changed:
        return True, ""
    return False, f"{source} holds the official images and labels in unofficial files (other MD5: {', '.join(changed)})"
